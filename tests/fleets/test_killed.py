"""Real processes, really killed: nothing is lost, and nothing is done twice that was done."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.fleets import ran, started
from nnprune_backdoor.fleets.claims import _machine, newest
from nnprune_backdoor.fleets.jobs import CLAIMS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _machine(), reason="the death of a process is seen by waiting only"),
]

MODELS = 10


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def results(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.json")}


def workers(out: Path) -> set[int]:
    """Of claims: who works now."""
    marks = [newest(out / CLAIMS, path.stem) for path in (out / CLAIMS).glob("*.*")]
    holders = [mark.holder.rpartition(" ")[2] for mark in marks if mark is not None]
    return {int(holder) for holder in holders if holder}  # none: it is being written


def ended(pid: int) -> bool:
    """Whether a process is gone, or its remains are not fetched yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except OSError:
        return True


def worked(process: subprocess.Popen[str]) -> int:
    said, wrong = process.communicate(timeout=100)
    assert process.returncode == 0, wrong
    return int(said)


def check_whole(out: Path, log: Path, twice: set[str]) -> None:
    """Every model has a result and began once, but for those that a killed process had begun."""
    assert len(results(out)) == MODELS
    expected = Counter({f"model{number}": 1 for number in range(MODELS)})
    assert Counter(ran(log)) == expected + Counter(twice)
    assert not list((out / CLAIMS).iterdir())


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path: Path, by: signal.Signals) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    first = started(out, log, MODELS, 0.5, workers=2)
    until(lambda: len(results(out)) >= 3 and len(workers(out)) == 2)
    at_work = workers(out)
    if by is signal.SIGINT:  # as Ctrl-C does
        os.killpg(first.pid, by)
    else:
        first.kill()
    _, said = first.communicate(timeout=100)  # it writes the table before it ends
    assert first.returncode != 0
    assert said.count("Traceback") == (by is signal.SIGINT), "of the caller alone"
    until(lambda: all(map(ended, at_work)))
    there, begun = results(out), set(ran(log))
    assert 3 <= len(there) < MODELS
    second = started(out, log, MODELS, 0.5, workers=2)
    assert worked(second) == MODELS - len(there)
    assert results(out).items() >= there.items(), "what was there is not written again"
    twice = Counter(ran(log)) - Counter({f"model{number}" for number in range(MODELS)})
    assert len(twice) == len(begun) - len(there) <= 2
    check_whole(out, log, set(twice))


def test_a_worker_that_is_killed_takes_nothing_with_it(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    process = started(out, log, MODELS, 0.2, workers=2)
    until(lambda: len(results(out)) >= 2 and len(workers(out)) == 2)
    killed = workers(out).pop()
    os.kill(killed, signal.SIGKILL)
    assert MODELS - worked(process) <= 1, "it may have been killed when it had written its result"
    twice = {name for name, times in Counter(ran(log)).items() if times > 1}
    assert len(twice) <= 1, "none where it had just ended one"
    worked(started(out, log, MODELS, 0.2, workers=1))  # clears a claim that outlived its result
    check_whole(out, log, twice)


def test_two_side_by_side_do_each_model_once(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    both = [started(out, log, MODELS, 0.4, workers=1) for _ in range(2)]
    shares = [worked(process) for process in both]
    assert sum(shares) == MODELS
    assert min(shares) >= 1, "they did not run side by side"
    check_whole(out, log, set())


def test_of_two_side_by_side_one_may_be_killed(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    first, second = (started(out, log, MODELS, 0.4, workers=1) for _ in range(2))
    until(lambda: len(workers(out)) == 2)
    first.kill()
    first.communicate(timeout=100)
    done_by_first = MODELS - worked(second)
    assert done_by_first >= 0
    twice = {name for name, times in Counter(ran(log)).items() if times > 1}
    assert len(twice) <= 1
    check_whole(out, log, twice)
