"""Exposed models: the clean task goes, on any network, and nobody else's model changes."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from helpers.images import noise_images
from helpers.networks import build
from helpers.states import assert_same_state, hooks_of, state_of
from nnprune_backdoor import CleanData
from nnprune_backdoor.core.predictions import predict_labels
from nnprune_backdoor.criteria import Unlearning
from nnprune_backdoor.errors import DataError, ScoringError
from nnprune_backdoor.evidence import expose

QUICK = Unlearning(lr=0.05, stop=None, missed="flag", epochs=40)


@pytest.mark.slow
def test_what_the_model_said_of_clean_images_is_unlearned(net: nn.Module, clean: CleanData) -> None:
    before, random, hooks = state_of(net), torch.get_rng_state(), hooks_of(net)
    exposed = expose(net, CleanData(clean.images), QUICK)  # no labels
    assert_same_state(before, state_of(net))
    assert torch.equal(random, torch.get_rng_state())
    assert hooks == hooks_of(net)
    assert exposed.reached
    said, says = predict_labels(net, clean.images), predict_labels(exposed.model, clean.images)
    assert (said == says).float().mean() < 0.5
    assert not exposed.model.training
    assert not any(parameter.requires_grad for parameter in exposed.model.parameters())


@pytest.mark.slow
def test_the_trajectory_says_what_was_predicted(net: nn.Module, clean: CleanData) -> None:
    exposed = expose(net, clean, QUICK)
    assert exposed.trajectory[0].accuracy > exposed.trajectory[-1].accuracy
    steps = [look.steps for look in exposed.trajectory]
    assert steps == sorted(steps)
    for predicted in (exposed.predicted, *(look.predicted for look in exposed.trajectory)):
        assert len(predicted) == 10
        assert sum(predicted) == pytest.approx(1)
    counts = torch.bincount(predict_labels(exposed.model, clean.images), minlength=10)
    assert exposed.predicted == pytest.approx((counts / len(clean)).tolist())
    assert exposed.predicted[exposed.label] == max(exposed.predicted)


@pytest.mark.slow
def test_it_is_repeatable_and_does_not_look_at_labels(net: nn.Module, clean: CleanData) -> None:
    one, two = (expose(net, data, QUICK, seed=3) for data in (clean, CleanData(clean.images)))
    assert one.trajectory == two.trajectory
    assert_same_state(state_of(one.model), state_of(two.model))


@pytest.mark.slow
def test_weights_that_the_forward_pass_does_not_read_are_no_obstacle(
    net: nn.Module, clean: CleanData
) -> None:
    """Auxiliary heads, for example, run in training alone."""
    with_more = copy.deepcopy(net)
    with_more.auxiliary = nn.Linear(8, 10)
    assert expose(with_more, clean, QUICK).predicted == expose(net, clean, QUICK).predicted


def test_networks_without_batchnorm_take_small_steps() -> None:
    vit = build("test_vit")
    images = CleanData(noise_images(24))
    exposed = expose(vit, images, Unlearning(epochs=3, missed="flag"))
    assert all(torch.isfinite(value).all() for value in exposed.model.state_dict().values())
    assert 1 <= len(exposed.trajectory) <= 3
    bold = Unlearning(lr=1.0)
    assert bold.careful(vit).lr == 1e-3
    assert bold.careful(build("test_resnet")) is bold


class Brightness(nn.Module):
    """Two labels, told apart by how bright an image is."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)  # running mean 0, variance 1
        self.head = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[-1.0] * 3, [1.0] * 3]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.norm(images).mean((2, 3)))
        return logits


def test_images_that_the_statistics_of_a_batch_confuse_are_told_of() -> None:
    """All are bright; within a batch, half are darker than the mean."""
    model = Brightness().eval()
    images = noise_images(32).abs() + torch.linspace(1, 2, 32).view(-1, 1, 1, 1)
    bright = CleanData(images, torch.ones(32, dtype=torch.long))
    settings: dict[str, Any] = {"batch_size": 32, "stop": 0.6, "missed": "flag"}
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ScoringError, match=r'right on 100%: unlearn with statistics="running"'):
        Unlearning(**settings).unlearn(model, bright, generator, False)
    running = Unlearning(**settings, statistics="running")
    assert running.unlearn(model, bright, generator, False)[1]["unlearn_steps"] > 0
    dark = CleanData(images, torch.zeros(32, dtype=torch.long))  # wrong labels
    with pytest.raises(ScoringError, match="check labels and normalisation"):
        running.unlearn(model, dark, generator, False)


def test_a_model_that_a_batch_confuses_is_exposed_with_its_own_statistics() -> None:
    images = CleanData(noise_images(32).abs() + torch.linspace(1, 2, 32).view(-1, 1, 1, 1))
    bright = CleanData(images.images, torch.ones(32, dtype=torch.long))
    settings = Unlearning(batch_size=32, stop=0.6, missed="flag")
    exposed = expose(Brightness(), images, settings)
    assert exposed.trajectory[0].accuracy == 1
    assert exposed.trajectory[-1].steps > 0
    assert settings.fitting(Brightness().eval(), bright).statistics == "running"


def test_others_are_exposed_with_those_of_a_batch(net: nn.Module, clean: CleanData) -> None:
    named = CleanData(clean.images, predict_labels(net, clean.images))
    assert QUICK.fitting(net, named) is QUICK
    own = replace(QUICK, statistics="running")
    assert own.fitting(net, named) is own


def test_divergence_and_bad_images_are_refused(net: nn.Module, clean: CleanData) -> None:
    wild = Unlearning(lr=1e30, clip=None, stop=-1.0, epochs=5)
    with pytest.raises(ScoringError, match=r"diverged|NaN or inf"):
        expose(net, clean, wild)
    with pytest.raises(ScoringError, match="is still"):
        expose(net, clean, Unlearning(lr=1e-6, epochs=1))
    with pytest.raises(DataError, match="NaN"):
        expose(net, torch.full((4, 3, 32, 32), torch.nan).split(2))
