"""When to stop training masks: once the lowest ones are no longer others and stay where they are.

Ours. A selector takes the low end of a ranking; what happens above it afterwards costs time and
changes nothing. The published codes train for a fixed number of steps. A look is held against that
at half as many steps: against the last one, masks that wander slowly seem to rest. Of published
runs CNP's masks settle, ANP's and RNP's do not before their end (docs/speed.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DataError


class Settling:
    """Watches masks while they are trained.

    Every `every` steps the `share` of lowest masks is held against the look at half as many steps.
    They have settled when in `looks` looks one after another at least the part `alike` are the same
    neurons, and at least that part of their distance from 1 has not changed since, on average. As
    long as fewer masks than that lie below 1, nothing has settled.

    Args:
        alike: in (0, 1]; None: never settles. At a half or less, masks that fall at one speed pass.
    """

    def __init__(
        self, alike: float | None, *, every: int = 10, share: float = 0.02, looks: int = 3
    ) -> None:
        if alike is not None and not 0 < alike <= 1:
            raise DataError(f"expected settle in (0, 1], got {alike}")
        self.alike, self.every, self.share, self.looks = alike, every, share, looks
        self.steps = 0
        self._seen: list[Tensor] = []  # masks at each look, on the CPU
        self._alike = 0

    def __call__(self, masks: Tensor) -> bool:
        """Call after each step with the masks (number of neurons,); True: stop."""
        self.steps += 1
        if self.alike is None or self.steps % self.every:
            return False
        self._seen.append(masks.detach().float().cpu().clone())
        before, now = self._seen[max(len(self._seen) // 2 - 1, 0)], self._seen[-1]
        few = max(1, round(self.share * len(now)))
        lowest = now.argsort(stable=True)[:few]
        if len(self._seen) < 2 or now[lowest[-1]] >= 1:
            self._alike = 0
            return False
        same = torch.isin(lowest, before.argsort(stable=True)[:few]).float().mean()
        moved = (now - before)[lowest].abs().mean() / (1 - now[lowest]).mean()
        alike = bool(same >= self.alike and 1 - moved >= self.alike)  # NaN is not
        self._alike = self._alike + 1 if alike else 0
        return self._alike >= self.looks
