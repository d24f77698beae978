"""Jobs for many models: asked of an executor, waited for, and put in a table."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError, OutputError, PurifyError
from ..utils.progress import say
from ..utils.whole_file import draft_of, write_whole
from .claims import Watch
from .jobs import CLAIMS, Answer, Data, Job, do, failure, line_of, read, save
from .processes import Processes
from .table import Row, counted, to_csv, to_html

PAUSE = 0.5  # seconds between two looks at what other processes work on

TRIES = 2  # times that a job's worker may die

TABLE = "summary"  # .csv and .html


@dataclass(frozen=True)
class Fleet:
    """All models of a fleet, and what is known of them.

    Attributes:
        rows: A model each, by evidence.
        mine: Those of this call's share, in the same order.
        worked: How many models this call worked on; the results of the others were there, or other
            processes wrote them.
        page: The table as a page; the same as CSV lies beside it.
    """

    rows: tuple[Row, ...]
    mine: tuple[Row, ...]
    worked: int
    page: Path

    def summary(self) -> str:
        """How many of which kind, which failed and why, and where the table is."""
        lines = [counted(self.mine), f"worked on  {self.worked} of them now"]
        lines += [f"failed     {row.name}: {row.says}" for row in self.mine if row.failed]
        others = len(self.rows) - len(self.mine)
        lines += [f"others     {others} models are not of this shard"] if others else []
        return "\n".join([*lines, f"table      {self.page}, {self.page.with_suffix('.csv').name}"])


def run_many(
    jobs: Iterable[Job],
    out: str | os.PathLike[str],
    *,
    executor: Executor | None = None,
    workers: int | None = None,
    threads: int = 1,
    shard: tuple[int, int] = (1, 1),
    progress: bool = True,
) -> Fleet:
    """Do each job that has no result yet, and write a table of all.

    Every result is a file in `out`, named by what it depends on (`Job.key`). Killed at any moment
    and called again, it does what is missing. Several processes, on several machines too, can be
    called with the same folder at once: each job is done by one of them, and each waits for all.
    A job that fails is a result. If it may go well another time (its worker died, no memory, no
    such file), the next call tries again.

    Args:
        jobs: one a model.
        out: folder of the results, made if it is not there. Workers write into it, so that they
            must see it under the same path.
        executor: whatever runs the jobs; left open. None: processes on this machine; then the call
            must stand below `if __name__ == "__main__":` in a script.
        workers: how many processes; by default as many as there are cores for.
        threads: of torch in each worker. Another number may change the last digits of a result.
        shard: (i, n): the i-th of n shares of the jobs, from 1.
        progress: print a line for each model on standard error.

    Raises:
        DataError: no jobs, or numbers that make no sense.
        OutputError: `out` cannot be written to.
        PurifyError: the executor takes no more jobs.
    """
    jobs = list(jobs)
    _check(jobs, workers, threads, shard)
    out = _folder(out)
    mine = jobs[shard[0] - 1 :: shard[1]]
    _forget(out, mine)
    own = None
    if executor is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        executor = own = Processes(workers or max(1, (cores or 1) // threads))
    run = _Run(out, executor, threads, len(mine), progress)
    try:
        run.all(mine)
    except BaseException:
        run.stop()
        if own is not None:
            own.shutdown(cancel_futures=True)
        with contextlib.suppress(OutputError):
            _tabulated(out, jobs, mine, run.worked)
        raise
    if own is not None:
        own.shutdown()
    return _tabulated(out, jobs, mine, run.worked)


class _Run:
    """The jobs of one call, until each has an answer.

    Attributes:
        worked: Jobs done now.
    """

    def __init__(
        self, out: Path, executor: Executor, threads: int, total: int, progress: bool
    ) -> None:
        self.worked = 0
        self._out, self._executor, self._threads = out, executor, threads
        self._total, self._progress = total, progress
        self._running: dict[Future[Answer], Job] = {}
        self._busy: dict[str, Job] = {}  # by key; other processes work on them
        self._deaths: Counter[str] = Counter()
        self._watch = Watch(out / CLAIMS)
        self._answered = 0

    def all(self, jobs: Sequence[Job]) -> None:
        """Return when every job has a result."""
        for job in jobs:
            self._ask(job)
        while self._running or self._busy:
            if not self._running:
                time.sleep(PAUSE)
            done, _ = wait(self._running, timeout=PAUSE, return_when=FIRST_COMPLETED)
            for future in done:
                self._take(self._running.pop(future), future)
            self._ask_again()

    def stop(self) -> None:
        """Ask for nothing more."""
        for future in self._running:
            future.cancel()

    def _ask(self, job: Job, given_up: int = 0) -> None:
        ticket = uuid.uuid4().hex
        try:
            future = self._executor.submit(do, job, self._out, self._threads, given_up, ticket)
        except RuntimeError as error:  # it was shut down, or its processes died
            raise PurifyError(
                f"the executor takes no more jobs ({error}); {self._answered} of {self._total} "
                "models have a result, and the same call with a new one does the rest"
            ) from error
        self._running[future] = job

    def _take(self, job: Job, future: Future[Answer]) -> None:
        try:
            answer = future.result()
        except OutputError:  # the next model's result could not be written either
            raise
        except (Exception, CancelledError) as error:
            self._died(job, error)
            return
        if answer.state == "busy":
            self._busy[answer.key] = job
            return
        self._answered += 1
        self.worked += answer.state == "done"
        if answer.state != "there":
            self._tell(job, answer.line)

    def _ask_again(self) -> None:
        """Ask for the jobs of others that have a result now, or whose process is dead."""
        for key, job in list(self._busy.items()):
            given_up = self._watch.free(key)
            if given_up is not None:
                del self._busy[key]
                self._ask(job, given_up)

    def _died(self, job: Job, error: BaseException) -> None:
        """The worker is gone, or what it said is no answer: once more, then it is a failure."""
        self._deaths[job.row] += 1
        if self._deaths[job.row] < TRIES:
            self._ask(job)
            return
        try:
            key = job.key()
        except (PurifyError, OSError):
            key = job.row
        gone = PurifyError(
            f"its worker ended without an answer, {TRIES} times; out of memory? ({error})"
        )
        result = failure(job, gone, again=True)
        if read(self._out, key) is None:
            save(self._out, key, result)
        self._answered += 1
        self._tell(job, line_of(result))

    def _tell(self, job: Job, line: str) -> None:
        text = f"{self._answered} of {self._total}  {job.name}: {line}"
        say("".join(c if c.isprintable() else "?" for c in text), self._progress)


def _check(jobs: Sequence[Job], workers: int | None, threads: int, shard: tuple[int, int]) -> None:
    if not jobs:
        raise DataError("there are no jobs; give one for each model")
    if threads < 1 or (workers is not None and workers < 1):
        raise DataError(f"expected workers and threads of at least 1, got {workers} and {threads}")
    if not 1 <= shard[0] <= shard[1]:
        raise DataError(f"expected a shard i of n, from 1 to n, got {shard[0]} of {shard[1]}")


def _folder(out: str | os.PathLike[str]) -> Path:
    """The folder of the results, which can be written to."""
    folder = Path(out).absolute()  # workers may run elsewhere
    try:
        (folder / CLAIMS).mkdir(parents=True, exist_ok=True)
        draft = draft_of(folder / TABLE)
        draft.touch()
        draft.unlink()
    except OSError as error:
        raise OutputError(
            f"{out}: no results can be written there ({error.strerror}); give another folder"
        ) from error
    return folder


def _forget(out: Path, jobs: Iterable[Job]) -> None:
    """Remove failures of these jobs that may go well now, and claims on what has a result."""
    rows = {job.row for job in jobs}
    for key, result in _results(out):
        if result["again"] and rows & result["rows"].keys():
            (out / f"{key}.json").unlink(missing_ok=True)
    for claim in (out / CLAIMS).iterdir():  # of one that was killed just before it gave it back
        if (out / f"{claim.stem}.json").exists():
            claim.unlink(missing_ok=True)


def _results(out: Path) -> Iterable[tuple[str, Data]]:
    for path in out.glob("*.json"):
        result = read(out, path.stem)
        if result is not None:
            yield path.stem, result


def _tabulated(out: Path, jobs: Sequence[Job], mine: Sequence[Job], worked: int) -> Fleet:
    """Read what there is of these jobs, and write the table of it."""
    found: dict[str, Row] = {}
    for key, result in _results(out):
        for row, name in result["rows"].items():
            if row not in found or not result["again"]:
                found[row] = Row.of(name, key, result)
    rows = {job.row: found.get(job.row) or Row(job.name) for job in jobs}
    ordered = tuple(sorted(rows.values(), key=lambda row: row.order))
    own = {job.row for job in mine}
    ours = tuple(sorted((r for key, r in rows.items() if key in own), key=lambda row: row.order))
    page = out / f"{TABLE}.html"
    write_whole(page, to_html(ordered, out.name).encode(errors="backslashreplace"))
    write_whole(page.with_suffix(".csv"), to_csv(ordered).encode(errors="surrogateescape"))
    return Fleet(ordered, ours, worked, page)
