"""Many jobs by an executor: each once, a failure is a result, and what is there stays."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from helpers.fleets import Stub, ran, stubs
from nnprune_backdoor.errors import DataError, OutputError, PurifyError
from nnprune_backdoor.fleets import Fleet, fleet, run_many
from nnprune_backdoor.fleets.claims import Claim
from nnprune_backdoor.fleets.jobs import CLAIMS


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results"


def done(jobs: list[Stub], out: Path, **how: Any) -> Fleet:
    with ThreadPoolExecutor(3) as executor:
        return run_many(jobs, out, executor=executor, **{"progress": False, **how})


def results(out: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


def test_each_result_is_a_file_named_by_its_content(out: Path, log: Path) -> None:
    jobs = stubs(log, 5)
    assert done(jobs, out).worked == 5
    assert results(out).keys() == {job.key() for job in jobs}
    result = results(out)[jobs[0].key()]
    assert result["state"] == "done"
    assert result["data"] == {"n": [1, 2]}
    assert result["rows"] == {jobs[0].row: "model0"}
    assert not list((out / CLAIMS).iterdir())


def test_what_is_there_is_not_done_again(out: Path, log: Path) -> None:
    jobs = stubs(log, 6)
    done(jobs[:4], out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    again = done(jobs, out)
    assert again.worked == 2
    assert Counter(ran(log)) == dict.fromkeys((job.name for job in jobs), 1)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert [row.state for row in again.rows] == ["done"] * 6


def test_a_failure_is_a_result_and_the_rest_goes_on(out: Path, log: Path) -> None:
    kinds = ["refuse", "break", "run out", "say nothing", "vanish", "work"]
    jobs = [Stub(kind, str(log), does=kind) for kind in kinds]
    found = {row.name: row for row in done(jobs, out).rows}
    assert {name for name, row in found.items() if row.failed} == set(kinds) - {"work"}
    assert found["refuse"].says == "these images do not fit"
    assert found["break"].says == "RuntimeError: a library's error of two lines"
    assert found["say nothing"].says.startswith("ValueError: ")
    assert found["vanish"].says == "vanish: no such file; check the path"
    assert found["work"].state == "done"


def test_only_a_failure_that_may_go_well_is_tried_again(out: Path, log: Path) -> None:
    kinds = ["refuse", "break", "run out", "vanish", "work"]
    jobs = [Stub(kind, str(log), does=kind) for kind in kinds]
    done(jobs, out)
    assert done(jobs, out).worked == 2
    assert Counter(ran(log)) == {"refuse": 1, "break": 2, "run out": 2, "work": 1}
    assert len(results(out)) == 5


def test_a_file_that_came_meanwhile_is_looked_at(out: Path, log: Path) -> None:
    class Late(Stub):
        there = False

        def key(self) -> str:
            if not Late.there:
                raise OSError("not mounted")
            return super().key()

    job = Late("late", str(log))
    (row,) = done([job], out).rows
    assert row.says == "OSError: not mounted"
    Late.there = True
    (row,) = done([job], out).rows
    assert row.state == "done"
    assert results(out).keys() == {job.key()}, "the failure is gone"


def test_two_names_of_one_model_share_its_result(out: Path, log: Path) -> None:
    jobs = [Stub(name, str(log), content="same") for name in ("first", "second")]
    both = done(jobs, out)
    assert both.worked == 1
    assert [row.name for row in both.rows] == ["first", "second"]
    assert {row.file for row in both.rows} == {f"{jobs[0].key()}.json"}
    renamed = done([Stub("third", str(log), content="same")], out)
    assert renamed.worked == 0
    assert [row.state for row in renamed.rows] == ["done"]
    assert len(ran(log)) == 1


def test_shards_are_all_of_it_and_nothing_twice(out: Path, log: Path) -> None:
    jobs = stubs(log, 7)
    first = done(jobs, out, shard=(1, 3))
    assert (len(first.mine), first.worked) == (3, 3)
    assert Counter(row.state for row in first.rows) == {"done": 3, "missing": 4}
    assert "4 models are not of this shard" in first.summary()
    assert [done(jobs, out, shard=(i, 3)).worked for i in (2, 3)] == [2, 2]
    assert sorted(ran(log)) == sorted(job.name for job in jobs)


def test_a_job_that_another_process_works_on_is_waited_for(
    out: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That process gives up in the end, and the job is done here."""
    monkeypatch.setattr(fleet, "PAUSE", 0.05)
    jobs = stubs(log, 3)
    done(jobs[:1], out)
    claim = Claim.take(out / CLAIMS, jobs[1].key())
    assert claim is not None
    looks = []

    class Looks(fleet.Watch):
        def free(self, key: str) -> int | None:
            looks.append(key)
            if len(looks) == 3:
                assert sorted(ran(log)) == ["model0", "model2"], "others first, this one not yet"
                (out / CLAIMS / f"{key}.1").unlink()
            return super().free(key)

    monkeypatch.setattr(fleet, "Watch", Looks)
    assert done(jobs, out).worked == 2
    assert set(looks) == {jobs[1].key()}
    assert sorted(ran(log)) == ["model0", "model1", "model2"]


