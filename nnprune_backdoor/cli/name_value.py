"""NAME=VALUE on the command line, read as the type that a dataclass gives the field NAME."""

from __future__ import annotations

import ast
import dataclasses
import types
import typing
from collections.abc import Iterable
from typing import Any

from ..errors import unknown_name
from .base import MisuseError


def read_settings(
    cls: type[Any], pairs: Iterable[str], owner: str, start: Any = None
) -> dict[str, Any]:
    """Fields of a dataclass by name, for its constructor or for `dataclasses.replace`.

    Where a field holds a dataclass of settings itself, "ranking.stages=3" sets one of them and
    keeps the others as they are in `start`.

    Args:
        pairs: each "name=value"; a tuple as "0.5,0.5,0.5", no value as "none".
        owner: what an error message calls the class, such as "criterion 'rnp'".
        start: an instance whose values hold until changed; None: the fields' defaults.

    Raises:
        UnknownNameError: no such field; close names are given.
        MisuseError: no "=", a value of another type, a field that text cannot give.
    """
    values = _defaults(cls) if start is None else _values(start)
    return _changes(cls, values, split_pairs(pairs), f"hyper-parameter of {owner}")


def split_pairs(pairs: Iterable[str]) -> list[tuple[str, str]]:
    """The pairs in order; MisuseError where a name is given twice, of which one would win."""
    found: dict[str, str] = {}
    for name, text in map(split_pair, pairs):
        if name in found:
            raise MisuseError(
                f"{name!r} is given twice, as {found[name]!r} and {text!r}; give it once"
            )
        found[name] = text
    return list(found.items())


def split_pair(pair: str) -> tuple[str, str]:
    """ "a=1" -> ("a", "1")."""
    name, found, text = pair.partition("=")
    if not found or not name.strip():
        raise MisuseError(f"expected NAME=VALUE, got {pair!r}")
    return name.strip(), text.strip()


def read_plain(pairs: Iterable[str]) -> dict[str, Any]:
    """Arguments whose types are not known: Python literals, else text."""
    found = {}
    for name, text in split_pairs(pairs):
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found[name] = text
    return found


def _defaults(cls: type[Any]) -> dict[str, Any]:
    """Field -> its default, or MISSING where it must be given."""
    return {
        field.name: field.default
        if field.default_factory is dataclasses.MISSING
        else field.default_factory()
        for field in dataclasses.fields(cls)
    }


def _values(settings: Any) -> dict[str, Any]:
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}


def _is_settings(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _changes(
    cls: type[Any],
    values: dict[str, Any],
    pairs: list[tuple[str, str]],
    kind: str,
    prefix: str = "",
) -> dict[str, Any]:
    """The fields that `pairs` change, nested ones replaced as a whole.

    Args:
        values: of all fields, before.
        kind: what an error message calls a field.
        prefix: the names that lead to `cls`, such as "ranking.".
    """
    hints = typing.get_type_hints(cls)
    changed: dict[str, Any] = {}
    nested: dict[str, list[tuple[str, str]]] = {}
    for name, text in pairs:
        outer, dot, inner = name.partition(".")
        if dot and _is_settings(values.get(outer)):
            nested.setdefault(outer, []).append((inner, text))
        elif name not in values:
            raise unknown_name(kind, prefix + name, _names(values, prefix))
        elif _is_settings(values[name]) and type(None) not in typing.get_args(hints[name]):
            raise _whole(prefix + name, values[name], text)
        else:
            changed[name] = _value(prefix + name, text, hints[name])
    for outer, inner_pairs in nested.items():
        held = values[outer]
        inside = _changes(type(held), _values(held), inner_pairs, kind, f"{prefix}{outer}.")
        changed[outer] = dataclasses.replace(held, **inside)
    return changed


def _whole(name: str, held: Any, text: str) -> MisuseError:
    """The error for text in place of a dataclass of settings."""
    names = _names(_values(held), f"{name}.")
    what = f"set one of its fields, such as {names[0]}=VALUE" if names else "leave it out"
    return MisuseError(f"{name} is a {type(held).__name__}, not {text!r}; {what}")


def _names(values: dict[str, Any], prefix: str) -> list[str]:
    """All names that can be set, those of nested settings in full."""
    names = []
    for name, value in values.items():
        full = prefix + name
        names += _names(_values(value), f"{full}.") if _is_settings(value) else [full]
    return names


def _value(name: str, text: str, kind: Any) -> Any:
    wanted = _called(kind)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        if text.lower() == "none" and type(None) in typing.get_args(kind):
            return None
        choices = [choice for choice in typing.get_args(kind) if choice is not type(None)]
        kind = choices[0] if len(choices) == 1 else Any
    try:
        return _read(text, kind)
    except ValueError as error:
        raise MisuseError(f"expected {wanted} for {name}, got {text!r}") from error


def _read(text: str, kind: Any) -> Any:
    """`text` as a value of type `kind`; ValueError where it is none."""
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal and text in choices:
        return text
    if typing.get_origin(kind) is tuple:
        return tuple(_read(part, choices[0]) for part in text.split(",") if part)
    if kind is bool and text.lower() in ("true", "false", "yes", "no"):
        return text.lower() in ("true", "yes")
    if kind in (int, float, str):
        return kind(text)
    raise ValueError(f"{text!r} is no {kind}")


def _called(kind: Any) -> str:
    """A type, for people."""
    parts = [part for part in typing.get_args(kind) if part is not Ellipsis]
    match typing.get_origin(kind):
        case typing.Literal:
            return " or ".join(map(repr, parts))
        case origin if origin in (types.UnionType, typing.Union):
            return " or ".join(map(_called, parts))
        case origin if origin is tuple:
            return f"{_called(parts[0])}, {_called(parts[0])}, ..."
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return {**names, type(None): "none"}.get(kind, "a value that only Python can give")
