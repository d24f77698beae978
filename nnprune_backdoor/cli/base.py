"""What all commands share: adding one to the parser, its result, printing and writing files."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ..errors import PurifyError
from ..utils.whole_file import draft_of, write_whole

Commands = Any  # what `add_subparsers` returns; argparse does not export its class


EVIDENCE = 3  # exit code: the model scanned, or the one written, shows evidence of a backdoor


_PROBE = 2**16  # bytes written to see whether the disk takes any


class MisuseError(PurifyError):
    """The command line itself must be changed; exit code 2."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors suggest options of similar spelling and name `--help`."""

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
    """What a command prints: `text`, or with --json `data`.

    Attributes:
        code: the exit code, 0 or EVIDENCE.
    """

    text: str
    data: dict[str, Any] = field(default_factory=dict)
    code: int = 0


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
    """The parser of a new command, with the options that all commands have.

    Args:
        does: one line, for the list of commands and the top of the command's help.
        usage: the required arguments, as the usage line shows them after the command's name.
        example: a command line that works, without the program's name.
        more: a paragraph below the one line.
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
        "--json",
        action="store_true",
        help="print one JSON object on standard output, everything else on standard error",
    )
    parser.set_defaults(run=run)
    return parser


def printable(text: str) -> str:
    """`text` with control characters replaced by "?".

    Names from other people's files may hold characters that move the cursor, recolour the screen,
    or make one file name look like another.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def note(options: argparse.Namespace, text: str) -> None:
    """Print on standard error, unless --quiet was given."""
    if not options.quiet:
        print(printable(text), file=sys.stderr, flush=True)


PAGES = (".html", ".md", ".json")


def check_page(path: Path | None) -> None:
    """Before long work: raise MisuseError where --report names no page or cannot be written."""
    if path is not None and path.suffix not in PAGES:
        raise MisuseError(f"--report {path}: expected a name ending in .html, .md or .json")
    check_writable(path, "--report")


def write_page(
    path: Path, *, html: Callable[[], str], markdown: Callable[[], str], data: Any
) -> None:
    """Write HTML, Markdown or JSON, whichever the file's suffix says."""
    if path.suffix == ".html":
        text = html()
    elif path.suffix == ".md":
        text = markdown()
    else:
        text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    write_whole(path, text.encode(errors="backslashreplace"))  # names of files may be no UTF-8


def check_writable(path: Path | None, option: str) -> None:
    """Before long work: raise MisuseError where no file can be written to `path`."""
    if path is None:
        return
    if path.is_dir():
        raise MisuseError(f"{option} {path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise MisuseError(f"{option} {path}: no such folder {path.parent}; create it first")
    if path.exists() and not path.is_file():
        raise MisuseError(f"{option} {path} is no regular file; give the name of one")
    draft = draft_of(path)
    try:  # to ask for access rights is not enough: the disk may be full, the name too long
        try:
            with draft.open("xb") as file:
                file.write(bytes(_PROBE))
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise MisuseError(
            f"{option} {path}: {path.parent} cannot be written to ({error.strerror}); choose "
            "another folder"
        ) from error