class Breaks(Executor):
    """As a pool whose worker was killed: all that waits fails, and no more is taken."""

    def __init__(self, lasts: int) -> None:
        self.lasts = lasts

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self.lasts < -2:
            raise BrokenProcessPool("a child process terminated abruptly")
        self.lasts -= 1
        future: Future[Any] = Future()
        if self.lasts >= 0:
            future.set_result(fn(*args, **kwargs))
        else:
            future.set_exception(BrokenProcessPool("killed"))
        return future


def test_an_executor_that_breaks_loses_nothing_that_was_done(out: Path, log: Path) -> None:
    jobs = stubs(log, 5)
    with pytest.raises(PurifyError, match=r"takes no more jobs .*the same call with a new one"):
        run_many(jobs, out, executor=Breaks(2), progress=False)
    assert len(results(out)) == 2
    table = list(csv.DictReader((out / "summary.csv").read_text().splitlines()))
    assert Counter(row["state"] for row in table) == {"done": 2, "missing": 3}
    assert done(jobs, out).worked == 3


def test_a_job_that_always_loses_its_worker_is_a_failure_until_the_next_start(
    out: Path, log: Path
) -> None:
    class Killed(ThreadPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            return super().submit(raises if args[0].name == "model1" else fn, *args, **kwargs)

    def raises(*_: Any) -> None:
        raise RuntimeError("KilledWorker")

    jobs = stubs(log, 3)
    with Killed(2) as executor:
        found = run_many(jobs, out, executor=executor, progress=False)
    (failed,) = (row for row in found.rows if row.failed)
    assert failed.name == "model1"
    assert "2 times; out of memory? (KilledWorker)" in failed.says
    assert done(jobs, out).worked == 1
    assert not [row for row in done(jobs, out).rows if row.failed]


def test_the_table_begins_with_the_strongest_evidence(out: Path, log: Path) -> None:
    given = {"low": 0.1, "none": None, "high": 0.95, "=1+1": 0.8, "<b>": 0.3}
    jobs = [Stub(name, str(log), evidence=e) for name, e in given.items()]
    jobs.append(Stub("bad", str(log), does="refuse"))
    found = done(jobs, out)
    assert [row.name for row in found.rows] == ["high", "=1+1", "<b>", "low", "none", "bad"]
    table = list(csv.DictReader((out / "summary.csv").read_text().splitlines()))
    assert [row["model"] for row in table] == ["high", "'=1+1", "<b>", "low", "none", "bad"]
    states = [row["state"] for row in table]
    assert states == ["evidence", "evidence", "done", "done", "cannot tell", "failed"]
    assert [float(row["evidence"] or -1) for row in table] == [0.95, 0.8, 0.3, 0.1, -1, -1]
    assert {row["target"] for row in table[:5]} == {"3"}
    page = found.page.read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert "script" not in page.lower()
    counts = "6 models: 2 with evidence of a backdoor, 1 cannot tell, 1 failed\n"
    assert found.summary().startswith(counts)
    assert counts.strip() in page


def test_a_line_is_printed_for_each_model(
    out: Path, log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done([Stub("new\x1b[2Jline", str(log))], out, progress=True)
    assert capsys.readouterr().err == "1 of 1  new?[2Jline: looked at new\x1b[2Jline\n".replace(
        "\x1b", "?"
    )


@pytest.mark.parametrize("damage", ["", "{", '{"format": 99}', "[1]"])
def test_a_result_that_cannot_be_read_is_made_anew(out: Path, log: Path, damage: str) -> None:
    jobs = stubs(log, 2)
    done(jobs, out)
    (out / f"{jobs[0].key()}.json").write_text(damage)
    (out / "notes.json").write_text(damage)
    assert done(jobs, out).worked == 1
    assert (out / "notes.json").read_text() == damage


def test_a_claim_that_outlived_its_result_is_removed(out: Path, log: Path) -> None:
    """Its holder was killed between the two."""
    jobs = stubs(log, 2)
    done(jobs, out)
    (out / CLAIMS / f"{jobs[0].key()}.1").write_text("elsewhere 1")
    assert done(jobs, out).worked == 0
    assert not list((out / CLAIMS).iterdir())


def test_misuse_is_said_before_any_work(tmp_path: Path, log: Path) -> None:
    jobs = stubs(log, 1)
    for given, how, error in (
        ([], {}, "there are no jobs"),
        (jobs, {"workers": 0}, "at least 1, got 0 and 1"),
        (jobs, {"threads": 0}, "at least 1, got None and 0"),
        (jobs, {"shard": (3, 2)}, "from 1 to n, got 3 of 2"),
    ):
        with pytest.raises(DataError, match=error):
            run_many(given, tmp_path / "out", **how)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=re.escape("file/out: no results can be written there")):
        run_many(jobs, tmp_path / "file" / "out")
    assert not ran(log)


def test_a_folder_that_cannot_be_written_to_any_more_ends_it(
    out: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OutputError("no space")

    monkeypatch.setattr("nnprune_backdoor.fleets.jobs.write_whole", full)
    with pytest.raises(OutputError, match="no space"):
        done(stubs(log, 2), out)
    assert not results(out)
    assert not list((out / CLAIMS).iterdir())
