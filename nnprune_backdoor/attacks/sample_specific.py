"""Noise that is different for each image: a fixed function of the image itself.

In the spirit of Nguyen and Tran, "Input-Aware Dynamic Backdoor Attack", NeurIPS 2020,
https://arxiv.org/abs/2010.08138, and Li et al., "Invisible Backdoor Attack with Sample-Specific
Triggers", ICCV 2021, https://arxiv.org/abs/2012.03816. Both train their generator, the first with
the classifier, the second to hide a message; ours is a small random convolutional network that is
never trained. It shares with them that no pattern is common to the triggered images, and with the
first that another image's noise can be shown under the true label (covers).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..errors import DataError
from .base import Trigger, check_share, register_attack

_HIDDEN, _KERNEL = 16, 5


@register_attack("sample_specific")
@dataclass(frozen=True, kw_only=True)
class SampleSpecific(Trigger):
    """Adds amplitude * tanh(g(image)), where g is a random network of two convolutions.

    The noise has no mean in any channel; an image of one colour stays as it is. Covers (`poison`'s
    cover rate) carry another image's noise, so that only an image's own noise is the trigger.
    """

    amplitude: float = 0.1  # largest change of a pixel, in [0, 1]
    generator_seed: int = 0  # which network

    def __post_init__(self) -> None:
        check_share("amplitude", self.amplitude)

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels + self._noise(pixels)).clamp(0, 1)

    def cover(self, pixels: Tensor, generator: Generator) -> Tensor:
        if len(pixels) < 2:
            raise DataError("covers carry each other's noise; at least two are needed")
        return (pixels + self._noise(pixels).roll(1, 0)).clamp(0, 1)

    def _noise(self, pixels: Tensor) -> Tensor:
        """(N, C, H, W) in [-amplitude, amplitude]."""
        channels = pixels.shape[1]
        generator = torch.Generator().manual_seed(self.generator_seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(pixels)

        first, bias = random(_HIDDEN, channels, _KERNEL, _KERNEL), random(_HIDDEN)
        second = random(channels, _HIDDEN, _KERNEL, _KERNEL)
        hidden = torch.tanh(_convolve(_standard(pixels), first) + bias[:, None, None])
        return self.amplitude * torch.tanh(_standard(_convolve(hidden, second)))


def _convolve(pixels: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(F.pad(pixels, [_KERNEL // 2] * 4, "replicate"), weight)


def _standard(pixels: Tensor) -> Tensor:
    """Each channel of each image less its mean and over its deviation: no common tint is left."""
    centred = pixels - pixels.mean((2, 3), keepdim=True)
    return centred / centred.square().mean((2, 3), keepdim=True).sqrt().clamp_min(1e-3)
