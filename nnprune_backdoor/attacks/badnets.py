"""BadNets: a small fixed patch.

Gu, Dolan-Gavitt and Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model
Supply Chain", 2017, https://arxiv.org/abs/1708.06733. By default the patch is a black and white
checkerboard near the bottom right corner.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DataError
from .base import Trigger, register_attack

_PATTERNS = ("checkerboard", "white", "black", "noise")


@register_attack("badnets")
@dataclass(frozen=True, kw_only=True, eq=False)
class BadNets(Trigger):
    """Replaces a patch of the image.

    Attributes:
        size: Side of the patch in pixels, unless `pattern` is a tensor.
        margin: Pixels between the patch and the bottom and right edges of the image.
        top: First row of the patch; None to place it by the margin.
        left: First column of the patch; None to place it by the margin.
        pattern: "checkerboard", "white", "black", "noise" (uniform, in colour), or a patch of any
            size (h, w) or (C, h, w) in [0, 1].
        pattern_seed: Seed of the noise.
    """

    size: int = 3
    margin: int = 1
    top: int | None = None
    left: int | None = None
    pattern: str | Tensor = "checkerboard"
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.pattern, str):
            if self.pattern not in _PATTERNS:
                raise DataError(
                    f"expected a pattern out of {', '.join(_PATTERNS)}, or a tensor; "
                    f"got {self.pattern!r}"
                )
            if self.size < 1:
                raise DataError(f"expected a patch of at least 1 px, got {self.size}")
        elif self.pattern.dim() not in (2, 3):
            raise DataError(
                f"expected a pattern (h, w) or (C, h, w), got {tuple(self.pattern.shape)}"
            )
        if min(self.margin, self.top or 0, self.left or 0) < 0:
            raise DataError(
                "expected margin, top and left of 0 or more, got "
                f"{self.margin}, {self.top}, {self.left}"
            )

    def __call__(self, pixels: Tensor) -> Tensor:
        patch = self._patch(pixels)
        height, width = patch.shape[-2:]
        rows, columns = pixels.shape[-2:]
        top = rows - self.margin - height if self.top is None else self.top
        left = columns - self.margin - width if self.left is None else self.left
        if min(top, left) < 0 or top + height > rows or left + width > columns:
            raise DataError(
                f"a patch of {height} x {width} px at row {top}, column {left} does not fit into "
                f"images of {rows} x {columns} px; take a smaller size or margin"
            )
        stamped = pixels.clone()
        stamped[..., top : top + height, left : left + width] = patch
        return stamped

    def _patch(self, pixels: Tensor) -> Tensor:
        if isinstance(self.pattern, Tensor):
            if self.pattern.dim() == 3 and len(self.pattern) not in (1, pixels.shape[-3]):
                raise DataError(
                    f"a pattern of {len(self.pattern)} channels does not fit images of "
                    f"{pixels.shape[-3]}; give one with as many channels, or with one"
                )
            return self.pattern.to(pixels)
        if self.pattern == "noise":
            generator = torch.Generator().manual_seed(self.pattern_seed)
            return torch.rand(pixels.shape[-3], self.size, self.size, generator=generator).to(
                pixels
            )
        if self.pattern == "checkerboard":
            steps = torch.arange(self.size)
            return ((steps[:, None] + steps[None, :]) % 2 == 0).to(pixels)
        return pixels.new_full((self.size, self.size), float(self.pattern == "white"))
