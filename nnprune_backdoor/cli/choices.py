"""The method and the selector that the options of `purify` and `demo` ask for."""

from __future__ import annotations

import argparse
import dataclasses

from ..criteria.base import Criterion, create_criterion, criterion_class
from ..selectors.base import Selector, create_selector, selector_class
from .base import MisuseError
from .name_value import read_settings

# options that are a selector's setting -> the selector that each implies
_IMPLIED = {"count": "count", "fraction": "fraction", "threshold": "below", "deviations": "outlier"}


def criterion_of(options: argparse.Namespace) -> Criterion:
    """The method with its settings.

    Raises:
        UnknownNameError: no such method or setting.
        MisuseError, DataError: a value that does not fit the setting.
    """
    cls = criterion_class(options.method)
    start = cls.paper() if options.paper else None
    settings = read_settings(cls, options.set, f"criterion {options.method!r}", start)
    if start is not None:
        return dataclasses.replace(start, **settings)
    return create_criterion(options.method, **settings)


def selector_of(options: argparse.Namespace) -> Selector | None:
    """The selector named, or the one that the settings given imply; None without either.

    Raises:
        UnknownNameError: no such selector.
        MisuseError: settings of another selector, or none where it needs one.
        DataError: a value that does not fit the setting.
    """
    given = {
        name: getattr(options, name)
        for name in ("max_drop", *_IMPLIED)
        if getattr(options, name, None) is not None  # `demo` has a few of them
    }
    implied = [_IMPLIED[name] for name in given if name in _IMPLIED]
    if len(implied) > 1:
        raise MisuseError(
            f"these options belong to different selectors ({', '.join(implied)}); give those of one"
        )
    name = options.selector or (implied[0] if implied else None)
    if name is None:
        if given:
            raise MisuseError("--max-drop needs --selector accuracy, trigger or auto")
        return None
    fields = {field.name: field for field in dataclasses.fields(selector_class(name))}  # type: ignore[arg-type]
    for setting in given:
        if setting not in fields:
            raise MisuseError(
                f"--{setting.replace('_', '-')} is not a setting of the selector {name!r}; leave "
                "it out, or give another --selector"
            )
    for setting, field in fields.items():
        if setting in _IMPLIED and field.default is dataclasses.MISSING and setting not in given:
            raise MisuseError(f"--selector {name} needs --{setting}")
    return create_selector(name, **given)


def check_repair(
    options: argparse.Namespace, criterion: Criterion, selector: Selector | None
) -> None:
    """MisuseError for a repair that this method and this selector cannot be followed by."""
    recovers = criterion.recovers_triggers or (selector and selector.recovers_triggers)
    if options.repair == "unlearn" and not recovers:
        raise MisuseError(
            "--repair unlearn needs a recovered trigger; give --method tac or cnp, or --selector "
            "trigger or auto"
        )
