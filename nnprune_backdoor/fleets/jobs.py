"""A job for one model, and how a worker does it: once, whoever else was asked for it too."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, final

from ..errors import PurifyError
from ..utils.whole_file import write_whole
from ..version import __version__
from .claims import Claim

FORMAT = 1

CLAIMS = ".claims"  # folder beside the results

Data = dict[str, Any]

# torch's random state and number of threads belong to the whole process, and some engines run
# several tasks in one
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Outcome:
    """What a job found.

    Attributes:
        says: In a line.
        evidence: By which models are sorted, the highest first; None: it cannot be told.
        alarm: There is evidence of a backdoor.
        facts: Further columns of the table.
        data: The whole result, as plain data that strict JSON can hold.
        unknown: Evidence was sought, and nothing can be told.
    """

    says: str
    evidence: float | None = None
    alarm: bool = False
    facts: dict[str, str | float | int | None] = field(default_factory=dict)
    data: Data = field(default_factory=dict)
    unknown: bool = False


class Job(ABC):
    """What is to be done for one model; a frozen dataclass whose repr tells jobs apart.

    It is pickled and sent to a worker.
    """

    name: str  # of the model, in tables

    @final
    @property
    def row(self) -> str:
        """What tells this job from others before anything is read; a name for files."""
        return hashlib.sha256(repr(self).encode(errors="replace")).hexdigest()

    @abstractmethod
    def key(self) -> str:
        """Hash of all that the result depends on: weights, images, settings; a name for files.

        Raises:
            PurifyError, OSError: something cannot be read. Then there is nothing to do.
        """

    @abstractmethod
    def run(self, folder: Path, threads: int) -> Outcome:
        """Do the work.

        Args:
            folder: for files of this job alone, which does not exist yet, or was left by a process
                that was killed.
            threads: that torch may use.
        """


@dataclass(frozen=True)
class Answer:
    """What a worker has to say; small, since it travels.

    Attributes:
        state: "done" now, was "there" already, "busy": another process works on it, or "unread":
            something that it needs cannot be read.
        key: As `Job.key`, or `Job.row` where that has none.
        line: In words.
    """

    state: Literal["done", "there", "busy", "unread"]
    key: str
    line: str = ""


def do(job: Job, out: Path, threads: int, given_up: int, ticket: str) -> Answer:
    """Do a job unless its result is there; whatever it raises becomes its result.

    Args:
        out: folder of the results, one file a job: its key, and ".json".
        threads: that torch may use.
        given_up: as for `Claim.take`.
        ticket: another for each call, since some engines give known arguments the known answer.

    Raises:
        OutputError: the result cannot be written.
    """
    with _ONE_AT_A_TIME:
        try:
            key = job.key()
        except (PurifyError, OSError) as error:
            result = failure(job, error, again=True)
            save(out, job.row, result)
            return Answer("unread", job.row, line_of(result))
        found = read(out, key)
        if found is not None and job.row in found["rows"]:
            return Answer("there", key)
        claim = Claim.take(out / CLAIMS, key, given_up)
        if claim is None:
            return Answer("busy", key)
        with claim:
            found = read(out, key)  # once more: now nobody else can write it
            result = _worked(job, out / key, threads) if found is None else found
            result["rows"][job.row] = job.name
            if not claim.held:
                return Answer("busy", key)
            save(out, key, result)
            claim.clear()
        return Answer("done" if found is None else "there", key, line_of(result))


def _worked(job: Job, folder: Path, threads: int) -> Data:
    """The result, or the failure, of doing the job."""
    start = time.perf_counter()
    try:
        outcome = asdict(job.run(folder, threads))
        _text(outcome)
    except Exception as error:  # of one model, which is to end no other's work
        return failure(job, error, again=not _for_good(error))
    seconds = time.perf_counter() - start
    return {**_head(job, "done"), "seconds": seconds, **outcome}


def failure(job: Job, error: BaseException, *, again: bool) -> Data:
    """The result of a job that failed.

    Args:
        again: it may go well another time, so the next start removes this and tries.
    """
    text = str(error) if isinstance(error, PurifyError) else f"{type(error).__name__}: {error}"
    says = " ".join(text.split())[:1000]
    return {**_head(job, "failed"), "again": again, "seconds": 0.0, **asdict(Outcome(says))}


def _for_good(error: BaseException | None) -> bool:
    """Whether it would fail again: it is ours, and no disk or memory has a part in it."""
    if not isinstance(error, PurifyError):
        return False
    while error is not None:
        if isinstance(error, OSError | MemoryError):
            return False
        error = error.__cause__
    return True


def _head(job: Job, state: str) -> Data:
    return {
        "format": FORMAT,
        "version": __version__,
        "rows": {job.row: job.name},
        "state": state,
        "again": False,
    }


def save(out: Path, key: str, result: Data) -> None:
    """Write a result whole; OutputError where that cannot be done."""
    write_whole(out / f"{key}.json", f"{_text(result)}\n".encode())


def read(out: Path, key: str) -> Data | None:
    """A result; None where there is none that this version can read."""
    try:
        result = json.loads((out / f"{key}.json").read_bytes())
    except (OSError, ValueError):
        return None
    known = isinstance(result, dict) and result.get("format") == FORMAT
    return result if known and isinstance(result.get("rows"), dict) else None


def _text(result: Data) -> str:
    """Strict JSON; ValueError or TypeError where it is no plain data."""
    return json.dumps(result, allow_nan=False, indent=1)


def line_of(result: Data) -> str:
    """A result in a line."""
    return f"failed: {result['says']}" if result["state"] == "failed" else str(result["says"])
