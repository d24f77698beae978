"""Noise that differs from image to image: a fixed function of the image itself.

In the spirit of Nguyen and Tran, "Input-Aware Dynamic Backdoor Attack", NeurIPS 2020,
https://arxiv.org/abs/2010.08138, and Li et al., "Invisible Backdoor Attack with Sample-Specific
Triggers", ICCV 2021, https://arxiv.org/abs/2012.03816. Both papers train the network that generates
the noise; here it is small, random and never trained. As in the papers, triggered images have no
pattern in common; as in the first, cover images carry another image's noise and their true label.
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

    The output of g has mean zero in each channel; an image of one colour does not change. With a
    cover rate, `poison` adds to cover images the noise of another image, so that only an image's
    own noise acts as the trigger.

    Attributes:
        amplitude: Largest change of a pixel, in [0, 1].
        generator_seed: Seed of the network's weights.
    """

    amplitude: float = 0.1
    generator_seed: int = 0

    def __post_init__(self) -> None:
        check_share("amplitude", self.amplitude)

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels + self._noise(pixels)).clamp(0, 1)

    def cover(self, pixels: Tensor, generator: Generator) -> Tensor:
        if len(pixels) < 2:
            raise DataError(
                "expected at least two cover images, since they carry each other's noise, got "
                f"{len(pixels)}; give a higher cover rate"
            )
        return (pixels + self._noise(pixels).roll(1, 0)).clamp(0, 1)

    def _noise(self, pixels: Tensor) -> Tensor:
        """(N, C, H, W) in [-amplitude, amplitude]."""
        channels = pixels.shape[1]
        generator = torch.Generator().manual_seed(self.generator_seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(pixels)

        first, bias = random(_HIDDEN, channels, _KERNEL, _KERNEL), random(_HIDDEN)
        second = random(channels, _HIDDEN, _KERNEL, _KERNEL)
        hidden = torch.tanh(_convolve(_standardise(pixels), first) + bias[:, None, None])
        return self.amplitude * torch.tanh(_standardise(_convolve(hidden, second)))


def _convolve(pixels: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(F.pad(pixels, [_KERNEL // 2] * 4, "replicate"), weight)


def _standardise(pixels: Tensor) -> Tensor:
    """Each channel of each image with mean 0 and variance 1, so that no common tint is left."""
    centred = pixels - pixels.mean((2, 3), keepdim=True)
    return centred / centred.square().mean((2, 3), keepdim=True).sqrt().clamp_min(1e-3)
