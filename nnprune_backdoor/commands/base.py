"""What all commands share: how one is added to the parser, and what it gives back."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..errors import PurifyError

Commands = Any  # what `add_subparsers` gives; argparse keeps its class to itself


class MisuseError(PurifyError):
    """The command line asks for something that cannot be; exit code 2."""


@dataclass(frozen=True)
class Result:
    """What a command prints: `text` for people, or `data` as JSON; and its exit code."""

    text: str
    data: dict[str, Any] = field(default_factory=dict)
    code: int = 0  # 3: a scan found evidence


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
    parser: argparse.ArgumentParser = commands.add_parser(
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
    parser.add_argument("--seed", type=int, default=0, help="same seed, same result (0)")
    parser.add_argument(
        "--device", default="cpu", help="where it runs: cpu, cuda, cuda:1, mps (cpu)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no notes")
