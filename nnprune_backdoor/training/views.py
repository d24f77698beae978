"""Random views of images, so that a few hundred of them are enough to learn from."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_ANGLE = math.radians(14)  # largest rotation
_SMALLEST = 0.6  # share of the width that a view shows


def turned(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W), some of them rotated and zoomed in, anywhere.

    Args:
        share: of the images, each drawn by itself.
    """
    count = len(images)
    draws = torch.rand(5, count, generator=generator)
    angle = (2 * draws[0] - 1) * _ANGLE
    scale = _SMALLEST + (1 - _SMALLEST) * draws[1]
    shift = (2 * draws[2:4] - 1) * (1 - scale)  # the view stays within the image, but its corners
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    maps = torch.stack([cosine, -sine, shift[0], sine, cosine, shift[1]], 1).reshape(count, 2, 3)
    chosen = draws[4] < share
    if not chosen.any():
        return images
    some = images[chosen].float()
    grid = F.affine_grid(maps[chosen].to(some), list(some.shape), align_corners=False)
    views = F.grid_sample(some, grid, padding_mode="reflection", align_corners=False)
    images = images.clone()
    images[chosen] = views.to(images)
    return images


def mixed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W) with others of them: blended (mixup) or a rectangle each (CutMix)."""
    height, width = images.shape[2:]
    others = images[torch.randperm(len(images), generator=generator)]
    share = float(torch.rand((), generator=generator))
    if torch.rand((), generator=generator) < 0.5:
        return share * images + (1 - share) * others
    rows, columns = (round(size * (1 - share) ** 0.5) for size in (height, width))
    top = int(torch.randint(height - rows + 1, (), generator=generator))
    left = int(torch.randint(width - columns + 1, (), generator=generator))
    images = images.clone()
    box = (..., slice(top, top + rows), slice(left, left + columns))
    images[box] = others[box]
    return images
