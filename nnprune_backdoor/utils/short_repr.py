"""A repr of a few hundred characters, however large what it shows."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sized
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

_VALUE = 48  # characters of one field

_WHOLE = 400  # characters


class ShortRepr:
    """Base of dataclasses made with `repr=False`: their fields in short, 400 characters at most.

    Tensors are shown by shape, networks by class, containers by length.
    """

    def __repr__(self) -> str:
        shown = (f"{f.name}={_short(getattr(self, f.name))}" for f in fields(self) if f.repr)  # type: ignore[arg-type]
        text = f"{type(self).__name__}({', '.join(shown)})"
        return text if len(text) <= _WHOLE else f"{text[: _WHOLE - 4]}...)"


def _short(value: Any) -> str:  # noqa: PLR0911 - one return for each kind of value
    if isinstance(value, Tensor):
        return f"Tensor{tuple(value.shape)}"
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping | list | tuple | set | frozenset) and len(value) > 3:
        return f"<{type(value).__name__} of {len(value):,}>"
    if is_dataclass(value) and not isinstance(value, type):
        size = f" of {len(value):,}" if isinstance(value, Sized) else ""
        return f"<{type(value).__name__}{size}>"
    if isinstance(value, tuple):
        return f"({', '.join(map(_short, value))})"
    return _shortener.repr(value)


_shortener = reprlib.Repr()
_shortener.maxstring = _shortener.maxother = _shortener.maxlong = _VALUE
