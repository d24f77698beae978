"""A smooth additive pattern, without high frequencies that could be detected.

After Zeng, Park, Mao and Jia, "Rethinking the Backdoor Attacks' Triggers: A Frequency
Perspective", ICCV 2021, https://arxiv.org/abs/2104.03413. Their smooth trigger is optimised against
a network; this one is a fixed random sum of low-frequency cosines (DCT) of bounded amplitude.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DataError
from .base import Trigger, check_share, register_attack


@register_attack("lowfreq")
@dataclass(frozen=True, kw_only=True)
class LowFreq(Trigger):
    """Adds a random sum of the `waves` x `waves` lowest cosines, without the constant one.

    Attributes:
        amplitude: Largest change of a pixel, in [0, 1].
        waves: Cosines per axis; the highest has (waves - 1) / 2 periods over the image.
        pattern_seed: Seed of the weights of the cosines.
    """

    amplitude: float = 0.1
    waves: int = 4
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        check_share("amplitude", self.amplitude)
        if self.waves < 2:
            raise DataError(f"expected at least 2 cosines per axis, got {self.waves}")

    def __call__(self, pixels: Tensor) -> Tensor:
        channels, height, width = pixels.shape[1:]
        if self.waves > min(height, width):
            raise DataError(
                f"{self.waves} cosines per axis do not fit into images of {height} x {width} px; "
                "take fewer waves"
            )
        generator = torch.Generator().manual_seed(self.pattern_seed)
        weights = torch.randn(channels, self.waves, self.waves, generator=generator)
        weights[:, 0, 0] = 0
        pattern = self._cosines(height).T @ weights @ self._cosines(width)
        pattern *= self.amplitude / pattern.abs().max()
        return (pixels + pattern.to(pixels)).clamp(0, 1)

    def _cosines(self, side: int) -> Tensor:
        waves, places = torch.arange(self.waves), torch.arange(side) + 0.5
        return torch.cos(math.pi * waves[:, None] * places / side)
