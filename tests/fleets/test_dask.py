"""Workers of another engine, on a real cluster of processes, some of which are killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from helpers.fleets import ran, stubs
from nnprune_backdoor.fleets import run_many
from nnprune_backdoor.fleets.claims import _machine, newest
from nnprune_backdoor.fleets.jobs import CLAIMS

distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _machine(), reason="the death of a process is seen by waiting only"),
    pytest.mark.filterwarnings("default"),  # dask's own
]

MODELS, KILLED = 12, 3


def kill_some(out: Path, killed: list[int], over: threading.Event) -> None:
    """Kill a process that holds a claim, and then another."""
    while len(killed) < KILLED and not over.is_set():
        time.sleep(0.2)
        for claim in sorted((out / CLAIMS).glob("*.*"))[:1]:
            mark = newest(out / CLAIMS, claim.stem)
            if mark is None or mark.dead or not mark.holder:
                continue
            holder = int(mark.holder.rpartition(" ")[2])
            os.kill(holder, signal.SIGKILL)
            killed.append(holder)


def test_workers_that_are_killed_lose_no_model(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    (out / CLAIMS).mkdir(parents=True)
    killed: list[int] = []
    over = threading.Event()
    how: dict[str, Any] = {"dashboard_address": None, "local_directory": str(tmp_path)}
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, **how) as cluster,
        distributed.Client(cluster) as client,
    ):
        killer = threading.Thread(target=kill_some, args=(out, killed, over))
        killer.start()
        try:
            fleet = run_many(
                stubs(log, MODELS, 0.6), out, executor=client.get_executor(), progress=False
            )
        finally:
            over.set()
            killer.join()
    assert len(killed) == KILLED
    assert os.getpid() not in killed
    assert [row.state for row in fleet.rows] == ["done"] * MODELS
    # one may be killed when its result is written and its answer not sent
    assert MODELS - KILLED <= fleet.worked <= MODELS
    begun = Counter(ran(log))
    assert len(begun) == MODELS
    assert sum(begun.values()) <= MODELS + KILLED, "only what a killed worker had begun"
    assert not list((out / CLAIMS).iterdir())
