"""Triggers that a command line names, and the rates that are measured with them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from ..attacks.base import Trigger, attack_class, create_attack
from ..files.images import shown
from ..utils.statistics import Rate
from .name_value import read_settings

_MEANS = {
    "ACC": "clean images classified correctly",
    "ASR": "triggered images classified as the target",
    "RA": "triggered images classified correctly",
}


def trigger_of(options: argparse.Namespace) -> Trigger:
    """The trigger named, with its settings.

    Raises:
        UnknownNameError: no such trigger or setting.
        MisuseError, DataError: a value that does not fit the setting.
    """
    cls = attack_class(options.trigger)
    settings = read_settings(cls, options.trigger_set, f"attack {options.trigger!r}")
    return create_attack(options.trigger, **settings)


def rates_as_text(rates: Mapping[str, Rate], target: int | None, classes: Sequence[str]) -> str:
    """One line per rate, and the target with its class name if that is known."""
    lines = [
        f"{name:4}{rate!s:23} {_MEANS[name]} ({rate.hits} of {rate.count})"
        for name, rate in rates.items()
    ]
    if target is not None:
        lines.append(f"target label {target}{f' ({shown(classes[target])})' if classes else ''}")
    return "\n".join(lines)


def rates_as_data(rates: Mapping[str, Rate], target: int | None) -> dict[str, Any]:
    """Hits, count, share and 95 % interval of each rate, and the target."""
    data: dict[str, Any] = {
        name: {
            "hits": rate.hits,
            "count": rate.count,
            "share": rate.value,
            "interval": list(rate.interval),
        }
        for name, rate in rates.items()
    }
    return data if target is None else {**data, "target": target}
