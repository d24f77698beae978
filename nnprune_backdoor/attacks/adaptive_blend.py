"""Adap-Blend: a blended picture; each training image shows a random half of its pieces.

Qi, Xie, Li, Mahloujifar and Mittal, "Revisiting the Assumption of Latent Separability for
Backdoor Defenses", ICLR 2023, https://openreview.net/forum?id=_wSHsgrVali. The paper cuts a
picture, not noise, into 16 pieces and shows half of them, blends with ratio 0.15 in training and
0.2 in tests, and poisons 0.3 % of CIFAR-10, with as many cover images.
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
    """Blends the whole picture into test images, and random pieces of it into training images.

    The paper also blends pieces into cover images, which keep their true label: give `poison` a
    cover rate.

    Attributes:
        ratio: Weight of the picture in test images, in [0, 1].
        pattern_seed: Seed of the uniform noise that is blended in when there is no picture.
        picture: (C, h, w) or (1, h, w) in [0, 1], resized to the images.
        training_ratio: Weight of the picture in training images, in [0, 1].
        pieces: Pieces per side; the picture is cut into pieces x pieces.
        shown: Share of the pieces that a training image shows, in (0, 1].
    """

    training_ratio: float = 0.15
    pieces: int = 4
    shown: float = 0.5

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
                f"images of {height} x {width} px cannot be cut into {self.pieces} pieces per "
                "side; take fewer pieces"
            )
        total = self.pieces**2
        ranks = torch.rand(count, total, generator=generator).argsort(1).argsort(1)
        visible = ranks < max(1, round(self.shown * total))
        rows = torch.arange(height) * self.pieces // height
        columns = torch.arange(width) * self.pieces // width
        shown = visible[:, rows[:, None] * self.pieces + columns].unsqueeze(1)
        blended = self._blend(pixels, self.training_ratio)
        return torch.where(shown.to(pixels.device), blended, pixels)
