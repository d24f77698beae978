"""What a dataclass of settings may hold: words it names, sensible numbers, settings of its kind."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Collection
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import DataError


def check_settings(
    settings: Any, *, positive: Collection[str] = (), any_number: Collection[str] = ()
) -> None:
    """Check each field of a dataclass by its annotation.

    A Literal's words are the only ones allowed; numbers must be at least 0, which usually switches
    something off; a field of a dataclass type must hold an instance of it.

    Args:
        positive: fields whose numbers must be more than 0.
        any_number: fields whose numbers may be negative.

    Raises:
        DataError: a value that is none of these, or NaN.
    """
    for field in _fields(settings.__class__):
        name, value = field.name, getattr(settings, field.name)
        if field.words and value not in field.words:
            raise DataError(f"expected {name} {_either(map(repr, field.words))}, got {value!r}")
        if field.kinds and not isinstance(value, field.kinds):
            known = _either(kind.__name__ for kind in field.kinds if kind is not type(None))
            raise DataError(f"expected {name} to be {known}, got {value!r}")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if field.numeric and number and name not in any_number:
            good = value > 0 if name in positive else value >= 0
            if not good:
                least = "more than" if name in positive else "at least"
                raise DataError(f"expected {name} of {least} 0, got {value}")


@dataclasses.dataclass(frozen=True)
class _Field:
    """What may stand in a field: one of these words, numbers, instances of these classes."""

    name: str
    words: tuple[Any, ...]
    numeric: bool
    kinds: tuple[type, ...]


@cache
def _fields(kind: type) -> list[_Field]:
    try:
        hints = get_type_hints(kind)
    except NameError:  # of a script whose names are not to be had
        return []
    found = []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        words = get_args(hint) if get_origin(hint) is Literal else ()
        parts = get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)
        classes = tuple(part for part in parts if isinstance(part, type))
        settings = [part for part in classes if dataclasses.is_dataclass(part)]
        others = [part for part in parts if part not in settings and part is not type(None)]
        kinds = classes if settings and not others else ()
        numeric = bool({hint, *get_args(hint)} & {int, float})
        found.append(_Field(field.name, words, numeric, kinds))
    return found


def _either(words: Any) -> str:
    return " or ".join(", ".join(words).rsplit(", ", 1))
