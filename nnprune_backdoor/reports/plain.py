"""Results and settings as plain data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

_MAX_NUMBERS = 1000  # of an array among settings and details; of larger ones only the shape stays


def plain(value: Any) -> Any:  # noqa: PLR0911 - one return for each kind of value
    """`value` as data that strict JSON can hold."""
    match value:
        case None | bool() | int():
            return value
        case float():
            return float(value) if math.isfinite(value) else None
        case str():
            return value.encode(errors="replace").decode()  # lone surrogates cannot be written
        case Mapping():
            return {plain(str(key)): plain(entry) for key, entry in value.items()}
        case list() | tuple() | set() | frozenset():
            return [plain(entry) for entry in value]
        case Tensor() | np.ndarray() | np.generic():
            large = math.prod(value.shape) > _MAX_NUMBERS
            return plain(f"array of shape {tuple(value.shape)}" if large else value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return settings_of(value)
    if callable(value):  # its repr has an address, which differs from run to run
        return plain(getattr(value, "__qualname__", type(value).__name__))
    return plain(repr(value))


def settings_of(configured: Any) -> dict[str, Any]:
    """The fields of a criterion or selector; empty if it is not a dataclass."""
    if not dataclasses.is_dataclass(configured):
        return {}
    names = [field.name for field in dataclasses.fields(configured)]
    return {name: _setting(getattr(configured, name)) for name in names}


def _setting(value: Any) -> Any:
    """A field's value; settings that stand in a field say of which class they are."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"class": type(value).__name__, **settings_of(value)}
    return plain(value)
