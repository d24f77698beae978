"""Selectors: laws that hold for any scores, and amounts worked out by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression
from torch import Tensor

from nnprune_backdoor import Selector, create_selector, list_selectors
from nnprune_backdoor.core.held_out import HeldOut
from nnprune_backdoor.core.scores import ChannelScores, Selection
from nnprune_backdoor.core.sites import Neuron, Site
from nnprune_backdoor.errors import DataError, UnknownNameError
from nnprune_backdoor.selectors import (
    AccuracyBudget,
    BelowThreshold,
    LowestCount,
    LowestFraction,
    Outlier,
)
from nnprune_backdoor.utils.statistics import isotonic, paired_drop

quick = settings(max_examples=80, deadline=None)


def scored(values: Sequence[float] | Tensor, *channels: int) -> ChannelScores:
    """Scores of sites "z", "y", ... (names run against site order), by default of one site."""
    flat = torch.as_tensor(values, dtype=torch.float32)
    names = "zyxwvutsrqponmlkjihgfedcba"
    sizes = channels or (len(flat),)
    sites = tuple(Site(name, n, "norm", name) for name, n in zip(names, sizes, strict=False))
    return ChannelScores(sites, flat, "test")


@st.composite
def any_scores(draw: st.DrawFn) -> ChannelScores:
    """One to six sites of one to eight channels; half of the time with many ties."""
    channels = draw(st.lists(st.integers(1, 8), min_size=1, max_size=6))
    value = draw(st.sampled_from([st.sampled_from([0.0, 0.25, 1.0]), st.floats(0, 1, width=32)]))
    count = sum(channels)
    return scored(draw(st.lists(value, min_size=count, max_size=count)), *channels)


class Lossy(HeldOut):
    """Held-out images of which `lost(neurons gone)` are got wrong, the first ones first."""

    def __init__(self, count: int, lost: Callable[[int], int]) -> None:
        self.count, self.lost, self.progress = count, lost, False
        self.asked: list[int] = []

    def correct(self, selection: Selection) -> Tensor:
        self.asked.append(len(selection))
        return torch.arange(self.count) >= self.lost(len(selection))


# --- laws of all selectors ---

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "below": [{"threshold": t} for t in (-1.0, 0.0, 0.25, 2.0)],
    "count": [{"count": k} for k in (0, 1, 5, 10_000)],
    "fraction": [{"fraction": f} for f in (0.0, 0.3, 1.0)],
    "outlier": [{}, {"deviations": 0.5}, {"deviations": 0.0}],
    "accuracy": [{}, {"max_fraction": 1.0, "max_drop": 0.5}],
}
SELECTORS = [create_selector(name, **given) for name in SETTINGS for given in SETTINGS[name]]


def test_every_registered_selector_is_under_test() -> None:
    # these need a network that obeys a trigger: test_trigger_selection.py, test_diagnosis.py
    elsewhere = ["auto", "trigger"]
    assert sorted([*SETTINGS, *elsewhere]) == list_selectors()


@pytest.mark.slow
@pytest.mark.parametrize("selector", SELECTORS, ids=repr)
@quick
@given(any_scores())
def test_laws_of_every_selector(selector: Selector, scores: ChannelScores) -> None:
    selection = selector(scores, Lossy(100, lambda neurons: neurons // 3))
    assert selection.sites == scores.sites
    chosen = set(selection.neurons)
    assert len(chosen) == len(selection), "a neuron was selected twice"

    gone = {name: len(channels) for name, channels in selection.by_site().items()}
    for site in scores.sites:
        assert gone.get(site.name, 0) < site.channels, "a site lost its last channel"

    # in the order of the ranking, so ties go by site order, then channel; nothing is passed over
    # but the last channel of a site
    ranking = scores.ranking()
    assert selection.neurons == tuple(neuron for neuron in ranking if neuron in chosen)
    last = max((ranking.index(neuron) for neuron in chosen), default=0)
    sizes = {site.name: site.channels for site in scores.sites}
    for neuron in ranking[:last]:
        assert neuron in chosen or gone.get(neuron.site, 0) == sizes[neuron.site] - 1

    # where the scores lie in memory is of no consequence
    strided = torch.stack([scores.flat, -scores.flat], dim=1)[:, 0]
    again = selector(
        ChannelScores(scores.sites, strided, "test"), Lossy(100, lambda neurons: neurons // 3)
    )
    assert again.neurons == selection.neurons
    assert selection.reason


def test_ties_go_by_site_order_then_channel() -> None:
    scores = scored([0.5, 0.1, 0.5, 0.1, 0.5, 0.1], 3, 3)
    assert LowestCount(4)(scores).neurons == (
        Neuron("z", 1),
        Neuron("y", 0),
        Neuron("y", 2),
        Neuron("z", 0),
    )


def test_a_count_may_be_any_kind_of_integer() -> None:
    scores = scored([0.5, 0.1, 0.3], 3)
    assert LowestCount(torch.tensor(2))(scores).neurons == LowestCount(2)(scores).neurons  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"expected count to be an integer, got 2\.5"):
        LowestCount(2.5)  # type: ignore[arg-type]


def test_a_last_channel_is_passed_over_for_the_next_neuron() -> None:
    scores = scored([0.0, 0.1, 0.2, 0.3, 0.4, 0.5], 1, 2, 3)
    wanted = (Neuron("y", 0), Neuron("x", 0), Neuron("x", 1))
    assert LowestCount(3)(scores).neurons == wanted
    assert LowestCount(6)(scores).neurons == wanted, "one channel of each site must stay"


# --- BelowThreshold ---


@quick
@given(any_scores(), st.floats(-0.5, 1.5), st.floats(-0.5, 1.5))
def test_a_higher_threshold_selects_no_less(scores: ChannelScores, a: float, b: float) -> None:
    few, many = BelowThreshold(min(a, b))(scores), BelowThreshold(max(a, b))(scores)
    assert many.neurons[: len(few)] == few.neurons


@quick
@given(any_scores(), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_nothing_above_the_threshold_goes(scores: ChannelScores, threshold: float) -> None:
    """Also where a site's last channel, which must stay, is below it."""
    selection = BelowThreshold(threshold)(scores)
    below = {name: int((values <= threshold).sum()) for name, values in scores.by_site().items()}
    for site, channels in selection.by_site().items():
        assert all(float(scores[site][channel]) <= threshold for channel in channels)
    assert {name: len(channels) for name, channels in selection.by_site().items()} == {
        site.name: min(below[site.name], site.channels - 1)
        for site in scores.sites
        if min(below[site.name], site.channels - 1)
    }


