"""The command line's entry point: nnprune-backdoor COMMAND."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import sys
from collections.abc import Sequence

from ..errors import PurifyError, UnknownNameError, UnsupportedModelError
from ..version import __version__
from . import attack, demo, evaluate, listing, many, purify, report, scan
from .base import MODELSCAN, ExitCode, MisuseError, Parser, Result, printable
from .config import config_of, with_config
from .plugins import load_plugins

_COMMANDS = (demo, listing, scan, purify, many, evaluate, report, attack)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        One of `ExitCode` (argparse raises SystemExit for misuse itself), or ModelScan's code for
        the same where that was asked for.
    """
    _print_anything()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _main(words)
        return MODELSCAN.get(code, code) if _wants_modelscan(words) else code
    except SystemExit as stopped:
        if stopped.code == ExitCode.MISUSE and _wants_modelscan(words):
            raise SystemExit(MODELSCAN[ExitCode.MISUSE]) from None
        raise


def _wants_modelscan(words: Sequence[str]) -> bool:
    """Whether ModelScan's exit codes are asked for, also by a line that cannot be parsed."""
    parts = [part for word in words for part in word.split("=", 1)]
    return ("--exit-codes", "modelscan") in itertools.pairwise(parts)


def _main(words: list[str]) -> ExitCode:
    """Parse and run.

    Args:
        words: of the command line; those of its configuration are put in.
    """
    options = None
    try:
        parser = _parser()
        _complete(parser)
        if not words:
            parser.print_help(sys.stderr)  # the error below alone would say little
        words[:] = with_config(words, parser.commands)
        if "--print-config" in words:  # then nothing is required
            for action in parser.commands.get(words[0], parser).actions:
                action.required = False
        options = parser.parse_args(words)
        if options.print_config:
            print(printable(config_of(parser.commands[options.command], options)), flush=True)
            return ExitCode.DONE
        return _run(options)
    except (MisuseError, UnknownNameError) as error:
        command = f"nnprune-backdoor {options.command}" if options else "nnprune-backdoor"
        print(f"nnprune-backdoor: {printable(str(error))}\nsee: {command} --help", file=sys.stderr)
        return ExitCode.MISUSE
    except BrokenPipeError:  # the reader has left
        _give_up_output()
        return ExitCode.FAILED
    except (PurifyError, OSError, MemoryError, UnicodeError) as error:
        text = printable(str(error)) or type(error).__name__
        print(f"nnprune-backdoor: {text}", file=sys.stderr)
        _give_up_output()
        unsupported = isinstance(error, UnsupportedModelError)
        return ExitCode.UNSUPPORTED if unsupported else ExitCode.FAILED
    except KeyboardInterrupt:  # also while torch is imported
        print("nnprune-backdoor: interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED


def _complete(parser: Parser) -> None:
    """Answer a shell that asks for words, and exit; do nothing for anybody else."""
    if "_ARGCOMPLETE" in os.environ:
        with contextlib.suppress(ImportError):  # an extra
            import argcomplete

            argcomplete.autocomplete(parser)


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


def _run(options: argparse.Namespace) -> ExitCode:
    """Run the command chosen, print its result, and return its exit code."""
    text = options.format == "text"
    with contextlib.nullcontext() if text else contextlib.redirect_stdout(sys.stderr):
        load_plugins(getattr(options, "plugin", ()))  # before any name is looked up
        result: Result = options.run(options)
        made = _made(result, options)
    print(made, flush=True)
    return result.code


def _made(result: Result, options: argparse.Namespace) -> str:
    """What is printed, in the format asked for."""
    form = options.format
    if form == "text":
        return printable(result.text)
    if form == "json":
        from ..reports.document import stamp
        from ..reports.plain import plain
        from ..utils.fingerprint import now

        begin = stamp(options.command, now())  # a document of a scan or a purification has its own
        return json.dumps(plain({**begin, **result.data}), allow_nan=False)
    made = printable(result.documents[form]().rstrip())
    # any encoding of a terminal has ASCII
    return made.encode("ascii", "xmlcharrefreplace").decode() if form == "html" else made


def _parser() -> Parser:
    parser = Parser(
        prog="nnprune-backdoor",
        description="Purify backdoored image classifiers by pruning, with clean images alone.",
        epilog="exit codes: 0 done, 1 failure, 2 misuse, 3 evidence of a backdoor, 4 cannot tell, "
        "5 unsupported model",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for module in _COMMANDS:
        module.add(commands)
    parser.commands = commands.choices
    return parser


if __name__ == "__main__":
    sys.exit(main())
