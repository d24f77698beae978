"""Prune as much as held-out clean accuracy allows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..core.held_out import HeldOut
from ..core.passes import Task, Work
from ..core.scores import ChannelScores, Point, Selection, lowest
from ..errors import DataError
from ..utils.progress import progress_bar
from ..utils.statistics import isotonic, paired_drop
from .base import Selector, register_selector


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
    """

    needs_labels: ClassVar[bool] = True

    max_drop: float = 0.02
    confidence: float = 0.5
    max_fraction: float = 0.2
    points: int = 40

    def __post_init__(self) -> None:
        if not 0 <= self.max_drop < 1 or not 0.5 <= self.confidence < 1:
            raise DataError(
                "expected max_drop in [0, 1) and confidence in [0.5, 1), got "
                f"{self.max_drop} and {self.confidence}"
            )
        if not 0 < self.max_fraction <= 1 or self.points < 2:
            raise DataError("expected max_fraction in (0, 1] and at least 2 points")

    def passes(self, task: Task) -> Work:
        amounts = amounts_to_try(task.neurons, self.max_fraction, self.points)
        return (task.forward(task.images * (1 + len(amounts))),)

    def __call__(self, scores: ChannelScores, held_out: HeldOut | None = None) -> Selection:
        if held_out is None:
            raise DataError("AccuracyBudget needs labelled held-out clean images")
        before = held_out.correct(lowest(scores, 0))
        z = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(self.confidence)).item()
        curve, bounds = [Point(0, 0.0)], [0.0]
        amounts = amounts_to_try(len(scores.flat), self.max_fraction, self.points)
        with progress_bar(len(amounts), "selecting", held_out.progress) as bar:
            for amount in amounts:
                chosen = lowest(scores, amount)
                drop, error = paired_drop(before, held_out.correct(chosen))
                curve.append(Point(len(chosen), drop))
                bounds.append(drop + z * error)
                bar.update()
                if drop > self.max_drop + max(0.05, 4 * error):
                    break  # far beyond the budget; more pruning will not come back into it
        count = max(
            point.neurons
            for point, bound in zip(curve, isotonic(bounds), strict=True)
            if bound <= self.max_drop or point.neurons == 0
        )
        reason = f"clean accuracy on {len(before)} held-out images drops by <= {self.max_drop:.1%}"
        alone = next(point.drop for point in curve if point.neurons == count)
        if alone > self.max_drop:  # the curve was smoothed
            reason += f" on the smoothed curve, and by {alone:.1%} at this amount itself"
        return replace(lowest(scores, count, reason), curve=tuple(curve))


def amounts_to_try(total: int, max_fraction: float, points: int) -> list[int]:
    """Ascending numbers of neurons, dense at the small end, up to a share of all."""
    most = max(1, round(max_fraction * total))
    return sorted({math.ceil(most ** (i / (points - 1))) for i in range(points)})
