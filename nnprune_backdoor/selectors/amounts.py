"""How much to prune: selectors turn scores into a selection and never see a triggered image."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..core.held_out import HeldOut
from ..core.passes import Task, Work
from ..core.scores import ChannelScores, Selection, lowest
from ..errors import DataError
from ..utils.randomness import as_integer
from .base import (
    Selector,
    register_selector,
)


class _ByScores(Selector):
    """Looks at the scores alone."""

    def passes(self, task: Task) -> Work:
        return ()


@register_selector("below")
@dataclass(frozen=True)
class BelowThreshold(_ByScores):
    """Every neuron whose score is at most `threshold` (the published codes compare with <=).

    Raises:
        DataError: the scores have an order and no scale (`ChannelScores.ranks_only`).

    Attributes:
        threshold: In the criterion's own unit; 0.2 is usual for trained masks.
    """

    threshold: float

    def __post_init__(self) -> None:
        if math.isnan(self.threshold):
            raise DataError("expected a threshold, got NaN")

    def __call__(self, scores: ChannelScores, held_out: HeldOut | None = None) -> Selection:
        _check_scale(scores)
        count = _removable(scores, scores.flat <= self.threshold)
        return lowest(scores, count, f"score <= {self.threshold:g}")


@register_selector("count")
@dataclass(frozen=True)
class LowestCount(_ByScores):
    """The `count` neurons of lowest score."""

    count: int

    def __post_init__(self) -> None:
        if as_integer(self.count, "count") < 0:
            raise DataError(f"expected a count of at least 0, got {self.count}")

    def __call__(self, scores: ChannelScores, held_out: HeldOut | None = None) -> Selection:
        return lowest(scores, self.count, f"the {self.count} lowest scores")


@register_selector("fraction")
@dataclass(frozen=True)
class LowestFraction(_ByScores):
    """This share of all neurons, those of lowest score.

    Attributes:
        fraction: Share of all neurons, in [0, 1].
    """

    fraction: float

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise DataError(f"expected a fraction in [0, 1], got {self.fraction}")

    def __call__(self, scores: ChannelScores, held_out: HeldOut | None = None) -> Selection:
        count = round(self.fraction * len(scores.flat))
        return lowest(scores, count, f"the lowest {self.fraction:.2%} of the scores")


@register_selector("outlier")
@dataclass(frozen=True)
class Outlier(_ByScores):
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
        return lowest(scores, count, f"score more than {self.deviations:g} deviations below median")


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
