"""Prune as much as held-out clean accuracy allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from ..core.held_out import HeldOut
from ..core.scores import ChannelScores, Point, Selection, lowest
from ..errors import DataError
from ..utils.progress import progress_bar
from ..utils.statistics import isotonic, paired_drop
from .base import (
    Selector,
    register_selector,
)


@register_selector("accuracy")
@dataclass(frozen=True)
class AccuracyBudget(Selector):
    """The most that can go while held-out clean images lose at most `max_drop` of accuracy.

    The same images are compared before and after, so only flips count (`paired_drop`). The drop
    is measured along the ranking and smoothed by isotonic regression, since one image more or
    less is noise; the cut is the last amount at which drop + z(confidence) * its standard error
    is within the budget. Blind to the backdoor: it spends the budget on a benign model too.

    Attributes:
        max_drop: Largest loss of accuracy as a share of the images; 0.02 is two points.
        confidence: One-sided confidence; 0.5 uses the estimate, 0.95 requires evidence.
        max_fraction: Largest share of all neurons that is tried.
        points: Number of amounts tried, dense at the small end.
        search: "bisect" tries about 6 of 40 amounts (docs/results/speed.md).
    """

    needs_labels: ClassVar[bool] = True

    max_drop: float = 0.02
    confidence: float = 0.5
    max_fraction: float = 0.2
    points: int = 40
    search: Literal["grid", "bisect"] = "grid"

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
        before = held_out.correct(lowest(scores, 0))
        z = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(self.confidence)).item()

        def look(amount: int) -> tuple[Point, float, float]:
            """What the amount costs, the same with confidence, and the error of it."""
            chosen = lowest(scores, amount)
            drop, error = paired_drop(before, held_out.correct(chosen))
            bar.update()
            return Point(len(chosen), drop), drop + z * error, error

        with progress_bar(len(amounts), "selecting", held_out.progress) as bar:
            search = self._bisect if self.search == "bisect" else self._walk
            curve, count = search(amounts, look)
        reason = f"clean accuracy on {len(before)} held-out images drops by <= {self.max_drop:.1%}"
        return replace(lowest(scores, count, reason), curve=tuple(curve))

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
