"""WaNet: a fixed smooth warping of the image.

Nguyen and Tran, "WaNet: Imperceptible Warping-based Backdoor Attack", ICLR 2021,
https://arxiv.org/abs/2102.10369: random displacements at 4 x 4 control points, interpolated
bicubically to the size of the image. In the paper, a strength of 0.5 is a mean displacement of
0.25 px at the control points, whatever the size of the image; 10 % of each training batch are
warped and relabelled, and 20 % are warped in noise mode and keep their true label.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..errors import DataError
from .base import Trigger, register_attack


@register_attack("warp")
@dataclass(frozen=True, kw_only=True)
class Warp(Trigger):
    """Displaces pixels along a fixed smooth field.

    Cover images (`poison`'s cover rate) are the paper's noise mode: the field plus noise of the
    same mean size, drawn for each image and pixel.

    Attributes:
        strength: Mean displacement along an axis, in 1/32 of the side of the image, in [0, 16].
        control: Control points per side.
        field_seed: Seed of the field.
    """

    strength: float = 2.0
    control: int = 4
    field_seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 16 or self.control < 2:
            raise DataError(
                "expected a strength in [0, 16] and at least 2 control points per side, got "
                f"{self.strength} and {self.control}"
            )

    def __call__(self, pixels: Tensor) -> Tensor:
        return _sample(pixels, self._field(pixels))

    def cover(self, pixels: Tensor, generator: Generator) -> Tensor:
        noise = torch.rand(len(pixels), *pixels.shape[-2:], 2, generator=generator) * 4 - 2
        return _sample(pixels, self._field(pixels) + noise.to(pixels) * self.strength / 16)

    def _field(self, pixels: Tensor) -> Tensor:
        """Displacements (1, H, W, 2) in units of half a side, so that 1/32 of a side is 1/16."""
        generator = torch.Generator().manual_seed(self.field_seed)
        points = torch.rand(1, 2, self.control, self.control, generator=generator) * 2 - 1
        points = points / points.abs().mean() * self.strength / 16
        field = F.interpolate(points, pixels.shape[-2:], mode="bicubic", align_corners=True)
        return field.permute(0, 2, 3, 1).to(pixels)


def _sample(pixels: Tensor, field: Tensor) -> Tensor:
    """Sample images (N, C, H, W) at each pixel's place plus `field` (1 or N, H, W, 2)."""
    identity = torch.eye(2, 3).to(pixels)[None]
    grid = F.affine_grid(identity, [1, *pixels.shape[1:]], align_corners=False) + field
    grid = grid.expand(len(pixels), -1, -1, -1)
    warped = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return warped.clamp(0, 1)
