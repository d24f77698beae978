"""When to stop training masks: once the neurons of lowest mask are no longer others.

Ours. A selector takes the low end of a ranking; what happens above it afterwards costs time and
changes nothing. The published codes train for a fixed number of steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DataError


class Settling:
    """Watches masks while they are trained.

    Every `every` steps the `share` of lowest masks is held against that of the look before; they
    have settled when in `looks` looks one after another at least the part `alike` was the same.
    As long as fewer masks than that lie below 1, nothing has settled.

    Args:
        alike: in (0, 1]; None: never settles.
    """

    def __init__(
        self, alike: float | None, *, every: int = 10, share: float = 0.02, looks: int = 3
    ) -> None:
        if alike is not None and not 0 < alike <= 1:
            raise DataError(f"expected settle in (0, 1], got {alike}")
        self.alike, self.every, self.share, self.looks = alike, every, share, looks
        self.steps = 0
        self._lowest = torch.empty(0, dtype=torch.int64)
        self._alike = 0

    def __call__(self, masks: Tensor) -> bool:
        """Call after each step with the masks (number of neurons,); True: stop."""
        self.steps += 1
        if self.alike is None or self.steps % self.every:
            return False
        few = max(1, round(self.share * len(masks)))
        lowest = masks.detach().argsort(stable=True)[:few].cpu()
        if masks[lowest[-1]] >= 1:
            return False
        same = torch.isin(lowest, self._lowest).float().mean().item()
        self._lowest = lowest
        self._alike = self._alike + 1 if same >= self.alike else 0
        return self._alike >= self.looks
