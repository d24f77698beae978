"""The command line's entry point: nnprune-backdoor COMMAND."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Sequence

from ..errors import PurifyError, UnknownNameError
from ..version import __version__
from . import attack, demo, evaluate, listing, many, purify, report, scan
from .base import MisuseError, Parser, Result, printable
from .plugins import load_plugins

_COMMANDS = (demo, listing, scan, purify, many, evaluate, report, attack)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 when it is done, 1 on failure, 2 on misuse (argparse raises SystemExit(2) itself), 3
        where there is evidence of a backdoor (see `scan` and `purify`), 130 when interrupted.
    """
    _print_anything()
    options = None
    try:
        parser = _parser()
        if not (sys.argv[1:] if arguments is None else arguments):
            parser.print_help(sys.stderr)  # the error below alone would say little
        options = parser.parse_args(arguments)
        return _run(options)
    except (MisuseError, UnknownNameError) as error:
        print(
            f"nnprune-backdoor: {printable(str(error))}\n"
            f"see: nnprune-backdoor {options.command if options else ''} --help",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:  # the reader has left
        _give_up_output()
        return 1
    except (PurifyError, OSError, MemoryError, UnicodeError) as error:
        text = printable(str(error)) or type(error).__name__
        print(f"nnprune-backdoor: {text}", file=sys.stderr)
        _give_up_output()
        return 1
    except KeyboardInterrupt:  # also while torch is imported
        print("nnprune-backdoor: interrupted", file=sys.stderr)
        return 130


def _print_anything() -> None:
    """Let the standard streams escape what their encoding lacks, as standard error does anyway."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _give_up_output() -> None:
    """Where standard output takes no more, drop what is left of it, or Python fails on it again."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # it may be no real file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(options: argparse.Namespace) -> int:
    """Run the command chosen, print its result, and return its exit code."""
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        load_plugins(getattr(options, "plugin", ()))  # before any name is looked up
        result: Result = options.run(options)
    if options.json:
        from ..reports.report import plain

        print(json.dumps(plain(result.data), allow_nan=False), flush=True)
    else:
        print(printable(result.text), flush=True)
    return result.code


def _parser() -> Parser:
    parser = Parser(
        prog="nnprune-backdoor",
        description="Purify backdoored image classifiers by pruning, with clean images alone.",
        epilog="exit codes: 0 done, 1 failure, 2 misuse, 3 evidence of a backdoor",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for module in _COMMANDS:
        module.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
