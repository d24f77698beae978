"""How far work has got: bars on a terminal, elsewhere a line now and then; and a clock of stages.

Everything goes to standard error, and nothing does unless it is asked for.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Self

from tqdm.auto import tqdm

EVERY = 30.0  # seconds between two lines

_SLACK = 5.0  # seconds that a stage may take longer than expected

timer = time.perf_counter  # what stages are timed by; benchmarks may count processor time instead

_IN_NOTEBOOK = any(base.__name__ == "tqdm_notebook" for base in tqdm.__mro__)


def progress_bar(total: int, description: str, progress: bool) -> tqdm[Any] | Lines:
    """A bar of `total` steps, or lines that say as much, to be used in a `with` block."""
    if _by_lines(progress):
        return Lines(total, description)
    # tqdm: None disables the bar when the output is no terminal, True always does
    return tqdm(total=total, desc=description, disable=None if progress else True, leave=False)


def say(text: str, progress: bool) -> None:
    """Print a line, if that is wanted."""
    if progress:
        with contextlib.suppress(OSError, ValueError):  # a reader that left ends no work
            print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A time as people say it: "8 s", "1 min 20 s", "2 h 10 min"."""
    whole = max(1, round(seconds))
    if whole >= 600:
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours} h {minutes} min" if hours else f"{minutes} min"
    minutes, rest = divmod(whole, 60)
    if whole >= 60:
        rest = rest // 10 * 10
    return " ".join(f"{n} {unit}" for n, unit in ((minutes, "min"), (rest, "s")) if n)


class Lines:
    """In place of a bar where output is no terminal: a line every 30 seconds.

    Args:
        total: number of steps.
        description: of the work.
    """

    def __init__(self, total: int, description: str) -> None:
        self._total, self._description = total, description
        self._done, self._start = 0, time.monotonic()
        self._within = contextlib.ExitStack()

    def __enter__(self) -> Self:
        report = self._within.enter_context(_reporting())
        report.bars.append(self)
        self._within.callback(report.bars.remove, self)
        return self

    def __exit__(self, *_: object) -> None:
        self._within.close()

    def update(self, steps: int = 1) -> None:
        """So many more steps are done."""
        self._done += steps

    def set_postfix(self, **_: object) -> None:
        """Bars show this; lines do without."""

    def __str__(self) -> str:
        return f"{self._description} {self._done:,} of {self._total:,}"

    @property
    def left(self) -> float | None:
        """Seconds until the end, if all steps take as long as those before; None at the start."""
        if not self._done:
            return None
        return (time.monotonic() - self._start) * (self._total - self._done) / self._done


class Clock:
    """Wall seconds of stages, and how much is left while one is under way.

    Args:
        expected: stage -> seconds that it should take, in order; None where nothing is known.
        progress: say when a stage begins, where no bars are shown.
    """

    def __init__(
        self, expected: Mapping[str, float | None] | None = None, progress: bool = False
    ) -> None:
        self.laps: dict[str, float] = {}
        self.expected = dict(expected or {})
        self._progress = progress
        self._stage, self._start = "", timer()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The block is this stage."""
        self._stage, self._start = name, timer()
        with contextlib.ExitStack() as within:
            if _by_lines(self._progress):
                report = within.enter_context(_reporting())
                report.clocks.append(self)
                within.callback(report.clocks.remove, self)
                say(report.line(), True)
            try:
                yield
            finally:
                took = timer() - self._start
                self.laps[name] = self.laps.get(name, 0.0) + took

    def __str__(self) -> str:
        return self._stage

    @property
    def left(self) -> float | None:
        """Seconds until the end of the last stage; None where that is not known."""
        names = list(self.expected)
        if self._stage not in names:
            return None
        now, *later = (self.expected[name] for name in names[names.index(self._stage) :])
        known = [seconds for seconds in later if seconds is not None]
        if now is None or len(known) < len(later):
            return None
        rest = now - (timer() - self._start)
        if rest < -max(_SLACK, now / 2):
            return None  # it takes far longer than expected
        return max(rest, 0.0) + sum(known)


class _Report:
    """What is under way, the outermost first."""

    def __init__(self) -> None:
        self.clocks: list[Clock] = []
        self.bars: list[Lines] = []
        self._start = time.monotonic()

    def line(self) -> str:
        """What is done, how much of it, and how long the rest should take."""
        clocks, bars = self.clocks[:1], self.bars[-1:]
        text = ", ".join([*map(str, clocks), *map(str, bars)])
        for clock in clocks:
            if clock.left is not None:
                return f"{text}: about {duration(clock.left)} left in all"
        for bar in bars:
            if bar.left is not None:
                of_this = " of this" if clocks else ""
                return f"{text}: about {duration(bar.left)} left{of_this}"
        taken = time.monotonic() - self._start
        return f"{text}: {duration(taken)} so far" if taken >= 1 else text


_REPORT: ContextVar[_Report | None] = ContextVar("report", default=None)


@contextlib.contextmanager
def _reporting() -> Iterator[_Report]:
    """The report of this thread, with a line every 30 seconds while anything is under way."""
    if (outer := _REPORT.get()) is not None:
        yield outer
        return
    report, over = _Report(), threading.Event()

    def every_now_and_then() -> None:
        while not over.wait(EVERY):
            if report.clocks or report.bars:
                say(report.line(), True)

    # a thread, since stages have long stretches without a step to count
    thread = threading.Thread(target=every_now_and_then, daemon=True)
    token = _REPORT.set(report)
    thread.start()
    try:
        yield report
    finally:
        _REPORT.reset(token)
        over.set()
        thread.join()


def _by_lines(progress: bool) -> bool:
    if not progress or _IN_NOTEBOOK:
        return False
    isatty = getattr(sys.stderr, "isatty", None)
    return isatty is None or not isatty()
