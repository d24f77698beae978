"""Trigger recovery and TAC, on networks whose backdoor is written by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.handmade import (
    MEAN,
    QUICK,
    SIZE,
    STD,
    TAC_QUICK,
    TRIGGER,
    Breaks,
    Handmade,
    pictures,
    pixels_of,
)
from helpers.images import generator
from helpers.states import assert_same_state, hooks_of, state_of
from nnprune_backdoor import CleanData
from nnprune_backdoor.core.recovered import PixelRange, RecoveredTrigger
from nnprune_backdoor.core.scores import ChannelScores
from nnprune_backdoor.core.sites import find_sites
from nnprune_backdoor.criteria import TAC, ActivationChange, Response
from nnprune_backdoor.criteria.tac import activation_change
from nnprune_backdoor.errors import DataError, ScoringError, UnsupportedModelError
from nnprune_backdoor.triggers import (
    Inversion,
    TargetEvidence,
    UniversalBlend,
    UniversalPerturbation,
)


@pytest.fixture
def model() -> Handmade:
    torch.manual_seed(0)
    return Handmade(3, target=1).eval()


@pytest.fixture
def images() -> CleanData:
    return pictures(3)


def test_the_handmade_network_is_what_it_says(model: Handmade, images: CleanData) -> None:
    with torch.no_grad():
        assert torch.equal(model(images.images).argmax(1), images.targets)
        stamped = images.images.clone()
        board = (torch.arange(9).reshape(3, 3) % 2 == 0).float()
        stamped[:, :, 4:7, 8:11] = (board - MEAN) / STD
        assert (model(stamped).argmax(1) == 1).all()


# ---- the range of pixels ------------------------------------------------------------------------


def test_the_range_of_normalised_pixels() -> None:
    pixels = PixelRange.normalised((0.5, 0.0), (0.5, 2.0))
    assert torch.equal(pixels.low.flatten(), torch.tensor([-1.0, 0.0]))
    assert torch.equal(pixels.high.flatten(), torch.tensor([1.0, 0.5]))
    assert pixels.low.shape == pixels.high.shape == (2, 1, 1)


def test_an_unknown_normalisation_is_read_off_the_images(images: CleanData) -> None:
    seen = PixelRange.seen_in(images.images)
    assert torch.equal(seen.low.flatten(), images.images.transpose(0, 1).flatten(1).min(1).values)
    assert torch.equal(seen.high.flatten(), images.images.transpose(0, 1).flatten(1).max(1).values)
    seen.check(images.images)


@pytest.mark.parametrize(
    ("mean", "std"), [((0.5,), (0.5, 0.5)), ((), ()), ((0.5,), (0.0,)), ((0.5,), (-1.0,))]
)
def test_a_normalisation_that_is_none_is_refused(mean: Any, std: Any) -> None:
    with pytest.raises(DataError, match="mean and positive std"):
        PixelRange.normalised(mean, std)


def test_a_wrong_normalisation_is_noticed(model: Handmade, images: CleanData) -> None:
    wrong = PixelRange.normalised([0.5] * 3, [0.5] * 3)
    with pytest.raises(DataError, match=r"valid pixels span \[-1\.00, 1\.00\]"):
        QUICK.recover(model, images, [1], pixels=wrong)
    with pytest.raises(DataError, match=r"1 channels.*got 3"):
        QUICK.recover(model, images, [1], pixels=pixels_of(1))


def test_stamping_commutes_with_normalisation() -> None:
    mean, std = torch.rand(3, 1, 1), torch.rand(3, 1, 1) + 0.2
    pixels, mask, pattern = torch.rand(4, 3, 8, 8), torch.rand(1, 8, 8), torch.rand(3, 8, 8)
    trigger = RecoveredTrigger(0, mask, (pattern - mean) / std, 1.0, 4, 1)
    blended = ((1 - mask) * pixels + mask * pattern - mean) / std
    torch.testing.assert_close(trigger((pixels - mean) / std), blended)
    half = trigger(pixels.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert trigger.norm == pytest.approx(mask.sum().item())


# ---- recovery -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0, 2])
def test_the_target_has_the_smallest_trigger(images: CleanData, target: int) -> None:
    torch.manual_seed(0)
    model = Handmade(3, target).eval()
    triggers = QUICK.recover(model, images, pixels=pixels_of(3))
    assert [trigger.target for trigger in triggers] == [0, 1, 2]
    evidence = TargetEvidence.of(triggers)
    assert evidence.target == target
    assert max(evidence.anomaly) == evidence.anomaly[target]
    found = triggers[target]
    assert found.success > 0.9
    assert found.tested > 5
    assert found.norm < 20 < min(t.norm for t in triggers if t.target != target)
    others = images.images[images.targets != target]
    with torch.no_grad():
        assert (model(found(others)).argmax(1) == target).float().mean() > 0.9


@pytest.mark.parametrize("target", [0, 1])
def test_two_classes_and_greyscale(target: int) -> None:
    torch.manual_seed(0)
    model, images = Handmade(1, target).eval(), pictures(1)
    evidence = TargetEvidence.of(QUICK.recover(model, images))
    assert evidence.target == target
    assert evidence.triggers[target].pattern.shape == (1, SIZE, SIZE)
    assert all(torch.isfinite(torch.tensor(evidence.anomaly)))


def test_stamped_images_are_valid_pictures(model: Handmade, images: CleanData) -> None:
    pixels = pixels_of(3)
    for trigger in replace(QUICK, steps=20).recover(model, images, pixels=pixels):
        assert trigger.mask.shape == (1, SIZE, SIZE)
        assert trigger.pattern.shape == (3, SIZE, SIZE)
        assert trigger.mask.min() >= 0
        assert trigger.mask.max() <= 1
        stamped = trigger(images.images) * STD + MEAN
        assert stamped.min() > -1e-5
        assert stamped.max() < 1 + 1e-5
        assert 0 < trigger.steps <= 20


def test_a_label_does_not_depend_on_its_company(model: Handmade, images: CleanData) -> None:
    quick = replace(QUICK, steps=40)
    together = quick.recover(model, images)
    (alone,) = quick.recover(model, images, [1])
    torch.testing.assert_close(alone.mask, together[1].mask, rtol=0, atol=1e-3)
    torch.testing.assert_close(alone.pattern, together[1].pattern, rtol=0, atol=1e-2)


def test_many_labels_are_worked_on_in_groups(images: CleanData) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 25))
    triggers = replace(QUICK, steps=2).recover(model, images)  # 8 labels of 32 images a pass
    assert [trigger.target for trigger in triggers] == list(range(25))


def test_the_same_seed_gives_the_same_trigger(model: Handmade, images: CleanData) -> None:
    quick = replace(QUICK, steps=10)
    (first,) = quick.recover(model, images, [1], seed=3)
    torch.rand(1)
    (again,) = quick.recover(model, images, [1], seed=3)
    (other,) = quick.recover(model, images, [1], seed=4)
    assert torch.equal(first.mask, again.mask)
    assert torch.equal(first.pattern, again.pattern)
    assert not torch.equal(first.mask, other.mask)


def test_labels_are_not_looked_at(model: Handmade, images: CleanData) -> None:
    garbage = CleanData(images.images, torch.randint(3, (len(images),), generator=generator()))
    for quick in (replace(QUICK, steps=10),):
        (given,) = quick.recover(model, images, [1])
        for other in (garbage, CleanData(images.images)):
            (found,) = quick.recover(model, other, [1])
            assert torch.equal(given.mask, found.mask)
            assert torch.equal(given.pattern, found.pattern)


def test_a_heavier_penalty_gives_a_smaller_mask(model: Handmade, images: CleanData) -> None:
    sizes = []
    for penalty in (1e-4, 1e-2, 1.0):
        fixed = replace(QUICK, steps=40, penalty=penalty, patience=40)
        sizes.append(fixed.recover(model, images, [0])[0].norm)
    assert sizes[0] > sizes[1] > sizes[2]


def test_the_penalty_scales_with_the_resolution() -> None:
    """A model that sees the mean colour alone has a trigger of the same share at any size."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[9.0] * 3, [-9.0] * 3]))
        model[2].bias.zero_()
    shares = []
    for size in (4, 24):
        clean = CleanData(
            -torch.rand(40, 3, 1, 1, generator=generator()).expand(-1, -1, size, size)
        )
        black_to_white = PixelRange(torch.full((3, 1, 1), -1.0), torch.ones(3, 1, 1))
        fixed = replace(QUICK, penalty=0.002, patience=150)
        shares.append(fixed.recover(model, clean, [0], pixels=black_to_white)[0].mask.mean())
    assert 0.2 < shares[0] < 0.8
    assert abs(shares[0] - shares[1]) < 0.1


