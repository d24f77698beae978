"""What all commands share: how one is added to the parser, and what it gives back."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
import textwrap
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ..errors import PurifyError

Commands = Any  # what `add_subparsers` gives; argparse keeps its class to itself


EVIDENCE = 3  # exit code: the model scanned, or the one written, shows evidence of a backdoor


class MisuseError(PurifyError):
    """The command line asks for something that cannot be; exit code 2."""


class Parser(argparse.ArgumentParser):
    """Whose errors say where to look, and name options that are spelt alike."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, extra = super().parse_known_args(args, namespace)
        if extra:
            known = [option for action in self._actions for option in action.option_strings]
            close = difflib.get_close_matches(extra[0].partition("=")[0], known, n=2)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            self.error(f"unknown argument {extra[0]!r}{hint}")
        return found, extra

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {printable(message)}\nsee: {self.prog} --help\n")


@dataclass(frozen=True)
class Result:
    """What a command prints: `text` for people, or `data` as JSON; and its exit code."""

    text: str
    data: dict[str, Any] = field(default_factory=dict)
    code: int = 0  # or EVIDENCE


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], Result],
    *,
    does: str,
    usage: str = "",
    example: str,
    more: str = "",
) -> argparse.ArgumentParser:
    """The parser of a new command, with the options that all of them have.

    Args:
        does: one line, for the list of commands and the top of its help.
        usage: what must be given, after the command's name.
        example: a command line that works, without the program's name.
        more: said under the one line.
    """
    about = f"{does[0].upper()}{does[1:]}."
    parser: Parser = commands.add_parser(
        name,
        usage=" ".join(["nnprune-backdoor", name, *usage.split(), "[options]"]),
        help=does,
        description="\n\n".join(textwrap.fill(text, 79) for text in (about, more) if text),
        epilog=f"example:\n  nnprune-backdoor {example}",
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=79),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, and all else on stderr"
    )
    parser.set_defaults(run=run)
    return parser


def add_running(parser: argparse.ArgumentParser) -> None:
    """Options of commands that compute something."""
    parser.add_argument("--seed", type=seed_of, default=0, help="same seed, same result (0)")
    parser.add_argument(
        "--device", default="cpu", help="where it runs: cpu, cuda, cuda:1, mps (cpu)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no notes")


def seed_of(text: str) -> int:
    """A seed that every random generator takes; ArgumentTypeError for another."""
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number in [0, 2^63), got {text!r}")
    return seed


def printable(text: str) -> str:
    """Text that may hold a stranger's names, fit for a terminal: no control characters.

    They could move the cursor, recolour the screen, or show a name that is not the file's.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


PAGES = (".html", ".md", ".json")


def check_page(path: Path | None) -> None:
    """Before long work: raise MisuseError where --report cannot be written, or names no page."""
    if path is not None and path.suffix not in PAGES:
        raise MisuseError(f"--report {path}: expected a name ending in {', '.join(PAGES)}")
    check_writable(path, "--report")


def write_page(
    path: Path, *, html: Callable[[], str], markdown: Callable[[], str], data: Any
) -> None:
    """Which of the three its name says."""
    if path.suffix == ".html":
        text = html()
    elif path.suffix == ".md":
        text = markdown()
    else:
        text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    write_whole(path, text.encode())


def check_writable(path: Path | None, option: str) -> None:
    """Before long work: raise MisuseError where a file of that name cannot be written."""
    if path is None:
        return
    if path.is_dir():
        raise MisuseError(f"{option} {path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise MisuseError(f"{option} {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise MisuseError(f"{option} {path}: {path.parent} cannot be written to")


def write_whole(path: Path, content: bytes) -> None:
    """The file with this content, or what was there before."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with draft.open("xb") as file:  # x: never through a link that somebody put there
            file.write(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
