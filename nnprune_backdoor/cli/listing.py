"""nnprune-backdoor list: what can be named on the command line."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from .base import Commands, Result, add_command
from .plugins import add_plugins

if TYPE_CHECKING:
    from ..criteria.base import Criterion

_NAME = 16  # columns; the longest name here has 15, a plugin's may have more


def add(commands: Commands) -> None:
    """Add the command's options."""
    parser = add_command(
        commands,
        "list",
        run,
        does="list methods (paper, needs, cost), selectors and triggers",
        example="list",
    )
    add_plugins(parser)


def run(options: argparse.Namespace) -> Result:
    """Each name, then what it is; at most 80 columns."""
    from ..attacks.base import attack_class, list_attacks
    from ..criteria.base import criterion_class, list_criteria
    from ..selectors.base import list_selectors, selector_class

    criteria = {name: criterion_class(name) for name in list_criteria()}
    lines = ["methods (--method), cost with the default settings:", ""]
    for name, cls in criteria.items():
        lines += _entry(name, (cls.reference, f"needs {_needs(cls)}", f"cost: {cls.cost}"))
    selectors = _described(list_selectors(), selector_class)
    triggers = _described(list_attacks(), attack_class)
    for title, entries in (
        ("selectors (--selector)", selectors),
        ("triggers (--trigger, --attack)", triggers),
    ):
        lines += ["", f"{title}:", ""]
        for name, what in entries.items():
            lines += _entry(name, (what,))
    methods = {
        name: {"reference": cls.reference, "needs": _needs(cls), "cost": cls.cost}
        for name, cls in criteria.items()
    }
    return Result(
        "\n".join(lines), {"methods": methods, "selectors": selectors, "triggers": triggers}
    )


def _needs(cls: type[Criterion]) -> str:
    needs = "labelled clean images" if cls.needs_labels else "clean images, no labels"
    if not cls.needs_images:
        needs = "no images"
    return f"{needs}, BatchNorm" if cls.needs_batchnorm else needs


def _described(names: Iterable[str], get: Callable[[str], type]) -> dict[str, str]:
    """Name -> first paragraph of the class's docstring, on one line."""
    return {name: " ".join((get(name).__doc__ or "").split("\n\n")[0].split()) for name in names}


def _entry(name: str, parts: Iterable[str]) -> list[str]:
    wrapped = [line for part in parts for line in textwrap.wrap(part, 80 - _NAME)]
    if len(name) >= _NAME or not wrapped:  # a long name has a line of its own
        return [name, *(" " * _NAME + line for line in wrapped)]
    return [f"{name if i == 0 else '':{_NAME}}{line}" for i, line in enumerate(wrapped)]
