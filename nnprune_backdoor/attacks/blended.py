"""Blended injection: a faint picture over the whole image.

Chen, Liu, Li, Lu and Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data
Poisoning", 2017, https://arxiv.org/abs/1712.05526. By default the picture is uniform noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError
from .base import Trigger, check_share, register_attack


@register_attack("blended")
@dataclass(frozen=True, kw_only=True, eq=False)
class Blended(Trigger):
    """Blends a fixed picture into the image: (1 - ratio) * image + ratio * picture.

    Attributes:
        ratio: Weight of the picture, in [0, 1].
        pattern_seed: Seed of the uniform noise that is blended in when there is no picture.
        picture: (C, h, w) or (1, h, w) in [0, 1], resized to the images.
    """

    ratio: float = 0.2
    pattern_seed: int = 0
    picture: Tensor | None = None

    def __post_init__(self) -> None:
        check_share("blend ratio", self.ratio)
        if self.picture is not None and self.picture.dim() != 3:
            raise DataError(f"expected a picture (C, h, w), got {tuple(self.picture.shape)}")

    def __call__(self, pixels: Tensor) -> Tensor:
        return self._blend(pixels, self.ratio)

    def _blend(self, pixels: Tensor, ratio: float) -> Tensor:
        return (1 - ratio) * pixels + ratio * self._overlay(pixels)

    def _overlay(self, pixels: Tensor) -> Tensor:
        if self.picture is None:
            generator = torch.Generator().manual_seed(self.pattern_seed)
            return torch.rand(pixels.shape[1:], generator=generator).to(pixels)
        if len(self.picture) not in (1, pixels.shape[1]):
            raise DataError(
                f"a picture of {len(self.picture)} channels does not fit images of "
                f"{pixels.shape[1]}; give one with as many channels, or with one"
            )
        size = pixels.shape[-2:]
        picture = self.picture[None].float()
        return F.interpolate(picture, size, mode="bilinear", antialias=True)[0].to(pixels)