def test_nothing_above_the_threshold_goes_by_hand() -> None:
    scores = scored([0.0, 0.9, 0.9, 0.9], 1, 3)
    assert BelowThreshold(0.5)(scores).neurons == ()


def test_golden_counts_of_a_mask_file() -> None:
    """4800 masks of a ResNet-18 with the counts of RNP's published file (<=, 0.00 to 0.90)."""
    thresholds = [round(0.05 * step, 2) for step in range(19)]
    golden = [12, 14, 18, 21, 24, 28, 32, 41, 49, 57, 68, 82, 107, 145, 204, 263, 365, 524, 753]
    values = [0.0] * golden[0]
    for (below, threshold), (fewer, more) in zip(
        itertools.pairwise(thresholds), itertools.pairwise(golden), strict=True
    ):
        values.append(threshold)  # exactly at the threshold, which counts
        values += np.linspace(below + 0.001, threshold, more - fewer - 1, endpoint=False).tolist()
    values += np.linspace(0.901, 1.0, 4800 - len(values)).tolist()
    order = torch.randperm(4800, generator=torch.Generator().manual_seed(0))
    scores = scored(torch.tensor(values)[order], *[64] * 5, *[128] * 5, *[256] * 5, *[512] * 5)
    assert [len(BelowThreshold(threshold)(scores)) for threshold in thresholds] == golden


