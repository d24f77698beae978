"""Settings of a command from a TOML file: --config FILE, and --print-config, which writes one.

A setting is an option's name without the dashes. At the top of the file it is for every command
that has such an option; in a table by a command's name, for that command. The command line comes
after the file, and so decides.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import unknown_name
from .base import MisuseError, Parser

_NEVER = {"help", "config", "print-config"}  # options that no file sets


def with_config(given: list[str], commands: Mapping[str, Parser]) -> list[str]:
    """The words of a command line, with the settings of its --config before its own.

    Raises:
        MisuseError: the file cannot be read, is no TOML, or has a setting that there is not.
    """
    if not given or given[0] not in commands:
        return given
    command, rest, written, files = given[0], [], [], iter(given[1:])
    for word in files:
        name, has_value, value = word.partition("=")
        if name != "--config":
            rest.append(word)
            continue
        path = value if has_value else next(files, None)
        if path is None:
            return given  # argparse says what is missing
        # the option itself comes last: options that take several words end there
        written += [*_words(Path(path), command, commands), "--config", path]
    return [command, *written, *rest]


def _words(path: Path, command: str, commands: Mapping[str, Parser]) -> Iterator[str]:
    """The settings of a file as words of a command line."""
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except (OSError, ValueError) as error:  # ValueError: no TOML, or no UTF-8
        raise MisuseError(f"--config {path}: cannot be read ({error})") from error
    tables = {name: v for name, v in content.items() if isinstance(v, dict)}
    shared = {name: v for name, v in content.items() if name not in tables}
    own = _settable(commands[command])
    known = {name for parser in commands.values() for name in _settable(parser)}
    _check(path, "command", tables, commands)
    _check(path, "setting", shared, known)
    _check(path, f"setting of {command}", tables.get(command, {}), own)
    for settings in (shared, tables.get(command, {})):
        for name, value in settings.items():
            if (action := own.get(name.replace("_", "-"))) is not None:
                yield from _option(path, name, action, value)


def _check(path: Path, kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    valid = set(known)
    for name in names:
        if name.replace("_", "-") not in valid:
            raise MisuseError(f"--config {path}: {unknown_name(kind, name, valid)}")


def _settable(parser: Parser) -> dict[str, argparse.Action]:
    """Name -> option, of those that a file can set."""
    options = {
        word.removeprefix("--"): action
        for action in parser.actions
        for word in action.option_strings
        if word.startswith("--")
    }
    return {name: action for name, action in options.items() if name not in _NEVER}


def _option(path: Path, name: str, action: argparse.Action, value: Any) -> list[str]:
    """The words that set an option to a value of TOML."""
    option, flag = action.option_strings[-1], action.nargs == 0
    values = value if isinstance(value, list) else [value]
    repeated = isinstance(action.default, list)
    wrong = any(isinstance(item, bool) is not flag or isinstance(item, dict) for item in values)
    if wrong or (isinstance(value, list) and not repeated and action.nargs != "+"):
        expected = "true or false" if flag else "a text or a number"
        raise MisuseError(f"--config {path}: {name}: expected {expected}, got {value!r}")
    if flag:
        return [option] if value else []
    if action.nargs == "+":
        return [option, *map(str, values)]
    return [f"{option}={item}" for item in values]


def config_of(parser: Parser, options: argparse.Namespace) -> str:
    """The settings of a command as a file that --config takes; those without a value are left out.

    Args:
        parser: of the command.
    """
    lines = [f"[{options.command}]"]
    for name, action in _settable(parser).items():
        value = getattr(options, action.dest)
        if value is not None:
            lines.append(f"{name} = {_toml(value)}")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool | int | float):
        return str(value).lower()
    # JSON's strings are TOML's, but for one character that TOML wants escaped
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
