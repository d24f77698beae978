"""What a pickle's objects become when nothing is run: plain data, names and stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .pickle_names import is_forbidden

_MAX_INTEGER_KEY = 2**16  # larger ones can be chosen so that a dictionary becomes slow


class ForbiddenNameError(Exception):
    """A pickle asks for something that no checkpoint needs; the text is its name."""


class BadPickleError(Exception):
    """What is there is no pickle, or one that is damaged or too large."""


@dataclass(frozen=True)
class Name:
    """Something that a pickle would import."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)  # compared by identity, so that it can be a key whatever is in it
class StandIn:
    """Something that a pickle would make by a call.

    Attributes:
        name: What it would call.
        arguments: What it would be called with.
        state: What would be set afterwards; None if nothing.
        entries: What would be stored in it by key.
        items: What would be appended to it.
    """

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    entries: dict[Any, Any] = field(default_factory=dict, repr=False)
    items: list[Any] = field(default_factory=list, repr=False)


Maker = Callable[..., Any]


def checked_name(module: str, name: str) -> Name:
    """The name; ForbiddenNameError for what no checkpoint needs."""
    if is_forbidden(module, name):
        raise ForbiddenNameError(f"{module}.{name}")
    return Name(module, name)


def pairs(keys: list[Any], values: list[Any]) -> dict[Any, Any]:
    """A dictionary; keys that could be slow to hash become stand-ins."""
    return {_key(key): value for key, value in zip(keys, values, strict=True)}


def _key(key: Any) -> Any:
    """The key if its hash is quick and cannot be chosen, else a stand-in.

    A tuple of two of a tuple of two, forty deep, takes for ever to hash.
    """
    quick = type(key) in (str, bytes, bool, type(None), Name, StandIn)
    if quick or (type(key) is int and abs(key) < _MAX_INTEGER_KEY):
        return key
    return StandIn(type(key).__name__, (key,))


def _as_dict(*arguments: Any) -> dict[Any, Any] | None:
    """For dictionaries with arguments: another one, or a list of pairs, or a default."""
    entries: dict[Any, Any] = {}
    for argument in arguments:
        if isinstance(argument, dict):
            entries.update(argument)
        elif isinstance(argument, list | tuple):
            entries.update(pairs([pair[0] for pair in argument], [pair[1] for pair in argument]))
    return entries


def _as_list(items: Any = ()) -> list[Any]:
    return list(items) if isinstance(items, list | tuple) else []


def _as_tuple(items: Any = ()) -> tuple[Any, ...]:
    return tuple(items) if isinstance(items, list | tuple) else ()


def _as_bytes(value: Any = b"", encoding: Any = "latin1") -> bytes | None:
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    plain = isinstance(value, str) and encoding in ("latin1", "latin-1", "utf-8", "utf8", "ascii")
    return value.encode(encoding) if plain else None


# plain data that pickles make by a call
PLAIN_MAKERS: dict[str, Maker] = {
    "collections.OrderedDict": _as_dict,
    "collections.defaultdict": _as_dict,
    "collections.Counter": _as_dict,
    "torch.Size": _as_tuple,
    "_codecs.encode": _as_bytes,
    **{
        f"{module}.{name}": maker
        for module in ("builtins", "__builtin__")
        for name, maker in (
            ("dict", _as_dict),
            ("list", _as_list),
            ("set", _as_list),
            ("frozenset", _as_list),
            ("tuple", _as_tuple),
            ("bytes", _as_bytes),
            ("bytearray", _as_bytes),
        )
    },
}
