"""Scores and selections in files: taken up again with the same result, refused elsewhere."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.criteria import Arbitrary
from helpers.states import assert_same_state, state_of
from nnprune_backdoor import CleanData, Purified, purify
from nnprune_backdoor.core.scores import ChannelScores, Selection
from nnprune_backdoor.criteria import ANP, FP, Response
from nnprune_backdoor.errors import DataError, OutputError
from nnprune_backdoor.pipeline import job
from nnprune_backdoor.selectors import LowestCount
from nnprune_backdoor.selectors.agreement import Agreeing
from nnprune_backdoor.training import Distillation

QUICK = ANP(ranking=Response(statistics="batch"))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "Distillation", partial(Distillation, epochs=1, stamped=0.0))


def run(model: nn.Module, clean: CleanData, folder: Path, **others: Any) -> Purified:
    files = {name: folder / f"{name}.safetensors" for name in ("scores", "selection")}
    options: dict[str, Any] = {"method": QUICK, "progress": False, **files, **others}
    return purify(model, clean, **options)


def report(purified: Purified) -> dict[str, Any]:
    """Without when it was made, and what was timed."""
    found = purified.to_dict()
    del found["seconds"], found["given"]["date"]
    for when in ("before", "after"):
        del found["size"][when]["latency"]
    return found


def test_the_second_time_nothing_is_scored_and_the_result_is_the_same(
    net: nn.Module,
    clean: CleanData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    without = purify(net, clean, QUICK, progress=False)
    first = run(net, clean, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "scores.safetensors",
        "selection.safetensors",
    ]

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("this was done before")

    monkeypatch.setattr(ANP, "score", never)
    monkeypatch.setattr(Agreeing, "__call__", never)
    second = run(net, clean, tmp_path, progress=True)
    said = capsys.readouterr().err
    assert f"scores are taken from {tmp_path / 'scores.safetensors'}" in said
    for other in (without, second):
        assert_same_state(state_of(first.model), state_of(other.model))
        assert torch.equal(first.scores.flat, other.scores.flat)
        assert first.selection.neurons == other.selection.neurons
        assert report(first) == report(other)


def test_what_was_interrupted_is_taken_up_again(
    net: nn.Module, clean: CleanData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = purify(net, clean, QUICK, progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(job, "distil_with_triggers", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(net, clean, tmp_path)
    assert_same_state(state_of(whole.model), state_of(run(net, clean, tmp_path).model))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"seed": 1}, r"scores\.safetensors was made from other things"),
        ({"method": FP()}, r"criterion: ANP\(.*; here FP\("),
        ({"shares": (0.5, 0.3, 0.2)}, "images: "),
        ({"scores": None, "selector": LowestCount(3)}, "selector: Agreeing"),
        ({"scores": None, "silencing": "constant"}, "silencing: zero; here constant"),
        ({"scores": None, "seed": 1}, r"selection\.safetensors was made from other things"),
    ],
)
def test_a_file_of_something_else_is_refused(
    net: nn.Module, clean: CleanData, tmp_path: Path, other: dict[str, Any], said: str
) -> None:
    run(net, clean, tmp_path)
    with pytest.raises(DataError, match=said):
        run(net, clean, tmp_path, **other)


def test_a_file_of_other_weights_is_refused_before_any_work(
    net: nn.Module, clean: CleanData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(net, clean, tmp_path)
    other = copy.deepcopy(net)
    with torch.no_grad():
        next(other.parameters()).mul_(1.001)
    monkeypatch.setattr(ANP, "score", lambda *_: pytest.fail("it began to score"))
    with pytest.raises(DataError, match=r"\(weights: [0-9a-f]{64}; here [0-9a-f]{64}\)"):
        run(other, clean, tmp_path)


def test_a_file_of_other_layers_is_refused(
    net: nn.Module, clean: CleanData, tmp_path: Path
) -> None:
    scores = run(net, clean, tmp_path).scores
    fewer = ChannelScores(
        scores.sites[:1], scores.flat[: scores.sites[0].channels], scores.criterion,
        made_from=scores.made_from,
    )  # fmt: skip
    fewer.save(tmp_path / "scores.safetensors")
    with pytest.raises(DataError, match="layers: "):
        run(net, clean, tmp_path)


def test_what_was_saved_afterwards_is_taken_up_as_well(
    net: nn.Module, clean: CleanData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = purify(net, clean, QUICK, progress=False)
    first.scores.save(tmp_path / "scores.safetensors")
    first.selection.save(tmp_path / "selection.safetensors")
    monkeypatch.setattr(ANP, "score", lambda *_: pytest.fail("it began to score"))
    assert_same_state(state_of(first.model), state_of(run(net, clean, tmp_path).model))


def test_a_criterion_of_ones_own_is_taken_up(
    net: nn.Module, clean: CleanData, tmp_path: Path
) -> None:
    first = run(net, clean, tmp_path, method=Arbitrary())  # which calls its scores otherwise
    again = run(net, clean, tmp_path, method=Arbitrary())
    assert_same_state(state_of(first.model), state_of(again.model))


def test_scores_of_a_criterion_alone_say_what_they_were_made_from(
    net: nn.Module, clean: CleanData, tmp_path: Path
) -> None:
    QUICK(net, clean).save(tmp_path / "scores.safetensors")  # of all images, not of a part
    with pytest.raises(DataError, match="images: "):
        run(net, clean, tmp_path)


def test_a_folder_that_is_missing_is_found_before_any_work(
    net: nn.Module, clean: CleanData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ANP, "score", lambda *_: pytest.fail("it began to score"))
    with pytest.raises(OutputError, match="no such folder"):
        run(net, clean, tmp_path / "missing")


def test_files_are_no_selections_of_each_other(
    net: nn.Module, clean: CleanData, tmp_path: Path
) -> None:
    run(net, clean, tmp_path)
    with pytest.raises(DataError, match="holds no selection"):
        Selection.load(tmp_path / "scores.safetensors")
    (tmp_path / "selection.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="is damaged"):
        run(net, clean, tmp_path)


def test_saying_how_far_it_is_changes_nothing(
    net: nn.Module, clean: CleanData, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = purify(net, clean, QUICK, progress=False)
    assert capsys.readouterr().err == ""
    before, drawn = state_of(net), torch.get_rng_state()
    told = purify(net, clean, QUICK, progress=True)
    assert_same_state(before, state_of(net))
    assert torch.equal(drawn, torch.get_rng_state())
    assert_same_state(state_of(quiet.model), state_of(told.model))
    assert report(quiet) == report(told)
    what, estimate, *stages = capsys.readouterr().err.splitlines()
    neurons = len(told.scores.flat)
    assert what.startswith(f"purifying: {neurons:,} neurons in ")
    assert "10 labels, 64 images" in what
    assert estimate.startswith("about ")
    names = [line.partition(":")[0] for line in stages]
    wanted = ["scoring", "selecting", "repairing", "removing", "certifying"]
    assert [name for name in names if "," not in name] == wanted
