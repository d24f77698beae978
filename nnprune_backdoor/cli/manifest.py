"""A manifest, a CSV file with a model in each row, read as one command line a row."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import hashlib
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..errors import CheckpointError, DataError, unknown_name
from ..evidence.diagnosis import verdict
from ..files.record_file import purified_folder
from ..files.shards import files_of
from ..fleets import Job, Outcome
from . import purify, scan
from .base import ExitCode, MisuseError, Parser, Result

_COMMANDS = {"scan": scan, "purify": purify}

NAME, MODEL = "name", "model"  # columns that are no option

# options that a fleet sets itself; and --plugin, since a table of models is to run no code
_OURS = {
    "command", "config", "exit-codes", "format", "help", "no-examples", "out", "overwrite",
    "plugin", "print-config", "quiet", "report", "run", "scores", "selection",
}  # fmt: skip

_YES, _NO = ("yes", "true", "1"), ("no", "false", "0")


@dataclasses.dataclass(frozen=True)
class CommandJob(Job):
    """A row: a command for one model.

    Attributes:
        name: Of the model.
        command: "scan" or "purify".
        words: Its arguments, as on the command line.
        base: Folder that paths are relative to; another machine may have it elsewhere.
        wrong: Why the row cannot be used.
    """

    name: str
    command: str
    words: tuple[str, ...]
    base: str = dataclasses.field(repr=False)
    wrong: str = ""

    def key(self) -> str:
        """Hash of the command, its settings, the weights, and the image files."""
        if self.wrong:
            raise MisuseError(self.wrong)
        options = self.options()
        content: dict[str, Any] = {"command": self.command}
        for option, value in sorted(vars(options).items()):
            if option == "data_root" or option.replace("_", "-") in _OURS:
                continue  # for a data set of torchvision its name stands
            content[option] = str(value)
            if isinstance(value, Path) and not (option == "clean" and options.data_root):
                content[option] = _images(value) if option == "clean" else _content(value)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def run(self, folder: Path, threads: int) -> Outcome:
        """Run the command, as it is run for one model; a purified model goes to `folder`."""
        options = self.options()
        options.quiet = True
        if self.command == "purify":
            options.out, options.overwrite = folder, True
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            result: Result = options.run(options)
        finally:
            torch.set_num_threads(before)
        return _OUTCOMES[self.command](result)

    def options(self) -> argparse.Namespace:
        """What the command gets; MisuseError where it would not take the words."""
        needed = ["--out=."] if self.command == "purify" else []
        options = _parser(self.command).parse_args([*needed, *self.words])
        for option, value in vars(options).items():
            if isinstance(value, Path) and not (option == "clean" and options.data_root):
                setattr(options, option, Path(self.base) / value)
        return options


def read_manifest(path: Path, command: str) -> list[CommandJob]:
    """The rows of a manifest in order; one that cannot be used says why when it is its turn.

    A line is a row: no cell holds a line break, so that an open quotation mark spoils one row.

    Raises:
        MisuseError: there is no such file, no row in it, or a column that is no option.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise MisuseError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip(" ,;\t")]
    if len(lines) < 2:
        raise MisuseError(f"{path}: no rows; give a line of column names, then a line a model")
    head = _head(path, lines[0][1], command)
    base = str(path.absolute().parent)
    jobs: list[CommandJob] = []
    where: dict[str, int] = {}
    for number, line in lines[1:]:
        job = _job(head, line, number, command, base)
        if not job.wrong and job.name in where:
            wrong = (
                f"the name {job.name!r} stands in line {where[job.name]} already; give each row "
                f"its own in the column {NAME!r}"
            )
            job = CommandJob(f"{job.name} (line {number})", command, job.words, base, wrong)
        where.setdefault(job.name, number)
        jobs.append(job)
    return jobs


def _head(path: Path, line: str, command: str) -> list[str]:
    """The names of the columns."""
    try:
        head = [name.strip() for name in next(csv.reader([line], strict=True))]
    except csv.Error as error:
        raise MisuseError(f"{path}: the line of column names is damaged ({error})") from error
    known = {NAME, MODEL, *_columns(command)}
    for name in head:
        if name not in known:
            raise unknown_name(f"column of {path}", name, known)
        if head.count(name) > 1:
            raise MisuseError(f"{path}: the column {name!r} is there twice; leave one out")
    if MODEL not in head:
        raise MisuseError(f"{path}: no column {MODEL!r}; the first line names the columns")
    return head