def test_a_trigger_that_does_not_converge_is_returned_as_it_is(
    model: Handmade, images: CleanData
) -> None:
    (trigger,) = Inversion(steps=1, batch_size=8).recover(model, images, [0])
    assert trigger.steps == 1
    assert 0 <= trigger.success < 1
    assert TargetEvidence.of([trigger], min_success=1.0).target is None


def test_a_label_that_every_image_already_has(model: Handmade, images: CleanData) -> None:
    only = images.take((images.targets == 1).nonzero().flatten())
    (trigger,) = replace(QUICK, steps=5).recover(model, only, [1])
    assert (trigger.success, trigger.tested) == (0.0, 0)
    assert torch.isfinite(trigger.mask).all()


def test_a_label_without_images_can_be_asked_for(model: Handmade, images: CleanData) -> None:
    rest = images.take((images.targets != 1).nonzero().flatten())
    (trigger,) = QUICK.recover(model, rest, [1])
    assert trigger.success > 0.9


def test_nan_raises(images: CleanData) -> None:
    model = Breaks(images.images.mean((1, 2, 3)).max().item() + 1e-3).eval()
    with pytest.raises(ScoringError, match=r"trigger recovery diverged after \d+ steps"):
        QUICK.recover(model, images, [2])
    with pytest.raises(ScoringError, match="trigger recovery diverged"):
        TAC(**TAC_QUICK)(model, images)


