"""Responses of masks that are measured again whenever a few neurons have been silenced."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.images import generator
from nnprune_backdoor import CleanData, create_criterion
from nnprune_backdoor.core.masks import MaskedModel
from nnprune_backdoor.core.sites import Site
from nnprune_backdoor.criteria import Unlearning
from nnprune_backdoor.criteria.parts.response import Response, response_scores

IN_STAGES = ("anp", "cnp", "mnp", "rnp", "tac")


@pytest.fixture
def masked(net: nn.Module, sites: tuple[Site, ...]) -> MaskedModel:
    return MaskedModel(net, sites, silencing="zero")


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.floats(0.01, 0.6), st.integers(0, 99))
def test_what_goes_first_stays_first(stages: int, share: float, seed: int) -> None:
    """Later looks never change the order of what is already silent."""
    net = nn.Sequential(nn.Conv2d(3, 20, 1), nn.ReLU(), nn.Flatten(), nn.Linear(20 * 4, 3)).eval()
    masked = MaskedModel(net.requires_grad_(False), (Site("0", 20, "layer", "0"),))
    silent_at: list[Tensor] = []

    def pull() -> Tensor:
        silent_at.append(masked.masks.detach() == 0)
        return torch.randn(20, generator=generator(seed + len(silent_at)))

    found = Response(stages=stages, stage_share=share).scores(masked, pull, torch.ones(20))
    assert len(silent_at) == stages
    assert (masked.masks == 1).all()
    assert masked.masks.requires_grad
    assert ((found > 0) & (found < stages + 1)).all()
    for earlier, later in itertools.pairwise(silent_at):
        assert (later | ~earlier).all()  # what is silent stays silent
        assert int((later & ~earlier).sum()) <= max(1, round(share * 20))
        if later.any() and not later.all():
            assert found[later].max() < found[~later].min()


def test_one_stage_is_the_response(masked: MaskedModel) -> None:
    gradient = torch.randn(len(masked.masks), generator=generator())
    stiffness = torch.rand(len(masked.masks), generator=generator(1))
    got = Response(stages=1, stage_share=0.1).scores(masked, lambda: gradient, stiffness)
    assert torch.equal(got, response_scores(gradient, stiffness, 0.1))


def test_of_two_that_stand_in_for_each_other_both_are_found() -> None:
    """Silencing either of two twins alone does nothing; after one, the other matters."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 2)).requires_grad_(False)
    masked = MaskedModel(net, (Site("0", 4, "layer", "0"),))

    def pull() -> Tensor:
        first, second = (masked.masks.detach()[:2] == 0).tolist()
        # neuron 0 is a little guilty, its twin 1 only shows without it, 2 is as guilty as a decoy
        return torch.tensor([0.3, 1.0 if first and not second else 0.0, 0.2, -1.0])

    once = Response(stages=1, stage_share=0.25).scores(masked, pull, torch.ones(4))
    assert once.argsort().tolist()[:2] == [0, 2]
    twice = Response(stages=3, stage_share=0.25).scores(masked, pull, torch.ones(4))
    assert twice.argsort().tolist() == [0, 1, 2, 3]


def test_neurons_that_pull_the_other_way_never_go(masked: MaskedModel) -> None:
    away = -torch.ones(len(masked.masks))
    seen = []

    def pull() -> Tensor:
        seen.append(int((masked.masks == 0).sum()))
        return away

    Response(stages=4, stage_share=0.2).scores(masked, pull, torch.ones_like(away))
    assert seen == [0, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_STAGES)
def test_the_first_stage_of_every_criterion_is_its_response(
    name: str, net: nn.Module, clean: CleanData
) -> None:
    """The neurons that go after one look are those that a single look puts first."""
    unlearning = Unlearning(lr=0.05, missed="flag", epochs=5)
    target = {"min_success": 0.0, "target": 0, "steps": 3}
    quick: dict[str, Any] = {"tac": target, "cnp": target}
    quick |= {each: {"unlearning": unlearning} for each in ("rnp", "mnp")}
    ranking = replace(create_criterion(name).ranking, rounds=1, stage_share=0.05)  # type: ignore[attr-defined]
    once, again = (
        create_criterion(name, **quick.get(name, {}), ranking=replace(ranking, stages=stages))(
            net, clean, seed=0
        )
        for stages in (1, 2)
    )
    gone = round(0.05 * len(once.flat))
    guilty = int((once.flat < 1).sum())
    first = min(gone, guilty)
    assert first > 0
    assert set(again.order()[:first].tolist()) == set(once.order()[:first].tolist())
    assert not torch.equal(once.flat, again.flat)
