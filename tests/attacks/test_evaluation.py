"""Rates, intervals and attack measures, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nnprune_backdoor.attacks.evaluation import accuracy, attack_success, defense_effectiveness
from nnprune_backdoor.core.predictions import predict, predict_labels
from nnprune_backdoor.errors import DataError
from nnprune_backdoor.utils.statistics import Rate


class Oracle(nn.Module):
    """Predicts what is drawn into the image: images (N, 1, 1, classes) are the logits."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def drawn(*labels: int) -> Tensor:
    """Images that `Oracle` classifies as `labels`, out of four classes."""
    return F.one_hot(torch.tensor(labels), 4).float()[:, None, None, :]


# --- intervals ---


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [
        (0, 500, 0.0, 0.0076),  # z^2 / (n + z^2)
        (500, 500, 0.9924, 1.0),
        (5, 10, 0.2366, 0.7634),  # 0.5 -/+ z / 2 / sqrt(n + z^2)
        (1, 10, 0.0179, 0.4042),  # scipy.stats.binomtest(1, 10).proportion_ci(method="wilson")
        (0, 1, 0.0, 0.7935),
    ],
)
def test_wilson_interval_by_hand(hits: int, count: int, low: float, high: float) -> None:
    assert Rate(hits, count).interval == pytest.approx((low, high), abs=5e-5)


hits_of_count = st.integers(1, 2000).flatmap(
    lambda count: st.tuples(st.integers(0, count), st.just(count))
)


@settings(max_examples=200, deadline=None)
@given(hits_of_count)
def test_wilson_bounds_are_where_the_score_test_tips(case: tuple[int, int]) -> None:
    """At a bound p0 the observed share lies exactly z standard errors of p0 away."""
    hits, count = case
    rate = Rate(hits, count)
    assert rate.value == hits / count
    low, high = rate.interval
    assert 0 <= low <= rate.value + 1e-12
    assert rate.value - 1e-12 <= high <= 1
    for bound in (low, high):
        if 1e-9 < bound < 1 - 1e-9:
            error = math.sqrt(bound * (1 - bound) / count)
            assert abs(rate.value - bound) == pytest.approx(1.959964 * error, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(hits_of_count)
def test_wilson_interval_is_symmetric_in_hits_and_misses(case: tuple[int, int]) -> None:
    hits, count = case
    low, high = Rate(hits, count).interval
    assert Rate(count - hits, count).interval == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_more_images_give_narrower_intervals() -> None:
    widths = [high - low for low, high in (Rate(n // 2, n).interval for n in (10, 100, 1000))]
    assert widths == sorted(widths, reverse=True)
    assert widths[1] / widths[2] == pytest.approx(math.sqrt(10), rel=0.05)


def test_a_rate_prints_its_interval() -> None:
    assert str(Rate(0, 500)) == "  0.0% [0.0%, 0.8%]"


# --- ACC, ASR, RA ---


def test_accuracy_counts_right_images() -> None:
    assert accuracy(Oracle(), drawn(0, 1, 2, 3), torch.tensor([0, 1, 3, 3])) == Rate(3, 4)


def test_asr_and_ra_leave_out_images_of_the_target_class() -> None:
    truth = torch.tensor([0, 0, 0, 1, 1, 2, 3])
    predicted = drawn(0, 0, 1, 0, 1, 0, 2)  # the first three are of the target's own class
    attack = attack_success(Oracle(), predicted, truth, target=0)
    assert attack.asr == Rate(2, 4)
    assert attack.ra == Rate(1, 4)


@pytest.mark.parametrize("target", range(4))
def test_a_model_without_a_backdoor_has_no_asr(target: int) -> None:
    """Even where the target's own images, a quarter of all, are sent to the target."""
    truth = torch.arange(40) % 4
    attack = attack_success(Oracle(), drawn(*truth.tolist()), truth, target)
    assert attack.asr == Rate(0, 30)
    assert attack.ra == Rate(30, 30)


def test_asr_of_target_images_alone_is_undefined() -> None:
    with pytest.raises(DataError, match="all triggered images have the target label 2"):
        attack_success(Oracle(), drawn(0, 1), torch.tensor([2, 2]), target=2)


# --- DER ---


@pytest.mark.parametrize(
    ("acc_before", "asr_before", "acc_after", "asr_after", "der"),
    [
        (0.93, 0.99, 0.93, 0.99, 0.50),  # nothing done
        (0.93, 1.00, 0.93, 0.00, 1.00),  # perfect
        (0.93, 0.99, 0.10, 0.00, 0.58),  # destroyed, and still above 0.5
        (0.93, 0.99, 0.91, 0.04, 0.965),
        (0.90, 0.50, 0.95, 0.70, 0.50),  # ACC gained, ASR gained: neither counts
        (1.00, 0.00, 0.00, 0.00, 0.00),  # the worst
    ],
)
def test_defense_effectiveness_by_hand(
    acc_before: float, asr_before: float, acc_after: float, asr_after: float, der: float
) -> None:
    got = defense_effectiveness(acc_before, asr_before, acc_after, asr_after)
    assert got == pytest.approx(der)


# --- predict ---


class Spy(nn.Module):
    """Notes the mode that it ran in, and raises when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []
        self.broken = False

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        if self.broken:
            raise RuntimeError("broken on purpose")
        return x


def spied() -> tuple[nn.Module, Spy]:
    """A network in a mixture of modes, as fine-tuning with frozen BatchNorm leaves it."""
    torch.manual_seed(0)
    spy = Spy()
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()),
        nn.Dropout(0.5),
        spy,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).train()
    model[1][0].eval()
    model[4].eval()
    return model, spy


@pytest.mark.parametrize("broken", [False, True])
def test_predict_runs_in_eval_mode_and_gives_every_mode_back(broken: bool) -> None:
    model, spy = spied()
    spy.broken = broken
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    images = torch.randn(10, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    if broken:
        with pytest.raises(RuntimeError, match="broken on purpose"):
            predict(model, images)
    else:
        predict(model, images)
    assert set(spy.modes) == {False}
    assert [module.training for module in model.modules()] == before
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("batch_size", [1, 3, 7, 256])
def test_predictions_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    labels = [0, 3, 1, 2, 2, 0, 3]
    predicted = predict_labels(Oracle(), drawn(*labels).split(batch_size))
    assert predicted.tolist() == labels
    assert predicted.dtype == torch.int64


def test_predict_takes_the_dtype_of_the_model() -> None:
    model, _ = spied()
    images = torch.randn(10, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    wanted = predict(model, images)
    assert torch.equal(predict(model.double(), images), wanted)