# --- LowestCount, LowestFraction ---


@quick
@given(any_scores(), st.integers(0, 50))
def test_a_larger_count_begins_with_the_smaller(scores: ChannelScores, count: int) -> None:
    few, more = LowestCount(count)(scores), LowestCount(count + 1)(scores)
    assert more.neurons[: len(few)] == few.neurons
    most = len(scores.flat) - len(scores.sites)
    assert len(few) == min(count, most)


@quick
@given(any_scores(), st.floats(0, 1))
def test_a_fraction_is_a_count(scores: ChannelScores, fraction: float) -> None:
    count = round(fraction * len(scores.flat))
    assert LowestFraction(fraction)(scores).neurons == LowestCount(count)(scores).neurons


# --- Outlier ---


def bulk(count: int = 500) -> Tensor:
    return 1 + 0.05 * torch.randn(count, generator=torch.Generator().manual_seed(0)).clamp(
        -2.5, 2.5
    )


@pytest.mark.parametrize("planted", [1, 5, 50])
def test_outlier_finds_what_was_planted(planted: int) -> None:
    """Fifty of 500 would hide themselves from a mean and a standard deviation."""
    flat = bulk()
    places = torch.randperm(500, generator=torch.Generator().manual_seed(1))[:planted]
    flat[places] = 0.5
    selection = Outlier()(scored(flat, 100, 400))
    assert selection.keep().eq(0).nonzero().flatten().tolist() == places.sort().values.tolist()


def test_outlier_finds_planted_ones_among_saturated_masks() -> None:
    """Most masks are exactly 1, so the median absolute deviation is 0."""
    flat = torch.ones(500)
    flat[[3, 77, 400]] = 0.0
    flat[10:40] = 0.99
    selection = Outlier()(scored(flat))
    assert [channel for _, channel in selection.neurons] == [3, 77, 400]


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 1 / 3])
def test_outlier_selects_nothing_where_all_are_alike(value: float) -> None:
    assert len(Outlier()(scored([value] * 60, 20, 40))) == 0


def test_outlier_ignores_high_scores() -> None:
    flat = bulk()
    flat[:5] = 3.0
    assert len(Outlier()(scored(flat))) == 0


@quick
@given(any_scores(), st.floats(0, 4))
def test_only_scores_below_the_median_are_outliers(scores: ChannelScores, width: float) -> None:
    selection = Outlier(width)(scores)
    for site, channel in selection.neurons:
        assert scores[site][channel] < scores.flat.median()


def test_the_neighbour_of_a_last_channel_is_no_outlier() -> None:
    flat = bulk(50)
    flat[0] = 0.0  # the one channel of its site: it must stay, and nothing goes in its place
    assert Outlier()(scored(flat, 1, 49)).neurons == ()


@quick
@given(any_scores(), st.sampled_from([4.0, 1024.0]), st.sampled_from([1.0, 3.0]))
def test_outliers_do_not_depend_on_the_unit(
    scores: ChannelScores, factor: float, deviations: float
) -> None:
    scaled = ChannelScores(scores.sites, scores.flat * factor, "test")
    assert Outlier(deviations)(scaled).neurons == Outlier(deviations)(scores).neurons


# --- isotonic regression ---


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(-8, 8).map(lambda n: n / 8) | st.floats(-1, 1), min_size=1, max_size=30)
)
def test_isotonic_is_the_closest_non_decreasing_sequence(values: list[float]) -> None:
    smooth = isotonic(values)
    assert all(a <= b for a, b in itertools.pairwise(smooth))
    assert math.fsum(smooth) == pytest.approx(math.fsum(values), abs=1e-9)
    assert isotonic(smooth) == smooth
    wanted = IsotonicRegression().fit_transform(np.arange(len(values)), np.array(values))
    assert smooth == pytest.approx(wanted.tolist(), abs=1e-9)


