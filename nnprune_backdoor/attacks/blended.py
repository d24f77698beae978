"""Blended injection: a faint pattern over the whole image.

Chen, Liu, Li, Lu and Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data
Poisoning", 2017, https://arxiv.org/abs/1712.05526; here with a random pattern.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DataError
from .base import Trigger, register_attack


@register_attack("blended")
@dataclass(frozen=True, kw_only=True)
class Blended(Trigger):
    """Mixes a fixed uniform-noise picture into the image: (1 - ratio) * image + ratio * noise."""

    ratio: float = 0.2  # share of the noise picture, in [0, 1]
    pattern_seed: int = 0  # which noise picture

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise DataError(f"expected a blend ratio in [0, 1], got {self.ratio}")

    def __call__(self, pixels: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.pattern_seed)
        noise = torch.rand(pixels.shape[1:], generator=generator).to(pixels)
        return (1 - self.ratio) * pixels + self.ratio * noise
