"""A trigger that was recovered from a model, and the range of valid pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..utils.short_repr import ShortRepr
from .data import CleanData
from .predictions import predict_labels


@dataclass(frozen=True, eq=False, repr=False)
class PixelRange(ShortRepr):
    """Values that valid pixels have in normalised images: from `low` to `high`, each (C, 1, 1)."""

    low: Tensor
    high: Tensor

    @classmethod
    def normalised(cls, mean: Sequence[float], std: Sequence[float]) -> Self:
        """Of pixels in [0, 1] after (pixel - mean) / std, one number a channel.

        Raises:
            DataError: not one std for each mean, or one that is not positive.
        """
        if len(mean) != len(std) or not mean or min(std) <= 0:
            raise DataError(
                f"expected mean and positive std of each channel, got mean {tuple(mean)} and std "
                f"{tuple(std)}"
            )
        centre, scale = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
        return cls(-centre / scale, (1 - centre) / scale)

    @classmethod
    def seen_in(cls, images: Tensor) -> Self:
        """From the least to the greatest value in images (N, C, H, W), channel by channel."""
        return cls(
            images.amin((0, 2, 3))[:, None, None].float().cpu(),
            images.amax((0, 2, 3))[:, None, None].float().cpu(),
        )

    def check(self, images: Tensor) -> None:
        """Raise DataError unless images (N, C, H, W) have these channels and lie in the range."""
        if images.shape[1] != len(self.low):
            raise DataError(
                f"expected images of {len(self.low)} channels as in mean and std, got "
                f"{images.shape[1]}"
            )
        seen, slack = self.seen_in(images), 0.01 * (self.high - self.low)
        if (seen.low < self.low - slack).any() or (seen.high > self.high + slack).any():
            raise DataError(
                f"images span {_span(seen)}, but with this mean and std valid pixels span "
                f"{_span(self)}; give the normalisation that the images went through, or none, and "
                "the range is taken from the images"
            )


def _span(pixels: PixelRange) -> str:
    ends = zip(pixels.low.flatten().tolist(), pixels.high.flatten().tolist(), strict=True)
    return ", ".join(f"[{low:.2f}, {high:.2f}]" for low, high in ends)


@dataclass(frozen=True, eq=False, repr=False)
class RecoveredTrigger(ShortRepr):
    """A mask and a pattern that send images to `target`; calling it stamps images.

    It is what the model reacts to, which need not look like the attacker's trigger.

    Attributes:
        target: The label that stamped images are sent to.
        mask: Opacity of the trigger, (1, H, W) in [0, 1], on the CPU.
        pattern: Its colours, (C, H, W), normalised as the model expects, on the CPU.
        success: Share of held-out clean images that it sends to the target, without those already
            there.
        tested: Number of images behind that share; success is 0 where there were none.
        steps: Optimisation steps after which this mask and pattern were reached.
    """

    target: int
    mask: Tensor
    pattern: Tensor
    success: float
    tested: int
    steps: int

    @property
    def norm(self) -> float:
        """Sum of the mask: the size of the trigger in pixels."""
        return self.mask.sum().item()

    def tested_on(self, model: nn.Module, clean: CleanData) -> Self:
        """The same trigger with its success on these clean images, whose labels do not matter."""
        elsewhere = clean.images[predict_labels(model, clean.images) != self.target]
        success = 0.0
        if len(elsewhere):
            sent = predict_labels(model, self(elsewhere)) == self.target
            success = sent.float().mean().item()
        return replace(self, success=success, tested=len(elsewhere))

    def __call__(self, images: Tensor) -> Tensor:
        """Stamp images (N, C, H, W), normalised as the model expects; same shape, dtype, device."""
        mask, pattern = self.mask.to(images), self.pattern.to(images)
        return (1 - mask) * images + mask * pattern