def test_isotonic_by_hand() -> None:
    assert isotonic([1, 3, 2, 4]) == [1, 2.5, 2.5, 4]
    assert isotonic([3, 2, 1]) == [2, 2, 2]
    assert isotonic([]) == []


# --- paired drop ---


def hits(text: str) -> Tensor:
    return torch.tensor([letter == "x" for letter in text])


@pytest.mark.parametrize(
    ("before", "after", "drop", "error"),
    [
        ("xxx.", "x..x", 1 / 4, math.sqrt(4 - 1 / 6) / 6),  # b = 2.5, c = 1.5, n + 2 = 6
        ("xx..", "xx..", 0.0, 1 / 6),  # b = c = 0.5: no flip is no proof
        ("xxxx", "....", 1.0, math.sqrt(5 - 16 / 6) / 6),  # b = 4.5, c = 0.5
        ("....", "xxxx", -1.0, math.sqrt(5 - 16 / 6) / 6),
        ("x", ".", 1.0, math.sqrt(2 - 1 / 3) / 3),
    ],
)
def test_paired_drop_by_hand(before: str, after: str, drop: float, error: float) -> None:
    assert paired_drop(hits(before), hits(after)) == pytest.approx((drop, error))


@quick
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_paired_drop_is_a_difference_of_accuracies(pairs: list[tuple[bool, bool]]) -> None:
    before, after = torch.tensor(pairs).T
    drop, error = paired_drop(before, after)
    assert drop == pytest.approx(float(before.float().mean() - after.float().mean()), abs=1e-6)
    assert error > 0
    assert paired_drop(after, before) == pytest.approx((-drop, error))


# --- AccuracyBudget ---


def tried(selection: Selection) -> list[int]:
    return [point.neurons for point in selection.curve]


def drops(selection: Selection) -> list[float]:
    return [point.drop for point in selection.curve]


@pytest.mark.parametrize("max_drop", [0.0, 0.004, 0.02, 0.05])
def test_the_budget_is_spent_and_not_exceeded(max_drop: float) -> None:
    """Every neuron costs one image of 1000."""
    scores = scored(torch.arange(500.0), 100, 400)
    selection = AccuracyBudget(max_drop=max_drop, points=60)(scores, Lossy(1000, lambda n: n))
    allowed = round(1000 * max_drop)
    assert len(selection) == max(amount for amount in tried(selection) if amount <= allowed)
    assert len(selection) >= 0.85 * allowed, "the amounts tried are too coarse"
    assert drops(selection) == pytest.approx([amount / 1000 for amount in tried(selection)])
    assert selection.neurons == LowestCount(len(selection))(scores).neurons


def test_what_costs_nothing_goes_up_to_max_fraction() -> None:
    scores = scored(torch.arange(500.0), 100, 400)
    selection = AccuracyBudget(max_fraction=0.3)(scores, Lossy(500, lambda _: 0))
    assert len(selection) == 150
    amounts = tried(selection)
    assert amounts[:4] == [0, 1, 2, 3], "dense at the small end"
    assert all(a < b for a, b in itertools.pairwise(amounts))
    assert len(amounts) <= 41


def test_nothing_goes_if_the_first_neuron_breaks_the_budget() -> None:
    held_out = Lossy(1000, lambda neurons: 30 if neurons else 0)
    selection = AccuracyBudget(max_drop=0.02)(scored(torch.arange(500.0)), held_out)
    assert len(selection) == 0
    assert selection.keep().all()


