"""Labels that a small perturbation reaches from almost everywhere, and their triggers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import pytest
import torch

from helpers.images import noise_images
from helpers.networks import build
from helpers.states import assert_same_state, state_of
from nnprune_backdoor import CleanData
from nnprune_backdoor.core.recovered import RecoveredTrigger
from nnprune_backdoor.errors import DataError
from nnprune_backdoor.triggers import (
    IndividualPerturbations,
    Inversion,
    RecoveredPerturbation,
    SuspectLabels,
    UniversalBlend,
    UniversalPerturbation,
)

SHORT = SuspectLabels(
    suspicious=0.0,
    working=0.0,
    glance=UniversalPerturbation(steps=3),
    perturbations=UniversalPerturbation(steps=2),
    patches=Inversion(steps=2, batch_size=8),
    blends=UniversalBlend(steps=2),
    far=0.0,
)


@pytest.fixture(scope="module")
def clean() -> CleanData:
    return CleanData(noise_images(24))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_labels_that_a_glance_reaches_most_are_tried_further(
    seed: int, clean: CleanData
) -> None:
    search = replace(SHORT, glance=UniversalPerturbation(steps=20, rms=0.1))
    model = build("test_resnet")
    found = search.suspect(model, clean, seed=seed)
    kinds = [RecoveredPerturbation] * 2 + [RecoveredTrigger] * 4  # patches and blends
    assert [type(one) for one in found] == kinds
    kept = [one.target for one in found[:2]]
    assert [one.target for one in found] == 3 * kept
    whole, half = (
        {
            one.target: one.success
            for one in UniversalPerturbation(steps=20, rms=rms).recover(model, clean, seed=seed)
        }
        for rms in (0.1, 0.05)
    )
    reached = {label: whole[label] + half[label] for label in whole}
    rest = [success for label, success in reached.items() if label not in kept]
    assert min(reached[label] for label in kept) >= max(rest)
    assert max(reached.values()) > min(reached.values())


@dataclass(frozen=True, kw_only=True)
class Reaching(UniversalPerturbation):
    """Claims that the perturbation of a label succeeds so often."""

    claimed: Mapping[int, float]

    def recover(self, model, clean, labels=None, **how):  # type: ignore[no-untyped-def]
        found = super().recover(model, clean, labels, **how)
        return tuple(replace(one, success=self.claimed.get(one.target, 0.0)) for one in found)


@dataclass(frozen=True, kw_only=True)
class ReachingBlend(UniversalBlend):
    """Claims that the blend of a label succeeds so often."""

    claimed: Mapping[int, float]

    def recover(self, model, clean, labels=None, **how):  # type: ignore[no-untyped-def]
        found = super().recover(model, clean, labels, **how)
        return tuple(replace(one, success=self.claimed.get(one.target, 0.0)) for one in found)


NO_BLENDS = ReachingBlend(claimed={}, steps=1)


@pytest.mark.parametrize(
    ("claimed", "blends", "working"),
    [
        ({2: 0.95, 3: 0.4}, {2: 0.5, 3: 0.6}, [2, 2, 2, 3]),  # with its patch; the blends
        ({2: 0.95}, {2: 0.4}, [2, 2]),
        ({}, {3: 0.9}, [3]),
        ({}, {}, []),
    ],
)
def test_a_blend_works_for_itself(
    claimed: dict[int, float], blends: dict[int, float], working: list[int], clean: CleanData
) -> None:
    """Where no small perturbation reaches a label any more, a blend may."""
    quick = Reaching(claimed=claimed, steps=1)
    search = replace(
        SHORT,
        perturbations=quick,
        working=0.5,
        suspicious=0.9,
        blends=ReachingBlend(claimed=blends, steps=1),
    )
    found = search.still_working(build("test_resnet"), clean, [3, 2])
    assert [one.target for one in found] == working


@pytest.mark.parametrize(
    ("claimed", "suspects", "working"),
    [
        ({2: 0.95, 3: 0.91, 4: 0.4}, [2, 3], [2, 3]),
        ({2: 0.95, 3: 0.89}, [2], [2, 3]),
        ({2: 0.89, 3: 0.49}, [], [2]),
        ({}, [], []),
    ],
)
def test_success_decides_whether_a_label_is_suspected(
    claimed: dict[int, float], suspects: list[int], working: list[int], clean: CleanData
) -> None:
    quick = Reaching(claimed=claimed, steps=1)
    search = replace(
        SHORT, glance=quick, perturbations=quick, suspicious=0.9, working=0.5, blends=NO_BLENDS
    )
    model = build("test_resnet")
    assert [one.target for one in search.suspect(model, clean)] == 2 * suspects
    found = search.still_working(model, clean, [2, 3])
    assert [one.target for one in found] == 2 * working


def test_of_many_labels_some_are_drawn(clean: CleanData) -> None:
    asked = []

    class Watched(UniversalPerturbation):
        def recover(self, model, clean, labels=None, **how):  # type: ignore[no-untyped-def]
            asked.append(list(labels))
            return super().recover(model, clean, labels, **how)

    few = SuspectLabels(
        labels=1, tried=3, glance=Watched(steps=1), perturbations=SHORT.perturbations, far=0.0
    )
    for seed in (0, 0, 1):
        few.suspect(build("test_resnet"), clean, seed=seed)
    assert [len(labels) for labels in asked] == [3] * 6
    assert asked[0] == asked[1] == asked[2] == asked[3] != asked[4] == asked[5]


def test_half_the_radius_tells_labels_apart_that_are_all_easy(clean: CleanData) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Saturated(UniversalPerturbation):
        def recover(self, model, clean, labels=None, **how):  # type: ignore[no-untyped-def]
            found = super().recover(model, clean, labels, **how)
            claimed = 1.0 if self.rms > 0.05 else 0.1
            return tuple(
                replace(one, success=0.9 if one.target == 3 and self.rms <= 0.05 else claimed)
                for one in found
            )

    search = replace(SHORT, labels=1, glance=Saturated(rms=0.1, steps=1))
    assert {one.target for one in search.suspect(build("test_resnet"), clean)} == {3}


def test_a_model_in_train_mode_is_left_as_it_was(clean: CleanData) -> None:
    model = build("test_resnet").train()
    before = copy.deepcopy(state_of(model))
    state = torch.random.get_rng_state()
    SHORT.suspect(model, clean)
    SHORT.still_working(model, clean, [1])
    assert_same_state(before, state_of(model))
    assert model.training and torch.equal(state, torch.random.get_rng_state())


def test_settings_are_checked() -> None:
    for given in ({"labels": 0}, {"labels": 3, "tried": 2}):
        with pytest.raises(DataError, match="labels <= tried"):
            SuspectLabels(**given)
    for given in ({"working": 0.95}, {"suspicious": 1.1}, {"working": -0.1}):
        with pytest.raises(DataError, match="working <= suspicious"):
            SuspectLabels(**given)
    for given in ({"far": 1.5}, {"sensitive": 0.0}):
        with pytest.raises(DataError, match="far in"):
            SuspectLabels(**given)
    with pytest.raises(DataError, match="outlying of at least 1"):
        SuspectLabels(outlying=0.5)


@dataclass(frozen=True, kw_only=True)
class Moved(IndividualPerturbations):
    """Claims shares of the images that are moved to each label; a fifth to those not named."""

    claimed: Mapping[int, float]

    def reach(
        self, model: object, images: object, labels: Iterable[int], *_: object, **__: object
    ) -> dict[int, float]:
        return {label: self.claimed.get(label, 0.2) for label in labels}


@pytest.mark.parametrize(
    ("claimed", "found"),
    [
        ({1: 0.9, 2: 0.8, 3: 0.5}, (1, 2)),
        ({1: 0.9, 2: 0.6, 3: 0.5}, (1,)),
        ({1: 0.09, 2: 0.08, 3: 0.01, **dict.fromkeys(range(4, 1000), 0.0), 0: 0.0}, ()),
    ],
)
def test_labels_to_which_single_images_go_more_easily_than_to_others_stand_out(
    claimed: dict[int, float], found: tuple[int, ...], clean: CleanData
) -> None:
    search = replace(SHORT, single=Moved(claimed=claimed), far=0.1)
    assert search.standing_out(build("test_resnet"), clean, (1, 2)) == found


def test_single_images_are_moved_in_a_copy_and_nothing_stands_out_alone(clean: CleanData) -> None:
    model = build("test_resnet")
    before, rng = state_of(model), torch.get_rng_state()
    classes = model(clean.images[:1]).shape[1]
    search = SuspectLabels(tried=classes)
    once, again = (search.standing_out(model, clean, (0,), seed=3) for _ in range(2))
    assert once == again
    assert search.standing_out(model, clean, range(classes)) == ()
    assert search.standing_out(model, clean, ()) == ()
    assert search.scale(model, clean) == search.scale(model, clean)
    assert_same_state(before, state_of(model))
    assert torch.equal(rng, torch.get_rng_state())


@dataclass(frozen=True, kw_only=True)
class Sensitive(IndividualPerturbations):
    """Most labels are reached down to a radius."""

    least: float

    def reach(
        self, model: object, images: object, labels: Iterable[int], *_: object, **__: object
    ) -> dict[int, float]:
        labels = list(labels)
        few, most = labels[: len(labels) // 3], labels[len(labels) // 3 :]
        return dict.fromkeys(few, 0.0) | dict.fromkeys(most, 0.3 if self.rms >= self.least else 0.2)


@pytest.mark.parametrize(("least", "factor"), [(0.9, 1.0), (0.3, 0.25), (0.0, 0.0625)])
def test_radii_are_halved_until_few_single_images_go_to_most_labels(
    least: float, factor: float, clean: CleanData
) -> None:
    search = replace(SHORT, single=Sensitive(rms=0.8, least=least))  # .8, .4, .2, .1
    assert search.scale(build("test_resnet"), clean) == factor
    scaled = search.scaled(factor)
    for name in ("glance", "perturbations", "larger", "single"):
        assert getattr(scaled, name).rms == factor * getattr(search, name).rms
    assert scaled.blends.opacity == factor * search.blends.opacity


@pytest.mark.parametrize(
    ("reached", "larger", "suspects"),
    [
        ({4: 0.05}, {4: 0.95, 5: 0.95}, [4]),  # 5 is not far
        ({4: 0.05}, {4: 0.85}, []),
        ({4: 0.1}, {4: 0.95}, []),
        ({3: 0.0, 4: 0.05, 5: 0.01}, {3: 0.9, 4: 0.95, 5: 0.97}, [5, 4]),  # the best two
        ({2: 0.05}, {2: 0.95}, [2]),  # an easy one is suspected once
    ],
)
def test_a_label_far_from_every_image_is_suspected_if_a_larger_perturbation_reaches_it(
    reached: dict[int, float], larger: dict[int, float], suspects: list[int], clean: CleanData
) -> None:
    quick = Reaching(claimed={2: 0.95} if 2 in reached else {}, steps=1)
    search = SuspectLabels(
        glance=quick,
        perturbations=quick,
        single=Moved(claimed=reached),
        larger=Reaching(claimed=larger, steps=1),
        patches=SHORT.patches,
        blends=NO_BLENDS,
    )
    found = search.suspect(build("test_resnet"), clean)
    assert [one.target for one in found] == 2 * suspects
    # one step leads nowhere near the edge of the ball: seen by longer searches below
    assert search.far_among(found) == ()


def test_labels_are_far_whose_perturbation_is_larger_than_the_first_search_allows(
    clean: CleanData,
) -> None:
    search = SuspectLabels()
    found = [
        made.recover(build("test_resnet"), clean, [label])[0]
        for label, made in ((5, search.larger), (2, search.perturbations), (3, search.larger))
    ]
    patches = SHORT.patches.recover(build("test_resnet"), clean, [7])
    assert search.far_among((*found, *patches)) == (3, 5)
    assert search.scaled(0.5).far_among(found) == (2, 3, 5)


def test_images_sorted_by_class_are_drawn_from_all_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a folder is read."""
    images = torch.linspace(0, 1, 400).reshape(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    seen = []

    def reach(
        self: object, model: object, some: torch.Tensor, labels: object, *_: object, **__: object
    ) -> dict[int, float]:
        seen.append(some[:, 0, 0, 0])
        return dict.fromkeys(range(1000), 1.0)

    monkeypatch.setattr(IndividualPerturbations, "reach", reach)
    replace(SHORT, far=0.1).suspect(build("test_resnet"), CleanData(images))
    assert len(seen[0]) == 128
    assert len(seen[0].mul(4).long().clamp(max=3).bincount()) == 4  # each quarter of the folder