def _job(head: Sequence[str], line: str, number: int, command: str, base: str) -> CommandJob:
    name, words = f"line {number}", tuple[str, ...]()
    try:
        cells = next(csv.reader([line], strict=True))
        if len(cells) != len(head):
            raise MisuseError(f"{len(cells)} cells, where the first line has {len(head)}")
        row = {column: cell.strip() for column, cell in zip(head, cells, strict=True)}
        if not row[MODEL]:
            raise MisuseError(f"nothing in the column {MODEL!r}")
        name = row.get(NAME) or row[MODEL]
        words = tuple(_words(row, command))
        job = CommandJob(name, command, words, base)
        job.options()
        return job
    except (csv.Error, MisuseError, ValueError) as error:
        at = "" if name.startswith("line ") else f" (line {number})"
        return CommandJob(name, command, words, base, f"{error}{at}")


def _words(row: dict[str, str], command: str) -> Iterator[str]:
    """A row as words of a command line."""
    for column, action in _columns(command).items():
        text, option = row.get(column, ""), f"--{column}"
        if not text:
            continue
        if action.nargs == 0:
            if text.lower() not in (*_YES, *_NO):
                raise MisuseError(f"{column}: expected yes or no, got {text!r}")
            yield from [option] if text.lower() in _YES else []
        elif action.nargs is not None:  # several values
            yield from (option, *_split(column, text))
        elif isinstance(action, argparse._AppendAction):
            yield from (f"{option}={word}" for word in _split(column, text))
        else:
            yield f"{option}={text}"
    yield from ("--", row[MODEL])


def _split(column: str, text: str) -> list[str]:
    """Several values in a cell, as a shell would split them."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise MisuseError(f"{column}: {error} in {text!r}") from error


class _RowParser(Parser):
    """A parser that raises what others print and exit with."""

    def error(self, message: str) -> NoReturn:
        raise MisuseError(message.removeprefix("argument "))


@functools.cache
def _parser(command: str) -> argparse.ArgumentParser:
    commands = _RowParser().add_subparsers()
    _COMMANDS[command].add(commands)
    found: argparse.ArgumentParser = commands.choices[command]
    return found


def _columns(command: str) -> dict[str, argparse.Action]:
    """Column -> the option that it stands for."""
    found = {a.option_strings[-1][2:]: a for a in _parser(command)._actions if a.option_strings}
    return {name: action for name, action in found.items() if name not in _OURS}


def _content(path: Path) -> str:
    """Hash of a file, or of the weights and the descriptions of a model in a folder."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; check the path")
    folder = path if path.is_dir() else purified_folder(path)
    files = files_of(path) if path.is_dir() or path.suffix == ".json" else [path]
    files += sorted(folder.glob("*.json")) if folder else []
    sums = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            sums.update(hashlib.file_digest(opened, "sha256").digest())
    return sums.hexdigest()


def _images(folder: Path) -> str:
    """Hash of the names and contents of a folder's files."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give one that holds images, or class folders")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = [[path.relative_to(folder).as_posix(), *_look(path)] for path in files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _look(path: Path) -> tuple[int, str]:
    """Size and hash of a file."""
    found = path.stat()
    return found.st_size, _hash_of(path, found.st_size, found.st_mtime_ns)


@functools.lru_cache(2**17)
def _hash_of(path: Path, size: int, changed: int) -> str:
    """Read once for all models of a process, unless its size or time changed."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # it is no image that could be used
        return "not readable"


def _scanned(result: Result) -> Outcome:
    found = result.data["diagnosis"]
    says = verdict(found["probability"], found["suspicions"][0]["label"])
    if found["cannot_tell"]:
        says += f": {found['cannot_tell']}"
    facts = {"target": found["target"], "cautions": len(found["cautions"])}
    return _outcome(result, says, found["probability"], facts)


def _purified(result: Result) -> Outcome:
    report = result.data["report"]
    selection, accuracy, agreement = (report[k] for k in ("selection", "accuracy", "agreement"))
    suspects = {s["label"]: s["before"]["share"] for s in report["suspects"] or () if s["before"]}
    looked = selection["details"].get("diagnosis", {}).get("probability")
    facts = {
        "silenced": selection["neurons"],
        "suspect labels": " ".join(map(str, suspects)),
        "accuracy before": accuracy and accuracy["before"]["share"],
        "accuracy after": accuracy and accuracy["after"]["share"],
        "same answers": agreement and agreement["same"]["share"],
        "cautions": len(report["cautions"]),
    }
    says = f"{selection['neurons']} of {selection['of']} neurons silenced"
    evidence = max(suspects.values(), default=None) if looked is None else looked
    return _outcome(result, says, evidence, facts)


def _outcome(
    result: Result, says: str, evidence: float | None, facts: dict[str, str | float | int | None]
) -> Outcome:
    """The document of a command (`reports.document`), and what it says of a backdoor."""
    alarm, unknown = result.code == ExitCode.EVIDENCE, result.code == ExitCode.UNKNOWN
    return Outcome(says, evidence, alarm, facts, result.data, unknown)


_OUTCOMES: dict[str, Callable[[Result], Outcome]] = {"scan": _scanned, "purify": _purified}
