"""One picture that sends any image to a label when it shows through the image.

As in the attack of Chen, Liu, Li, Lu and Song, "Targeted backdoor attacks on deep learning systems
using data poisoning", 2017: the image loses a share of its contrast, and the picture has that share
of its own, wherever it likes. A small perturbation is bounded in its size instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.recovered import PixelRange, RecoveredTrigger
from ..errors import DataError
from .universal import UniversalSearch


@dataclass(frozen=True, kw_only=True)
class UniversalBlend(UniversalSearch[RecoveredTrigger]):
    """How it is found: from grey with little noise, each value inside the valid range.

    Attributes:
        opacity: Share of the picture in what is seen. Ours; attackers use .2 (the paper's setting).
        steps, batch_size, momentum, held_out: see `UniversalSearch`.
    """

    opacity: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.opacity <= 1:
            raise DataError(f"expected opacity in (0, 1], got {self.opacity:g}")

    def longest(self, values: int) -> float:
        return 0.05 * float(values**0.5)  # a root mean square of a twentieth of the range

    def beginning(self, noise: Tensor) -> Tensor:
        return self.kept(0.5 + 0.05 * noise)

    def kept(self, pictures: Tensor) -> Tensor:
        return pictures.clamp(0, 1)

    def shown(self, images: Tensor, pictures: Tensor, pixels: PixelRange) -> Tensor:
        low, high = pixels.low.to(images), pixels.high.to(images)
        seen = low + pictures.to(images) * (high - low)
        return (1 - self.opacity) * images + self.opacity * seen[:, None]

    def made(
        self, label: int, picture: Tensor, pixels: PixelRange, success: float, tested: int
    ) -> RecoveredTrigger:
        low, high = pixels.low, pixels.high
        pattern = low + picture.to(low) * (high - low)
        mask = torch.full((1, *pattern.shape[1:]), self.opacity)
        return RecoveredTrigger(label, mask, pattern, success, tested, self.steps)
