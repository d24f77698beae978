"""How much to prune: selectors turn scores into a selection and never see a triggered image."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from .data import CleanData, like
from .errors import DataError
from .guard import as_integer
from .inversion import at_once
from .masking import MaskedModel, Silencing
from .progress import progress_bar
from .registry import Registry
from .scores import ChannelScores, Neuron, Point, Selection, Site, neurons_of


class HeldOut:
    """Held-out clean images: which of them the model still gets right under a selection.

    Args:
        model: in eval mode, frozen; it is not changed.
        clean: labelled images that the criterion did not see.
        scored: clean images that the criterion saw: no measure of accuracy, but of use to a
            selector that looks for evidence.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: tuple[Site, ...],
        clean: CleanData,
        *,
        silencing: Silencing = "zero",
        scored: CleanData | None = None,
        progress: bool = False,
    ) -> None:
        self.clean = clean.near(model)
        self.scored = None if scored is None else scored.near(model)
        self.silencing = silencing
        self.progress = progress
        self._masked = MaskedModel(model, sites, silencing=silencing)
        self._masked.masks.requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The model itself, nothing silenced."""
        return self._masked.model

    def correct(self, selection: Selection) -> Tensor:
        """Bool (N,): the images that are classified rightly while the selection is silent."""
        return self.predict(selection, self.clean.images) == self.clean.targets

    @torch.no_grad()
    def predict(self, selection: Selection, images: Tensor) -> Tensor:
        """Labels (N,) for images (N, C, H, W) while the selection is silent."""
        masked = self._masked
        masked.masks.copy_(selection.keep())
        where = like(masked.model)
        parts = images.split(max(16, at_once(images, masked.model)))
        return torch.cat([masked(part.to(**where)).argmax(1).cpu() for part in parts])


class Selector(ABC):
    """Decides how much of a ranking goes. Concrete ones are frozen dataclasses."""

    needs_labels: ClassVar[bool] = False  # True: refuses clean images without labels
    recovers_triggers: ClassVar[bool] = False  # True: the selection carries what inversion found

    @abstractmethod
    def __call__(self, scores: ChannelScores, held_out: HeldOut | None = None) -> Selection:
        """The neurons that go; `held_out` is needed by selectors that measure accuracy."""

    def review(self, selection: Selection, repaired: nn.Module, held_out: HeldOut) -> Selection:
        """The same neurons; a selector that sought evidence says what a repair left of it."""
        return selection


_SELECTORS: Registry[Selector] = Registry("selector")
_S = TypeVar("_S", bound=type)


def register_selector(name: str) -> Callable[[_S], _S]:
    """Class decorator: make a selector available by name."""
    return _SELECTORS.register(name)


def create_selector(name: str, **settings: Any) -> Selector:
    """The registered selector `name`, for example `create_selector("count", count=24)`.

    Raises:
        UnknownNameError: no such selector or setting; the message names close ones.
        DataError: a setting without a default is missing.
    """
    return _SELECTORS.create(name, settings)


def selector_class(name: str) -> type[Selector]:
    """The class registered as `name`; raises UnknownNameError."""
    return _SELECTORS.get(name)


def list_selectors() -> list[str]:
    """Names for `create_selector`, sorted."""
    return _SELECTORS.names()


@register_selector("below")
@dataclass(frozen=True)
class BelowThreshold(Selector):
    """Every neuron whose score is at most `threshold` (the published codes compare with <=).

    Raises:
        DataError: the scores have an order and no scale (`ChannelScores.ranks_only`).
    """

    threshold: float  # in the criterion's own unit; 0.2 is usual for trained masks

    def __post_init__(self) -> None:
        if math.isnan(self.threshold):
            raise DataError("expected a threshold, got NaN")

    def __call__(self, scores: ChannelScores, held_out: HeldOut | None = None) -> Selection:
        _check_scale(scores)
        count = _removable(scores, scores.flat <= self.threshold)
        return prefix(scores, count, f"score <= {self.threshold:g}")


@register_selector("count")
@dataclass(frozen=True)
class LowestCount(Selector):
    """The `count` neurons of lowest score."""

    count: int

    def __post_init__(self) -> None:
        if as_integer(self.count, "count") < 0:
            raise DataError(f"expected a count of at least 0, got {self.count}")

    def __call__(self, scores: ChannelScores, held_out: HeldOut | None = None) -> Selection:
        return prefix(scores, self.count, f"the {self.count} lowest scores")


@register_selector("fraction")
@dataclass(frozen=True)
class LowestFraction(Selector):
    """This share of all neurons, those of lowest score."""

    fraction: float  # in [0, 1]

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise DataError(f"expected a fraction in [0, 1], got {self.fraction}")

    def __call__(self, scores: ChannelScores, held_out: HeldOut | None = None) -> Selection:
        count = round(self.fraction * len(scores.flat))
        return prefix(scores, count, f"the lowest {self.fraction:.2%} of the scores")


@register_selector("outlier")
@dataclass(frozen=True)
class Outlier(Selector):
    """Neurons whose score lies far below the bulk: score < median - deviations * 1.4826 * MAD.

    The median and the median absolute deviation, so that the outliers do not hide themselves.
    Where more than half of the scores are alike the MAD is 0 and the mean deviation serves.

    Raises:
        DataError: the scores have an order and no scale (`ChannelScores.ranks_only`).
    """

    deviations: float = 3.0

    def __post_init__(self) -> None:
        if not self.deviations >= 0:
            raise DataError(f"expected deviations of at least 0, got {self.deviations}")

    def __call__(self, scores: ChannelScores, held_out: HeldOut | None = None) -> Selection:
        _check_scale(scores)
        flat = scores.flat.double()
        gap = (flat - flat.median()).abs()
        spread = 1.4826 * gap.median()
        if spread == 0:
            spread = 1.2533 * gap.mean()  # sigma of a normal from its mean absolute deviation
        limit = flat.median() - self.deviations * spread
        count = _removable(scores, flat < limit)
        return prefix(scores, count, f"score more than {self.deviations:g} deviations below median")


@register_selector("accuracy")
@dataclass(frozen=True)
class AccuracyBudget(Selector):
    """The most that can go while held-out clean images lose at most `max_drop` of accuracy.

    The same images are compared before and after, so only flips count (`paired_drop`). The drop
    is measured along the ranking and smoothed by isotonic regression, since one image more or
    less is noise; the cut is the last amount at which drop + z(confidence) * its standard error
    is within the budget. Blind to the backdoor: it spends the budget on a benign model too.
    """

    needs_labels: ClassVar[bool] = True

    max_drop: float = 0.02  # share of the images, 0.02 = two points
    confidence: float = 0.5  # one-sided; 0.5 takes the estimate, 0.95 demands proof
    max_fraction: float = 0.2  # of all neurons; nothing beyond is tried
    points: int = 40  # amounts tried, dense at the small end
    search: Literal["grid", "bisect"] = "grid"  # bisect: about 6 of the 40, see docs/speed.md

    def __post_init__(self) -> None:
        if not 0 <= self.max_drop < 1 or not 0.5 <= self.confidence < 1:
            raise DataError(
                "expected max_drop in [0, 1) and confidence in [0.5, 1), got "
                f"{self.max_drop} and {self.confidence}"
            )
        if not 0 < self.max_fraction <= 1 or self.points < 2:
            raise DataError("expected max_fraction in (0, 1] and at least 2 points")
        if self.search not in ("grid", "bisect"):
            raise DataError(f"expected search 'grid' or 'bisect', got {self.search!r}")

    def __call__(self, scores: ChannelScores, held_out: HeldOut | None = None) -> Selection:
        if held_out is None:
            raise DataError("AccuracyBudget needs labelled held-out clean images")
        amounts = amounts_to_try(len(scores.flat), self.max_fraction, self.points)
        before = held_out.correct(prefix(scores, 0))
        z = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(self.confidence)).item()

        def look(amount: int) -> tuple[Point, float, float]:
            """What the amount costs, the same with confidence, and the error of it."""
            chosen = prefix(scores, amount)
            drop, error = paired_drop(before, held_out.correct(chosen))
            bar.update()
            return Point(len(chosen), drop), drop + z * error, error

        with progress_bar(len(amounts), "selecting", held_out.progress) as bar:
            search = self._bisect if self.search == "bisect" else self._walk
            curve, count = search(amounts, look)
        reason = f"clean accuracy on {len(before)} held-out images drops by <= {self.max_drop:.1%}"
        return replace(prefix(scores, count, reason), curve=tuple(curve))

    def _walk(self, amounts: list[int], look: _Look) -> tuple[list[Point], int]:
        curve, bounds = [Point(0, 0.0)], [0.0]
        for amount in amounts:
            point, bound, error = look(amount)
            curve.append(point)
            bounds.append(bound)
            if point.drop > self.max_drop + max(0.05, 4 * error):
                break  # far beyond the budget; more pruning will not come back into it
        return curve, max(
            point.neurons
            for point, bound in zip(curve, isotonic(bounds), strict=True)
            if bound <= self.max_drop or point.neurons == 0
        )

    def _bisect(self, amounts: list[int], look: _Look) -> tuple[list[Point], int]:
        """As if cost grew with the amount; without the smoothing, so noise may lead it aside."""
        curve, fits, beyond = [Point(0, 0.0)], -1, len(amounts)
        count = 0
        while beyond - fits > 1:
            middle = (fits + beyond) // 2
            point, bound, _ = look(amounts[middle])
            curve.append(point)
            if bound <= self.max_drop:
                fits, count = middle, point.neurons
            else:
                beyond = middle
        return sorted(curve, key=lambda point: point.neurons), count


_Look = Callable[[int], tuple[Point, float, float]]


def amounts_to_try(total: int, max_fraction: float, points: int) -> list[int]:
    """Ascending numbers of neurons, dense at the small end, up to a share of all."""
    most = max(1, round(max_fraction * total))
    return sorted({math.ceil(most ** (i / (points - 1))) for i in range(points)})


def prefix(scores: ChannelScores, count: int, reason: str = "", **details: Any) -> Selection:
    """The first `count` neurons of the ranking; a neuron that is its site's last one is skipped."""
    neurons = neurons_of(scores.sites)
    left = {site.name: site.channels for site in scores.sites}
    chosen: list[Neuron] = []
    for index in scores.order().tolist():
        if len(chosen) >= count:
            break
        neuron = neurons[index]
        if left[neuron.site] > 1:
            left[neuron.site] -= 1
            chosen.append(neuron)
    return Selection(scores.sites, tuple(chosen), reason, details)


