"""Rates with intervals, and paired comparisons on the same images."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rate:
    """`hits` of `count` images, with a 95 % Wilson interval."""

    hits: int
    count: int

    @property
    def value(self) -> float:
        """The share, in [0, 1]."""
        return self.hits / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson score interval at 95 %, in [0, 1] (Wilson, 1927)."""
        z, n, p = 1.959964, self.count, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:6.1%} [{low:.1%}, {high:.1%}]"


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