def test_bad_requests_are_refused(model: Handmade, images: CleanData) -> None:
    for label in (-1, 3):
        with pytest.raises(DataError, match=r"labels in \[0, 3\)"):
            QUICK.recover(model, images, [label])
    with pytest.raises(DataError, match="too few to split"):
        QUICK.recover(model, CleanData(images.images[:2]), [1])
    for setting in ("steps", "batch_size", "patience"):
        with pytest.raises(DataError, match=setting):
            Inversion(**{setting: 0})


def test_the_model_is_left_as_it_was(model: Handmade, images: CleanData) -> None:
    model.train()
    model.head.eval()
    model.conv.weight.requires_grad_(False)
    before, hooks = state_of(model), hooks_of(model)
    with torch.no_grad():
        replace(QUICK, steps=3).recover(model, images)
    assert_same_state(before, model.state_dict())
    assert hooks_of(model) == hooks
    assert (model.training, model.conv.training, model.head.training) == (True, True, False)
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- which label --------------------------------------------------------------------------------


def made(label: int, norm: float, success: float = 1.0) -> RecoveredTrigger:
    return RecoveredTrigger(
        label, torch.full((1, 10, 10), norm / 100), torch.zeros(3, 10, 10), success, 20, 7
    )


def test_the_evidence_is_the_log_size_in_robust_deviations() -> None:
    evidence = TargetEvidence.of([made(i, 2.0**n) for i, n in enumerate((4, 5, 0, 6, 3))])
    assert evidence.target == 2
    assert evidence.sizes == pytest.approx((16, 32, 1, 64, 8))
    # exponents: median 4, absolute deviations 0 1 4 2 1 with median 1
    expected = [deviation / 1.4826 for deviation in (0, -1, 4, -2, 1)]
    assert evidence.anomaly == pytest.approx(expected, abs=1e-5)