def _check_scale(scores: ChannelScores) -> None:
    if scores.ranks_only:
        raise DataError(
            "these scores say in which order neurons should go, and no more: a threshold on them "
            "takes hundreds of neurons of a benign network. Use 'accuracy', 'trigger', 'count' or "
            "'fraction', or a criterion with a scale: 'clp', 'bnp', or trained masks (paper())"
        )


def _removable(scores: ChannelScores, low: Tensor) -> int:
    """How many of the neurons marked `low` (bool, flat) can go while each site keeps one."""
    parts = low.split([site.channels for site in scores.sites])
    return sum(min(int(part.sum()), len(part) - 1) for part in parts)


def paired_drop(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Loss of accuracy on the same images and its standard error, both as shares.

    Args:
        before, after: bool (N,), whether each image is classified rightly.

    Half a flip is added to each direction, as Agresti and Min (2005) do for paired proportions, so
    that no flips seen does not mean no uncertainty.
    """
    count = len(before)
    lost = int((before & ~after).sum())
    won = int((~before & after).sum())
    total, b, c = count + 2, lost + 0.5, won + 0.5
    variance = max(b + c - (b - c) ** 2 / total, 0.0) / total**2
    return (lost - won) / count, math.sqrt(variance)


def isotonic(values: Iterable[float]) -> list[float]:
    """The non-decreasing sequence closest to `values` (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []  # mean, length
    for value in values:
        mean, length = value, 1
        while pools and pools[-1][0] > mean:
            previous, size = pools.pop()
            mean = (previous * size + mean * length) / (size + length)
            length += size
        pools.append((mean, length))
    return [mean for mean, length in pools for _ in range(length)]


