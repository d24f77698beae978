"""How much goes before a network is distilled: what its answers bear."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from ..core.held_out import HeldOut
from ..core.passes import Task, Work
from ..core.scores import ChannelScores, Point, Selection, lowest
from ..errors import DataError
from ..utils.statistics import isotonic, paired_drop
from .accuracy import amounts_to_try
from .base import Selector


@dataclass(frozen=True)
class Agreeing(Selector):
    """The most, up to a share, at which few held-out images change their label.

    Needs no labels. Ours; the limits were set on one small network, and not compared with others.

    Attributes:
        max_changed: Largest share of the images whose label changes, before anything is distilled.
        max_fraction: Largest share of all neurons.
        points: Number of amounts tried, dense at the small end.
    """

    max_changed: float = 0.15
    max_fraction: float = 0.05
    points: int = 20

    def passes(self, task: Task) -> Work:
        amounts = amounts_to_try(task.neurons, self.max_fraction, self.points)
        return (task.forward(task.images * (1 + len(amounts))),)

    def __call__(self, scores: ChannelScores, held_out: HeldOut | None = None) -> Selection:
        if held_out is None:
            raise DataError("Agreeing needs held-out clean images")
        images = held_out.clean.images
        given = held_out.predict(lowest(scores, 0), images)
        amounts = amounts_to_try(len(scores.flat), self.max_fraction, self.points)
        answers = [held_out.predict(lowest(scores, amount), images) for amount in amounts]
        changed = [(labels != given).double().mean().item() for labels in answers]
        fitting = [
            amount
            for amount, share in zip(amounts, isotonic(changed), strict=True)
            if share <= self.max_changed
        ]
        count = max(fitting, default=amounts[0])
        share = dict(zip(amounts, changed, strict=True))[count]
        reason = (
            f"silent, they change the label of {share:.1%} of {len(images)} held-out images before "
            f"distilling; up to {self.max_changed:.0%} are allowed on the smoothed curve, and "
            f"{self.max_fraction:.0%} of the neurons; one always goes"
        )
        points = zip((0, *amounts), (given, *answers), (0.0, *changed), strict=True)
        curve = [
            Point(amount, _drop(given, labels, held_out.clean.labels), same=1 - part)
            for amount, labels, part in points
        ]
        return replace(lowest(scores, count, reason), curve=tuple(curve))


def _drop(before: Tensor, after: Tensor, labels: Tensor | None) -> float:
    """Of accuracy, as a share of the images."""
    if labels is None:
        return math.nan
    return paired_drop(before == labels, after == labels)[0]
