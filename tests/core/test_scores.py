"""Scores and selections: what is saved comes back, and the order is fixed down to the ties."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from nnprune_backdoor.core.recovered import RecoveredTrigger
from nnprune_backdoor.core.scores import ChannelScores, Point, Selection
from nnprune_backdoor.core.sites import Neuron, Site
from nnprune_backdoor.errors import DataError, OutputError, ScoringError

SITES = (
    Site("z.bn", 3, "norm", "z.conv"),  # names are not in alphabetical order on purpose
    Site("a.fc", 2, "layer", "a.fc"),
    Site("m.bn", 1, "norm", "m.conv"),
)
FLAT = torch.tensor([0.5, 0.25, 1.0, 0.25, 0.5, 0.0])


def scores(flat: Tensor = FLAT) -> ChannelScores:
    return ChannelScores(SITES, flat, "test")


@pytest.mark.parametrize("as_text", [True, False], ids=["str", "Path"])
def test_what_is_saved_is_loaded(tmp_path: Path, as_text: bool) -> None:
    flat = torch.rand(6, generator=torch.Generator().manual_seed(0)) / 3
    details = {"steps": 17, "accuracies": [0.9, 0.2], "reached": True, "note": "ä ≤ 1"}
    trigger = RecoveredTrigger(3, torch.rand(1, 4, 5), torch.randn(3, 4, 5), 0.9, 20, 7)
    saved = ChannelScores(SITES, flat, "RNP(alpha=0.2)", details, (trigger,))
    path = tmp_path / "scores.safetensors"
    saved.save(str(path) if as_text else path)
    loaded = ChannelScores.load(str(path) if as_text else path)
    assert torch.equal(loaded.flat, flat)
    assert loaded.flat.dtype == flat.dtype
    assert loaded.sites == SITES
    assert loaded.criterion == "RNP(alpha=0.2)"
    assert loaded.details == details
    (again,) = loaded.triggers
    assert torch.equal(again.mask, trigger.mask)
    assert torch.equal(again.pattern, trigger.pattern)
    assert (again.target, again.success, again.tested, again.steps) == (3, 0.9, 20, 7)
    assert loaded.ranking() == saved.ranking()


def test_scores_that_are_a_view_are_saved_right(tmp_path: Path) -> None:
    view = torch.stack([FLAT, FLAT + 9], dim=1)[:, 0]
    scores(view).save(tmp_path / "view.safetensors")
    assert torch.equal(ChannelScores.load(tmp_path / "view.safetensors").flat, FLAT)


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"scores": FLAT}, path)
    with pytest.raises(DataError, match=r"weights\.safetensors' holds no scores"):
        ChannelScores.load(path)


def test_a_selection_that_is_saved_is_loaded(tmp_path: Path) -> None:
    trigger = RecoveredTrigger(3, torch.rand(1, 4, 5), torch.randn(3, 4, 5), 0.9, 20, 7)
    saved = Selection(
        SITES,
        (Neuron("a.fc", 1), Neuron("z.bn", 0)),
        "these two",
        {"target": 3},
        (Point(0, 0.0), Point(2, 0.1, 0.5)),
        (trigger,),
        {"weights": "abc"},
    )
    saved.save(tmp_path / "selection.safetensors")
    loaded = Selection.load(tmp_path / "selection.safetensors")
    for name in ("sites", "neurons", "reason", "details", "curve", "made_from"):
        assert getattr(loaded, name) == getattr(saved, name)
    assert torch.equal(loaded.triggers[0].mask, trigger.mask)


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "scores.safetensors"
    scores().save(path)

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OutputError, match="the disk is full"):
        scores(FLAT + 1).save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert torch.equal(ChannelScores.load(path).flat, FLAT)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    scores().save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match="is damaged"):
        ChannelScores.load(path)
    save_file({"scores": FLAT}, path, {"scores": '{"sites": [{"name": "x"}], "details": {}}'})
    with pytest.raises(DataError, match="is damaged"):
        ChannelScores.load(path)
    with pytest.raises(DataError, match="not plain data"):
        ChannelScores(SITES, FLAT, "test", {"model": object()}).save(path)


def test_by_site_cuts_the_flat_scores_in_site_order() -> None:
    pieces = scores().by_site()
    assert list(pieces) == ["z.bn", "a.fc", "m.bn"]
    assert [piece.tolist() for piece in pieces.values()] == [[0.5, 0.25, 1.0], [0.25, 0.5], [0.0]]
    assert scores()["a.fc"].tolist() == [0.25, 0.5]


def test_ranking_by_hand() -> None:
    assert scores().ranking() == [
        Neuron("m.bn", 0),  # 0.0
        Neuron("z.bn", 1),  # 0.25, the earlier site first, whatever its name
        Neuron("a.fc", 0),
        Neuron("z.bn", 0),  # 0.5
        Neuron("a.fc", 1),
        Neuron("z.bn", 2),  # 1.0
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([-0.0, 0.0, 0.25, 1.0]), min_size=300, max_size=300))
def test_ties_are_ranked_by_site_then_channel(values: list[float]) -> None:
    sites = tuple(Site(name, 60, "norm", name) for name in ("e", "d", "c", "b", "a"))
    many = ChannelScores(sites, torch.tensor(values), "test")
    wanted = sorted(range(300), key=lambda i: (values[i], i // 60, i % 60))
    assert many.order().tolist() == wanted
    assert many.ranking() == [Neuron("edcba"[i // 60], i % 60) for i in wanted]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_are_refused(value: float) -> None:
    flat = FLAT.clone()
    flat[4] = value
    with pytest.raises(ScoringError, match="test gave scores that are NaN or inf"):
        scores(flat)


@pytest.mark.parametrize("shape", [(5,), (7,), (6, 1), (1, 6), ()])
def test_scores_of_the_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ScoringError, match="expected 6 scores, got shape"):
        scores(torch.zeros(shape))


def test_selection_says_what_stays_and_what_goes_where() -> None:
    selection = Selection(SITES, (Neuron("a.fc", 1), Neuron("z.bn", 2), Neuron("z.bn", 0)))
    assert len(selection) == 3
    assert selection.keep().tolist() == [0, 1, 0, 1, 0, 1]
    assert selection.by_site() == {"z.bn": [0, 2], "a.fc": [1]}
    assert list(selection.by_site()) == ["z.bn", "a.fc"], "site order, not order of selection"


def test_an_empty_selection_keeps_all() -> None:
    selection = Selection(SITES, ())
    assert len(selection) == 0
    assert selection.keep().tolist() == [1] * 6
    assert selection.by_site() == {}


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 5)), st.randoms(use_true_random=False))
def test_keep_and_by_site_agree_with_the_flat_order(chosen: set[int], shuffler: Random) -> None:
    ranking = ChannelScores(SITES, torch.arange(6.0), "test").ranking()  # = flat order
    order = sorted(chosen)
    shuffler.shuffle(order)
    selection = Selection(SITES, tuple(ranking[i] for i in order))
    assert selection.keep().eq(0).nonzero().flatten().tolist() == sorted(chosen)
    pairs = [
        Neuron(site, channel) for site, all_ in selection.by_site().items() for channel in all_
    ]
    assert pairs == [ranking[i] for i in sorted(chosen)]
