"""Triggers of the labels that are easiest to reach."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from helpers.images import noise_images
from helpers.networks import build
from helpers.states import assert_same_state, state_of
from nnprune_backdoor import CleanData
from nnprune_backdoor.core.recovered import RecoveredTrigger
from nnprune_backdoor.errors import DataError
from nnprune_backdoor.triggers import (
    EasiestLabels,
    Inversion,
    RecoveredPerturbation,
    UniversalPerturbation,
)

SHORT = EasiestLabels(
    glance=UniversalPerturbation(steps=3),
    perturbations=UniversalPerturbation(steps=2),
    patches=Inversion(steps=2, batch_size=8),
)


@pytest.fixture(scope="module")
def clean() -> CleanData:
    return CleanData(noise_images(24))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_labels_that_a_glance_reaches_most_are_kept(seed: int, clean: CleanData) -> None:
    search = replace(SHORT, glance=UniversalPerturbation(steps=20, rms=0.1))
    model = build("test_resnet")
    found = search.recover(model, clean, seed=seed)
    kinds = [RecoveredPerturbation] * 2 + [RecoveredTrigger] * 2
    assert [type(one) for one in found] == kinds
    kept = [one.target for one in found[:2]]
    assert kept == [one.target for one in found[2:]]
    reached = {one.target: one.success for one in search.glance.recover(model, clean, seed=seed)}
    rest = [success for label, success in reached.items() if label not in kept]
    assert min(reached[label] for label in kept) >= max(rest)
    assert max(reached.values()) > min(reached.values())


def test_of_many_labels_some_are_drawn(clean: CleanData) -> None:
    asked = []

    class Watched(UniversalPerturbation):
        def recover(self, model, clean, labels=None, **how):  # type: ignore[no-untyped-def]
            asked.append(list(labels))
            return super().recover(model, clean, labels, **how)

    few = EasiestLabels(
        labels=1, tried=3, glance=Watched(steps=1), perturbations=SHORT.perturbations
    )
    for seed in (0, 0, 1):
        few.recover(build("test_resnet"), clean, seed=seed)
    assert [len(labels) for labels in asked] == [3, 3, 3]
    assert asked[0] == asked[1] != asked[2]


def test_a_model_in_train_mode_is_left_as_it_was(clean: CleanData) -> None:
    model = build("test_resnet").train()
    before = copy.deepcopy(state_of(model))
    state = torch.random.get_rng_state()
    SHORT.recover(model, clean)
    assert_same_state(before, state_of(model))
    assert model.training and torch.equal(state, torch.random.get_rng_state())


def test_settings_are_checked() -> None:
    for given in ({"labels": 0}, {"labels": 3, "tried": 2}):
        with pytest.raises(DataError, match="labels <= tried"):
            EasiestLabels(**given)
