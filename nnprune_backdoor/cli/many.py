"""nnprune-backdoor scan-many, purify-many: what `scan` and `purify` do, for a table of models."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .base import Commands, ExitCode, MisuseError, Result, add_command
from .options import add_exit_codes, add_quiet

if TYPE_CHECKING:
    from ..fleets.table import State


def add(commands: Commands) -> None:
    """Add the options of both commands."""
    for command, does in (
        ("scan", "scan each model of a table"),
        ("purify", "purify each model of a table"),
    ):
        parser = add_command(
            commands,
            f"{command}-many MANIFEST --out DIR",
            partial(run, command=command),
            does=does,
            more="MANIFEST is a CSV file: a line a model, with a column 'model' and columns named "
            f"like the options of {command}, such as arch, clean and seed. Killed and started "
            "again, it does what is missing. Exit code 3: a model with evidence of a backdoor; "
            "else 1: a model that failed; else 4: one where that cannot be told.",
            example=f"{command}-many manifest.csv --out results",
        )
        _add_options(parser)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="table of the models, .csv")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the results: one JSON file a model, and summary.html and .csv. Processes "
        "on several machines may share it",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes on this machine (default: its cores / --threads)",
    )
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="threads of each (default: 1)"
    )
    parser.add_argument(
        "--shard",
        type=_shard,
        default="1/1",
        metavar="I/N",
        help="do the I-th of N shares of the models, for array jobs",
    )
    add_exit_codes(parser)
    add_quiet(parser)


def _shard(text: str) -> str:
    """The text itself, so that --print-config can print it."""
    first, _, of = text.partition("/")
    if not (first.isdecimal() and of.isdecimal() and 1 <= int(first) <= int(of)):
        raise argparse.ArgumentTypeError(f"expected I/N such as 1/8, got {text!r}")
    return text


def run(options: argparse.Namespace, *, command: str) -> Result:
    """Do what is missing, and say what there is."""
    from ..fleets import run_many
    from .manifest import read_manifest

    if options.threads < 1 or (options.workers is not None and options.workers < 1):
        raise MisuseError("--workers and --threads: expected 1 or more")
    first, of = map(int, options.shard.split("/"))
    fleet = run_many(
        read_manifest(options.manifest, command),
        options.out,
        workers=options.workers,
        threads=options.threads,
        shard=(first, of),
        progress=not options.quiet,
    )
    models = [{**vars(row), "state": row.state} for row in fleet.mine]
    data = {"models": models, "worked": fleet.worked, "page": str(fleet.page)}
    return Result(fleet.summary(), data, _code({row.state for row in fleet.mine}))


def _code(states: set[State]) -> ExitCode:
    """Of all models: the gravest that is known of one, then what is not known."""
    if "evidence" in states:
        return ExitCode.EVIDENCE
    if states & {"failed", "missing"}:
        return ExitCode.FAILED
    return ExitCode.UNKNOWN if "cannot tell" in states else ExitCode.DONE