def test_a_trigger_that_does_not_work_counts_as_the_whole_image() -> None:
    evidence = TargetEvidence.of([made(0, 1.0, 0.2), made(1, 30.0), made(2, 9.0, 0.7)])
    assert evidence.sizes == pytest.approx((100, 30, 100))
    assert evidence.target == 1
    assert evidence.trigger is evidence.triggers[1]
    assert evidence.anomaly[1] > evidence.anomaly[0] == evidence.anomaly[2]


def test_evidence_without_any_difference() -> None:
    alike = TargetEvidence.of([made(label, 5.0) for label in range(4)])
    assert alike.anomaly == (0, 0, 0, 0)
    none = TargetEvidence.of([made(label, 5.0, 0.1) for label in range(4)])
    assert none.trigger is none.target is None
    assert none.anomaly == (0, 0, 0, 0)


# ---- TAC ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ranking", [Response(stages=20), ActivationChange()])
@pytest.mark.parametrize("colours", [1, 3])
def test_the_trigger_neuron_comes_first(ranking: Any, colours: int) -> None:
    torch.manual_seed(0)
    model, images = Handmade(colours, target=1).eval(), pictures(colours)
    scores = TAC(ranking=ranking, **TAC_QUICK)(model, CleanData(images.images))
    assert scores.details["target"] == 1
    assert scores.ranking()[0] == ("conv", TRIGGER)
    assert scores.details["trigger"]["success"] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("ranking", [Response(stages=20), ActivationChange()])
def test_labels_change_nothing(model: Handmade, images: CleanData, ranking: Any) -> None:
    tac = TAC(ranking=ranking, **{**TAC_QUICK, "search_steps": 60, "steps": 60}, min_success=0.1)
    given = tac(model, images)
    garbage = CleanData(images.images, torch.randint(3, (len(images),), generator=generator()))
    assert torch.equal(given.flat, tac(model, garbage).flat)
    assert torch.equal(given.flat, tac(model, CleanData(images.images)).flat)


def test_a_given_target_is_taken_and_nothing_searched(model: Handmade, images: CleanData) -> None:
    scores = TAC(target=1, mean=(MEAN,) * 3, std=(STD,) * 3, **TAC_QUICK)(model, images)
    assert scores.details["target"] == 1
    assert "search" not in scores.details
    with pytest.raises(DataError, match=r"labels in \[0, 3\), got \[7\]"):
        TAC(target=7)(model, images)


def test_the_evidence_is_kept_with_the_scores(
    model: Handmade, images: CleanData, tmp_path: Path
) -> None:
    scores = TAC(**TAC_QUICK)(model, images)
    assert {key: len(value) for key, value in scores.details["search"].items()} == {
        "sizes": 3,
        "success": 3,
        "anomaly": 3,
    }
    json.dumps(scores.details)
    scores.save(tmp_path / "scores.safetensors")
    loaded = ChannelScores.load(tmp_path / "scores.safetensors")
    assert loaded.details == scores.details
    (trigger,) = loaded.triggers
    assert trigger.norm == scores.details["trigger"]["norm"]


def test_no_trigger_that_works_is_an_error(model: Handmade, images: CleanData) -> None:
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0.0, 0.0, 5.0]))  # whatever the image
    quick = {**TAC_QUICK, "search_steps": 5, "steps": 5}
    with pytest.raises(ScoringError, match=r"no label has a trigger.*name the target"):
        TAC(**quick)(model, images)
    with pytest.raises(ScoringError, match=r"for label 0 sends 0% of 19.*more steps"):
        TAC(target=0, **quick)(model, images)
    with pytest.raises(ScoringError, match=r"for label 2 sends 0% of 0.*of other classes"):
        TAC(target=2, **quick)(model, images)


