"""Lines in place of bars, and what is said of the time."""

from __future__ import annotations

import re
import sys
import time

import pytest
from tqdm import tqdm

from nnprune_backdoor.utils import progress
from nnprune_backdoor.utils.progress import Clock, Lines, duration, progress_bar


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "1 s"),
        (8.4, "8 s"),
        (59.7, "1 min"),
        (80, "1 min 20 s"),
        (599, "9 min 50 s"),
        (720, "12 min"),
        (3590, "1 h 0 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_times_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_line_now_and_then_where_output_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.05)
    with progress_bar(10, "counting", True) as bar:
        bar.update(4)
        bar.set_postfix(accuracy="0.5")
        with progress_bar(3, "more", True):  # the innermost is what is under way
            time.sleep(0.12)
        time.sleep(0.12)
    lines = capsys.readouterr().err.splitlines()
    time.sleep(0.12)
    assert capsys.readouterr().err == ""  # nothing goes on in the background
    assert lines[0].startswith("more 0 of 3")
    assert re.fullmatch(r"counting 4 of 10: about 1 s left", lines[-1])


def test_silence_where_nothing_was_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.02)
    with Clock({"first": 1.0}, False).stage("first"), progress_bar(2, "counting", False):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress_bar(2, "counting", True) as bar:
        assert isinstance(bar, tqdm)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert isinstance(progress_bar(2, "counting", True), Lines)


def test_stages_are_announced_with_what_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress, "timer", lambda: now[0])
    clock = Clock({"first": 60.0, "second": 120.0, "third": None}, True)
    known = Clock({"first": 60.0, "second": 120.0}, True)
    with clock.stage("first"):
        assert clock.left is None  # the third is not known
        now[0] = 20.0
    with known.stage("first"):
        now[0] = 40.0
        assert known.left == 160.0
        now[0] = 90.0
        assert known.left == 120.0  # it takes a little longer than expected
        now[0] = 120.0
        assert known.left is None  # it takes far longer, and nobody knows how long
    with known.stage("second"):
        pass
    assert clock.laps == {"first": 20.0}
    assert known.laps == {"first": 100.0, "second": 0.0}
    said = capsys.readouterr().err.splitlines()
    assert said == ["first", "first: about 3 min left in all", "second: about 2 min left in all"]


def test_a_reader_that_left_ends_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def write(self, text: str) -> None:
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr(sys, "stderr", Closed())
    with Clock({"first": 1.0}, True).stage("first"), progress_bar(2, "counting", True) as bar:
        bar.update()
