"""What a dataclass of settings may hold: one of the words it names, and numbers that make sense."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import DataError

# nothing runs with none of these; other numbers may be 0, which switches something off, and a
# stop that is never reached may lie below all
_ANY = ("unlearn_stop",)

_POSITIVE = ("batch_size", "mask_batch", "probe_size", "search_batch", "stages", "unlearn_epochs")


def check_settings(settings: Any) -> None:
    """Look at each field by its annotation: a Literal's words, and numbers of at least 0.

    Sizes of batches and the like must be more than 0.

    Raises:
        DataError: a word that is none of those, or a negative number or NaN.
    """
    for name, words, numeric in _fields(settings.__class__):
        value = getattr(settings, name)
        if words and value not in words:
            known = " or ".join(", ".join(map(repr, words)).rsplit(", ", 1))
            raise DataError(f"expected {name} {known}, got {value!r}")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if numeric and number and name not in _ANY:
            positive = name in _POSITIVE
            if not (value > 0 if positive else value >= 0):
                least = "more than" if positive else "at least"
                raise DataError(f"expected {name} of {least} 0, got {value}")


@cache
def _fields(kind: type) -> list[tuple[str, tuple[Any, ...], bool]]:
    """Name, allowed words (if it is a choice), and whether numbers are expected, of each field."""
    try:
        hints = get_type_hints(kind)
    except NameError:  # of a script whose names are not to be had
        return []
    found = []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        words = get_args(hint) if get_origin(hint) is Literal else ()
        parts = {hint, *get_args(hint)}
        found.append((field.name, words, bool(parts & {int, float})))
    return found