def test_images_of_the_target_alone_are_an_error(model: Handmade, images: CleanData) -> None:
    only = CleanData(images.images[images.targets == 1])
    with pytest.raises(ScoringError, match="images of other classes"):
        TAC(target=1, min_success=0, **TAC_QUICK)(model, only)


def test_half_a_normalisation_is_refused() -> None:
    with pytest.raises(DataError, match="both mean and std"):
        TAC(mean=(0.5,))


def test_the_change_is_in_units_of_the_clean_spread(model: Handmade, images: CleanData) -> None:
    trigger = RecoveredTrigger(
        1, torch.rand(1, SIZE, SIZE, generator=generator()), torch.ones(3, SIZE, SIZE), 1.0, 1, 1
    )
    sites = find_sites(model, images.images[:2])
    found = activation_change(model, images, trigger, sites)
    with torch.no_grad():
        before, after = (
            model.conv(x * STD + MEAN).transpose(0, 1).flatten(1)
            for x in (images.images, trigger(images.images))
        )
    expected = (after - before).square().mean(1).sqrt() / before.std(1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_neuron_that_the_trigger_wakes_has_changed_most() -> None:
    """Linear layers have their channels last; one that is constant on clean images counts."""
    model = nn.Sequential(nn.Flatten(2), nn.Linear(4, 6), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2))
    images = CleanData(torch.rand(8, 3, 2, 2, generator=generator()))
    with torch.no_grad():
        model[1].weight[3] = 0
        model[1].weight[3, 0] = 1e-3
        model[1].bias.zero_()
    images.images[..., 0, 0] = 0.5
    trigger = RecoveredTrigger(
        0, torch.tensor([[[1.0, 0], [0, 0]]]), torch.ones(3, 2, 2), 1.0, 8, 1
    )
    found = activation_change(model, images, trigger, find_sites(model, images.images[:2]))
    assert found.shape == (6,)
    assert found.argmax() == 3


def test_a_shuffling_loader_leaves_the_global_generator_alone(
    model: Handmade, images: CleanData
) -> None:
    data = TensorDataset(images.images, images.targets)
    loader = DataLoader(data, batch_size=32, shuffle=True)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    Inversion(steps=2, batch_size=8).recover(model, loader, [1])
    assert torch.equal(torch.get_rng_state(), before)


# ---- labels, seeds and models of any kind -------------------------------------------------------

SEARCHES = [replace(QUICK, steps=3), UniversalPerturbation(steps=3), UniversalBlend(steps=3)]


@pytest.mark.parametrize("search", SEARCHES, ids=["mask", "universal", "blend"])
def test_integers_of_any_kind_are_labels_and_seeds(
    search: Any, model: Handmade, images: CleanData
) -> None:
    wanted = search.recover(model, images, [1, 0], seed=4)
    for labels in (np.array([1, 0]), torch.tensor([1, 0]), (np.uint8(1), torch.tensor(0))):
        found = search.recover(model, images, labels, seed=np.int64(4))
        assert [type(one.target) for one in found] == [int, int]
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one.pattern, other.pattern)


@pytest.mark.parametrize("search", SEARCHES, ids=["mask", "universal", "blend"])
@pytest.mark.parametrize("labels", [0, torch.tensor(0), ["0"], [0.0], "01", [[0]], [-1], [1, True]])
def test_what_is_no_list_of_labels_is_refused(
    search: Any, model: Handmade, images: CleanData, labels: Any
) -> None:
    with pytest.raises(DataError, match="label"):
        search.recover(model, images, labels)


class Counts(Handmade):
    """Counts its passes in a buffer."""

    def __init__(self) -> None:
        super().__init__(3, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("search", SEARCHES, ids=["mask", "universal", "blend"])
def test_buffers_are_left_as_they_were(search: Any, images: CleanData) -> None:
    model = Counts().eval()
    search.recover(model, images, [0])
    assert model.calls == 0


def test_what_is_no_model_is_refused(model: Handmade, images: CleanData) -> None:
    for search in SEARCHES:
        with pytest.raises(UnsupportedModelError, match="load_state_dict"):
            search.recover(model.state_dict(), images)
