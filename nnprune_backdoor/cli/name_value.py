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


def read_settings(cls: type[Any], pairs: Iterable[str], owner: str) -> dict[str, Any]:
    """Fields of a dataclass by name.

    Args:
        pairs: each "name=value"; a tuple as "0.5,0.5,0.5", no value as "none".
        owner: what an error message calls the class, such as "criterion 'rnp'".

    Raises:
        UnknownNameError: no such field; close names are given.
        MisuseError: no "=", a value of another type, a field that text cannot give.
    """
    hints = typing.get_type_hints(cls)
    fields = [field.name for field in dataclasses.fields(cls)]
    settings = {}
    for name, text in map(split_pair, pairs):
        if name not in fields:
            raise unknown_name(f"hyper-parameter of {owner}", name, fields)
        settings[name] = _value(name, text, hints[name])
    return settings


def split_pair(pair: str) -> tuple[str, str]:
    """ "a=1" -> ("a", "1")."""
    name, found, text = pair.partition("=")
    if not found or not name.strip():
        raise MisuseError(f"expected NAME=VALUE, got {pair!r}")
    return name.strip(), text.strip()


def read_plain(pairs: Iterable[str]) -> dict[str, Any]:
    """Arguments whose types are not known: Python literals, else text."""
    found = {}
    for name, text in map(split_pair, pairs):
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found[name] = text
    return found


def _value(name: str, text: str, kind: Any) -> Any:
    choices, wanted = typing.get_args(kind), _called(kind)
    origin = typing.get_origin(kind)
    try:
        if origin in (types.UnionType, typing.Union):
            if text.lower() == "none" and type(None) in choices:
                return None
            (kind,) = (choice for choice in choices if choice is not type(None))
            return _value(name, text, kind)
        if origin is typing.Literal and text in choices:
            return text
        if origin is tuple:
            return tuple(_value(name, part, choices[0]) for part in text.split(",") if part)
        if kind is bool and text.lower() in ("true", "false", "yes", "no"):
            return text.lower() in ("true", "yes")
        if kind in (int, float, str):
            return kind(text)
    except ValueError:
        pass
    raise MisuseError(f"expected {wanted} for {name}, got {text!r}")


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
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    return {**names, type(None): "none"}.get(kind, "a value that only Python can give")
