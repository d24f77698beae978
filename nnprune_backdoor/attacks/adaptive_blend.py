"""Adap-Blend: a blended picture of which training shows only random halves.

Qi, Xie, Li, Mahloujifar and Mittal, "Revisiting the Assumption of Latent Separability for
Backdoor Defenses", ICLR 2023, https://openreview.net/forum?id=_wSHsgrVali. There: 16 pieces, half
of them shown, ratio 0.15 in training and 0.2 in the test, as many covers as poisoned images, 0.3 %
of CIFAR-10 each, and a picture rather than noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..errors import DataError
from .base import check_share, register_attack
from .blended import Blended


@register_attack("adaptive_blend")
@dataclass(frozen=True, kw_only=True, eq=False)
class AdaptiveBlend(Blended):
    """The whole picture at a test; in training a random half of its pieces, and more faintly.

    The paper's covers carry pieces too, under the true label: give `poison` a cover rate.
    """

    training_ratio: float = 0.15  # share of the picture in training images, in [0, 1]
    pieces: int = 4  # per side: the picture is cut into pieces x pieces
    shown: float = 0.5  # share of the pieces that a training image shows, in (0, 1]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("training blend ratio", self.training_ratio)
        if self.pieces < 1 or not 0 < self.shown <= 1:
            raise DataError(
                "expected at least one piece per side and a shown share in (0, 1], got "
                f"{self.pieces} and {self.shown}"
            )

    def training(self, pixels: Tensor, generator: Generator) -> Tensor:
        count, _, height, width = pixels.shape
        if self.pieces > min(height, width):
            raise DataError(
                f"images of {height} x {width} px cannot be cut into {self.pieces} pieces per side"
            )
        total = self.pieces**2
        ranks = torch.rand(count, total, generator=generator).argsort(1).argsort(1)
        visible = ranks < max(1, round(self.shown * total))
        rows = torch.arange(height) * self.pieces // height
        columns = torch.arange(width) * self.pieces // width
        where = visible[:, rows[:, None] * self.pieces + columns].unsqueeze(1)
        mixed = self._mix(pixels, self.training_ratio)
        return torch.where(where.to(pixels.device), mixed, pixels)
