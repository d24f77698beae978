"""Selecting by a recovered trigger, on networks whose backdoor is written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.handmade import MEAN, STD, TRIGGER, Handmade, pictures, ranked
from helpers.images import generator
from helpers.states import assert_same_state, state_of
from nnprune_backdoor import CleanData, create_selector
from nnprune_backdoor.core.held_out import HeldOut
from nnprune_backdoor.core.scores import ChannelScores
from nnprune_backdoor.errors import DataError
from nnprune_backdoor.selectors import TriggerGone
from nnprune_backdoor.triggers import Inversion

QUICK = Inversion(steps=120, batch_size=32)
SELECTOR = TriggerGone(search=QUICK, inversion=QUICK, max_fraction=1.0)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Handmade(3, target=1).eval().requires_grad_(False)


@pytest.fixture
def images() -> CleanData:
    return pictures(3)


def held_out(model: nn.Module, scores: ChannelScores, images: CleanData) -> HeldOut:
    # the trigger's channel is silent at its bias, not at zero
    return HeldOut(model, scores.sites, images, silencing="constant")


def test_the_least_that_makes_the_trigger_fail(model: nn.Module, images: CleanData) -> None:
    """Channels 3, 4, 6 and 7 are idle: they could all go without a loss, but need not."""
    scores = ranked(model, images, [3, TRIGGER, 4, 6, 7])
    before = state_of(model)
    selection = SELECTOR(scores, held_out(model, scores, images))
    assert_same_state(before, state_of(model))
    assert [neuron.channel for neuron in selection.neurons] == [3, TRIGGER]
    assert selection.details["target"] == 1
    assert "label 1 succeed on <= 5%" in selection.reason
    first, *_, last = selection.curve
    assert first.success is not None
    assert last.success is not None
    assert first.success > 0.9
    assert last.success <= 0.05
    assert (first.neurons, last.neurons) == (0, 2)
    assert [trigger.target for trigger in selection.triggers] == [1, 1]


@pytest.mark.slow
def test_the_budget_is_kept(model: nn.Module, images: CleanData) -> None:
    """The three colours come before the trigger's channel: taking any ruins accuracy."""
    scores = ranked(model, images, [3, 0, 2, TRIGGER])
    selection = SELECTOR(scores, held_out(model, scores, images))
    assert {neuron.channel for neuron in selection.neurons} <= {3}
    assert "still succeed" in selection.reason


def test_the_reason_is_true_where_amounts_run_out(model: nn.Module, images: CleanData) -> None:
    """Only one idle channel may be tried, which costs nothing and does nothing."""
    few = TriggerGone(search=QUICK, inversion=QUICK, max_fraction=1 / 8)
    scores = ranked(model, images, [3])
    reason = few(scores, held_out(model, scores, images)).reason
    assert "still succeed" in reason
    assert "up to 12% of the neurons" in reason


def test_no_trigger_nothing_selected(images: CleanData) -> None:
    """A network that obeys no small trigger: it sees one number for the whole image."""

    class Benign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)
            self.head = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.conv(x * STD + MEAN).relu().mean((2, 3)))
            return logits * 1e-3

    torch.manual_seed(0)
    model = Benign().eval().requires_grad_(False)
    scores = ranked(model, images, [])
    stubborn = TriggerGone(
        search=Inversion(steps=1, batch_size=8), inversion=QUICK, min_success=1.0
    )
    selection = stubborn(scores, held_out(model, scores, images))
    assert len(selection) == 0
    assert "none to remove" in selection.reason


def test_the_criterions_target_is_taken(model: nn.Module, images: CleanData) -> None:
    scores = ranked(model, images, [TRIGGER])
    told = ChannelScores(scores.sites, scores.flat, "given", {"target": 1})
    never = Inversion(steps=1, batch_size=1)  # a search that would find nothing
    selector = TriggerGone(search=never, inversion=QUICK, max_fraction=1.0)
    selection = selector(told, held_out(model, scores, images))
    assert [neuron.channel for neuron in selection.neurons] == [TRIGGER]


@pytest.mark.slow
def test_it_is_repeatable(model: nn.Module, images: CleanData) -> None:
    scores = ranked(model, images, [3, TRIGGER])
    one, two = (SELECTOR(scores, held_out(model, scores, images)) for _ in range(2))
    assert one.neurons == two.neurons
    assert one.details == two.details
    assert one.curve == two.curve


def test_bad_settings_and_missing_images_are_refused(model: nn.Module, images: CleanData) -> None:
    for settings in ({"max_success": 0.9}, {"max_drop": 1.0}, {"triggers": 0}, {"points": 1}):
        with pytest.raises(DataError, match="expected"):
            create_selector("trigger", **settings)
    with pytest.raises(DataError, match="held-out"):
        SELECTOR(ranked(model, images, []))
    unlabelled = CleanData(torch.randn(20, 3, 16, 16, generator=generator()))
    scores = ranked(model, unlabelled, [TRIGGER])
    with pytest.raises(DataError, match="labelled"):
        SELECTOR(scores, held_out(model, scores, unlabelled))
