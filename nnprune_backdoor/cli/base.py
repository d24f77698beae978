"""What all commands share: adding one to the parser, its result, printing and writing files."""

from __future__ import annotations

import argparse
import difflib
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ..errors import PurifyError
from ..utils.whole_file import draft_of, write_whole

Commands = Any  # what `add_subparsers` returns; argparse does not export its class


class ExitCode(IntEnum):
    """What the shell is told; docs/pipelines.md has the table."""

    DONE = 0
    FAILED = 1
    MISUSE = 2
    EVIDENCE = 3  # of a backdoor, in the model scanned or the one written
    UNKNOWN = 4  # evidence was sought, and nothing can be said
    UNSUPPORTED = 5  # a model of a kind that cannot be worked on
    INTERRUPTED = 130


MODELSCAN = {  # ModelScan's codes for the same
    ExitCode.FAILED: 2,
    ExitCode.MISUSE: 4,
    ExitCode.EVIDENCE: 1,
    ExitCode.UNKNOWN: 3,
    ExitCode.UNSUPPORTED: 3,
}

_PROBE = 2**16  # bytes written to see whether the disk takes any


class MisuseError(PurifyError):
    """The command line itself must be changed; exit code 2."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors suggest options of similar spelling and name `--help`.

    Attributes:
        commands: Name -> parser, of the parser of the whole command line.
    """

    commands: Mapping[str, Parser] = {}

    @property
    def actions(self) -> Sequence[argparse.Action]:
        """Its options and arguments."""
        return self._actions

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, extra = super().parse_known_args(args, namespace)
        if extra:
            known = [option for action in self.actions for option in action.option_strings]
            close = difflib.get_close_matches(extra[0].partition("=")[0], known, n=2)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            self.error(f"unknown argument {extra[0]!r}{hint}")
        return found, extra

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(ExitCode.MISUSE, f"{self.prog}: {printable(message)}\nsee: {self.prog} --help\n")


@dataclass(frozen=True)
class Result:
    """What a command prints: `text`, with --format json `data`, or one of the `documents`.

    Attributes:
        documents: the other formats, each made when it is asked for.
    """

    text: str
    data: dict[str, Any] = field(default_factory=dict)
    code: ExitCode = ExitCode.DONE
    documents: Mapping[str, Callable[[], str]] = field(default_factory=dict)


def add_command(
    commands: Commands,
    usage: str,
    run: Callable[[argparse.Namespace], Result],
    *,
    does: str,
    example: str,
    more: str = "",
    formats: Sequence[str] = ("text", "json"),
) -> argparse.ArgumentParser:
    """The parser of a new command, with the options that all commands have.

    Args:
        usage: the command's name, then its required arguments as the usage line shows them.
        does: one line, for the list of commands and the top of the command's help.
        example: a command line that works, without the program's name.
        more: a paragraph below the one line.
        formats: of what is printed; the first is the default.
    """
    about = f"{does[0].upper()}{does[1:]}."
    parser: Parser = commands.add_parser(
        usage.split(maxsplit=1)[0],
        usage=f"nnprune-backdoor {usage} [options]",
        help=does,
        description="\n\n".join(textwrap.fill(text, 79) for text in (about, more) if text),
        epilog=f"example:\n  nnprune-backdoor {example}",
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=79),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--format",
        choices=formats,
        default=formats[0],
        help=f"what is printed on standard output; all else goes to standard error (default: "
        f"{formats[0]})",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="read settings from a TOML file; those of the command line come after it",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print all settings as such a file, and do nothing",
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


OF_SCAN = ("json", "sarif", "markdown", "html")  # formats of a result, besides text
OF_PURIFICATION = (*OF_SCAN, "cyclonedx", "in-toto")

_SUFFIXES = {
    "cyclonedx": ".cdx.json",
    "in-toto": ".intoto.json",
    "json": ".json",
    "sarif": ".sarif",
    "markdown": ".md",
    "html": ".html",
}


def _format_of(path: Path) -> str | None:
    """The format that a file's name says; the longer suffixes come first."""
    return next((name for name, end in _SUFFIXES.items() if path.name.endswith(end)), None)


def check_pages(paths: Iterable[Path], formats: Sequence[str]) -> None:
    """Before long work: raise MisuseError where a --report has no known suffix or cannot be made.

    Args:
        formats: that the command can write.
    """
    for path in paths:
        if _format_of(path) not in formats:
            ends = ", ".join(_SUFFIXES[name] for name in formats)
            raise MisuseError(f"--report {path}: expected a name ending in one of {ends}")
        check_writable(path, "--report")


def write_page(path: Path, documents: Mapping[str, Callable[[], str]]) -> None:
    """Write the document that the file's name says, out of those by format."""
    text = documents[_format_of(path) or ""]()
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
