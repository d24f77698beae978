"""BadNets: a small fixed patch.

Gu, Dolan-Gavitt and Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model
Supply Chain", 2017, https://arxiv.org/abs/1708.06733. The patch here is a square checkerboard of
black and white pixels near the bottom right corner.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DataError
from .base import Trigger, register_attack


@register_attack("badnets")
@dataclass(frozen=True, kw_only=True)
class BadNets(Trigger):
    """A checkerboard of `size` x `size` pixels, `margin` pixels from the bottom right corner."""

    size: int = 3  # pixels
    margin: int = 1  # pixels between the patch and the image's bottom and right edges

    def __call__(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        if self.size + self.margin > min(height, width):
            raise DataError(
                f"a patch of {self.size} px with a margin of {self.margin} px does not fit into "
                f"images of {height} x {width} px; take a smaller size or margin"
            )
        steps = torch.arange(self.size, device=pixels.device)
        board = ((steps[:, None] + steps[None, :]) % 2 == 0).to(pixels.dtype)
        stamped = pixels.clone()
        bottom, right = height - self.margin, width - self.margin
        stamped[..., bottom - self.size : bottom, right - self.size : right] = board
        return stamped