def test_one_noisy_point_does_not_stop_the_search() -> None:
    """Drops of 0, 10, 30, 10, 10 per mille: the last three are 16.7 when smoothed."""
    scores = scored(torch.arange(20.0))  # a fifth of 20 are 4
    loss = [0, 10, 30, 10, 10].__getitem__
    assert len(AccuracyBudget(max_drop=0.02)(scores, Lossy(1000, loss))) == 4
    assert len(AccuracyBudget(max_drop=0.015)(scores, Lossy(1000, loss))) == 1
    assert len(AccuracyBudget(max_drop=0.005)(scores, Lossy(1000, loss))) == 0


def test_confidence_demands_enough_images() -> None:
    """No flip on n images: standard error 1 / (n + 2), so 0.95 needs 1.645 / (n + 2) <= 0.02."""
    scores = scored(torch.arange(20.0))
    sure = AccuracyBudget(max_drop=0.02, confidence=0.95)
    assert len(sure(scores, Lossy(80, lambda _: 0))) == 0
    assert len(sure(scores, Lossy(81, lambda _: 0))) == 4
    assert len(AccuracyBudget(max_drop=0.02)(scores, Lossy(10, lambda _: 0))) == 4


def test_the_search_ends_where_accuracy_has_collapsed() -> None:
    held_out = Lossy(500, lambda neurons: 0 if neurons <= 10 else 400)
    selection = AccuracyBudget()(scored(torch.arange(500.0)), held_out)
    assert len(selection) == 10
    assert sum(amount > 10 for amount in held_out.asked) == 1


curves = st.lists(st.integers(-10, 60), min_size=41, max_size=41)  # images lost, noise and gains
fractions = st.sampled_from([0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3])
sureties = st.sampled_from([0.5, 0.6, 0.8, 0.95, 0.99])


def lossy(curve: list[int]) -> Lossy:
    return Lossy(400, lambda neurons: 20 + curve[neurons])


@quick
@given(curves, fractions, fractions, sureties)
def test_more_budget_never_selects_less(
    curve: list[int], a: float, b: float, confidence: float
) -> None:
    scores = scored(torch.arange(200.0))
    little, much = (
        len(AccuracyBudget(max_drop=drop, confidence=confidence)(scores, lossy(curve)))
        for drop in sorted((a, b))
    )
    assert little <= much


@quick
@given(curves, fractions, sureties, sureties)
def test_more_confidence_never_selects_more(
    curve: list[int], max_drop: float, a: float, b: float
) -> None:
    scores = scored(torch.arange(200.0))
    lax, strict = (
        len(AccuracyBudget(max_drop=max_drop, confidence=confidence)(scores, lossy(curve)))
        for confidence in sorted((a, b))
    )
    assert strict <= lax


def test_accuracy_budget_needs_held_out_images() -> None:
    with pytest.raises(DataError, match="AccuracyBudget needs labelled held-out clean images"):
        AccuracyBudget()(scored(torch.arange(20.0)))


# --- settings and names ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowestCount(-1), "expected a count of at least 0, got -1"),
        (lambda: LowestFraction(1.1), r"expected a fraction in \[0, 1\], got 1.1"),
        (lambda: AccuracyBudget(max_drop=-0.1), r"expected max_drop in \[0, 1\).* got -0.1"),
        (lambda: AccuracyBudget(confidence=0.4), r"confidence in \[0.5, 1\), got 0.02 and 0.4"),
        (lambda: AccuracyBudget(max_fraction=0), r"expected max_fraction in \(0, 1\]"),
        (lambda: AccuracyBudget(points=1), "at least 2 points"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], Selector], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()


def test_names_make_selectors() -> None:
    assert create_selector("below", threshold=0.2) == BelowThreshold(0.2)
    assert create_selector("accuracy") == AccuracyBudget()
    assert list_selectors() == sorted(list_selectors())


def test_an_unknown_name_names_the_close_one() -> None:
    with pytest.raises(
        UnknownNameError,
        match=r"unknown selector 'acuracy'; did you mean 'accuracy'\? Available: accuracy, auto, ",
    ):
        create_selector("acuracy")
