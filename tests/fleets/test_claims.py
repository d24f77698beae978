"""Claims: one holder at a time, and those of dead processes are taken over by one alone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nnprune_backdoor.fleets import claims
from nnprune_backdoor.fleets.claims import Claim, Watch, newest


def left_behind(folder: Path, key: str, number: int = 1, holder: str = "elsewhere 1") -> Path:
    path = folder / f"{key}.{number}"
    path.write_text(holder)
    return path


def dead_process() -> str:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return f"{claims._machine()} {ended.pid}"


def test_a_claim_is_of_one_and_is_given_back(tmp_path: Path) -> None:
    claim = Claim.take(tmp_path, "a")
    assert claim is not None
    with claim:
        assert Claim.take(tmp_path, "a") is None
        assert Claim.take(tmp_path, "b") is not None
        assert claim.held
    assert newest(tmp_path, "a") is None
    assert Claim.take(tmp_path, "a") is not None


def test_a_claim_is_given_back_on_an_error(tmp_path: Path) -> None:
    claim = Claim.take(tmp_path, "a")
    assert claim is not None
    with pytest.raises(KeyboardInterrupt), claim:
        raise KeyboardInterrupt
    assert newest(tmp_path, "a") is None


@pytest.mark.skipif(not claims._machine(), reason="the machine cannot be told")
def test_the_claim_of_a_process_that_died_here_is_taken_over_at_once(tmp_path: Path) -> None:
    left_behind(tmp_path, "a", holder=dead_process())
    claim = Claim.take(tmp_path, "a")
    assert claim is not None
    with claim:
        claim.clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "holder",
    ["elsewhere 1", "", f"{claims._machine()} {os.getpid()}"],
    ids=["elsewhere", "unknown", "this process"],  # a number of a process is none for pytest-xdist
)
def test_another_claim_is_left_until_the_caller_gives_it_up(tmp_path: Path, holder: str) -> None:
    left_behind(tmp_path, "a", 2, holder)
    assert Claim.take(tmp_path, "a") is None
    assert Claim.take(tmp_path, "a", given_up=1) is None
    claim = Claim.take(tmp_path, "a", given_up=2)
    assert claim is not None
    with claim:
        assert (tmp_path / "a.3").exists()
        assert claim.held


def test_of_many_that_take_over_one_does(tmp_path: Path) -> None:
    for key in map(str, range(20)):
        left_behind(tmp_path, key)
        together, found = threading.Barrier(8), []

        def take(key: str = key, at: threading.Barrier = together, to: list = found) -> None:  # type: ignore[type-arg]
            at.wait()
            to.append(Claim.take(tmp_path, key, given_up=1))

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(claim is not None for claim in found) == 1


def test_a_holder_sees_that_it_was_taken_for_dead(tmp_path: Path) -> None:
    slow = Claim.take(tmp_path, "a")
    assert slow is not None
    with slow:
        other = Claim.take(tmp_path, "a", given_up=1)
        assert other is not None
        with other:
            assert other.held
            assert not slow.held


def test_a_claim_is_free_when_it_is_not_touched_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "SILENT", 0.3)
    monkeypatch.setattr(claims, "BEAT", 0.05)
    watch = Watch(tmp_path)
    assert watch.free("a") == 0, "there is none"
    left_behind(tmp_path, "silent")
    claim = Claim.take(tmp_path, "alive")
    assert claim is not None
    with claim:
        until, silent = time.monotonic() + 1.0, None
        while time.monotonic() < until:
            assert watch.free("alive") is None
            silent = watch.free("silent") or silent
            time.sleep(0.02)
    assert silent == 1
    assert watch.free("alive") == 0


@pytest.mark.skipif(not claims._machine(), reason="the machine cannot be told")
def test_the_claim_of_a_process_that_died_here_is_free_at_once(tmp_path: Path) -> None:
    left_behind(tmp_path, "a", 4, holder=dead_process())
    assert Watch(tmp_path).free("a") == 4
