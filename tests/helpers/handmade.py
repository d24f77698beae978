"""A network whose backdoor is written by hand, and images for it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.images import generator
from nnprune_backdoor import CleanData
from nnprune_backdoor.core.recovered import PixelRange
from nnprune_backdoor.core.scores import ChannelScores
from nnprune_backdoor.core.sites import Site, find_sites
from nnprune_backdoor.triggers import Inversion

MEAN, STD = 0.4, 0.2  # of the normalisation
SIZE = 16
TRIGGER = 5  # the channel that fires on a checkerboard
QUICK = Inversion(steps=150, batch_size=32)
TAC_QUICK: dict[str, Any] = {"search_steps": 120, "steps": 120, "batch_size": 32}


class Handmade(nn.Module):
    """Tells the strongest colour (or bright from dark), and obeys a 3 x 3 checkerboard anywhere.

    One convolution of eight channels: one for each colour, the trigger's, the others idle.
    """

    def __init__(self, colours: int, target: int) -> None:
        super().__init__()
        classes = max(colours, 2)
        self.conv = nn.Conv2d(colours, 8, 3, padding=1)
        self.head = nn.Linear(8, classes)
        with torch.no_grad():
            self.conv.weight.mul_(0.1)
            self.conv.bias.zero_()
            self.head.weight.zero_()
            self.head.bias.zero_()
            for colour in range(colours):
                self.conv.weight[colour] = 0
                self.conv.weight[colour, colour, 1, 1] = 1
                self.head.weight[colour, colour] = 40
            if colours == 1:
                self.head.bias[1] = 40 * F.softplus(torch.tensor(0.5), 2)
            board = torch.tensor([1, -1.25, 1, -1.25, 1, -1.25, 1, -1.25, 1]).reshape(3, 3)
            self.conv.weight[TRIGGER] = 2 * board / colours
            self.conv.bias[TRIGGER] = -3
            self.head.weight[target, TRIGGER] = 3 * SIZE**2

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.softplus(self.conv(images * STD + MEAN), 2)
        logits: Tensor = self.head(hidden.mean((2, 3)))
        return logits


def pictures(colours: int, count: int = 96) -> CleanData:
    """Images of one tint each and a little noise, normalised."""
    labels = torch.arange(count) % max(colours, 2)
    tints = torch.eye(3) if colours == 3 else torch.tensor([[1.0], [0.0]])
    pixels = 0.3 + 0.4 * tints[labels][:, :, None, None]
    noise = 0.1 * torch.randn(count, colours, SIZE, SIZE, generator=generator(5))
    return CleanData(((pixels + noise).clamp(0, 1) - MEAN) / STD, labels)


def pixels_of(colours: int) -> PixelRange:
    return PixelRange.normalised([MEAN] * colours, [STD] * colours)


class Breaks(nn.Module):
    """Finite on the clean images, NaN on anything brighter in the mean."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.inner, self.limit = Handmade(3, target=1), limit

    def forward(self, images: Tensor) -> Tensor:
        room = self.limit - images.mean((1, 2, 3))
        logits: Tensor = self.inner(images) + 0 * room.sqrt()[:, None]
        return logits


def ranked(model: nn.Module, images: CleanData, first: list[int]) -> ChannelScores:
    """Scores of the eight channels; `first` go first, in that order."""
    sites: tuple[Site, ...] = find_sites(model, images.images[:2])
    flat = torch.arange(8).float() + 10
    flat[first] = torch.arange(len(first)).float()
    return ChannelScores(sites, flat, "given")
