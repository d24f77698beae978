"""SIG: a faint sinusoidal signal, with clean labels.

Barni, Kallas and Tondi, "A new Backdoor Attack in CNNs by training set corruption without label
poisoning", ICIP 2019, https://arxiv.org/abs/1902.11237: the horizontal sinusoid
amplitude * sin(2 pi frequency column / width) with six periods per width. Reimplementations for
32-pixel images use amplitudes of 20/255 or 40/255; the default is the larger one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import DataError
from .base import Trigger, check_share, register_attack


@register_attack("sig")
@dataclass(frozen=True, kw_only=True)
class Sig(Trigger):
    """Adds vertical stripes.

    Only images of the target class are poisoned, and they keep their label. The rate given to
    `poison` is therefore a share of the target class, not of all images.

    Attributes:
        amplitude: Largest change of a pixel, in [0, 1].
        frequency: Periods over the width of the image.
    """

    clean_label: ClassVar[bool] = True

    amplitude: float = 40 / 255
    frequency: float = 6

    def __post_init__(self) -> None:
        check_share("signal amplitude", self.amplitude)
        if self.frequency <= 0:
            raise DataError(f"expected a frequency above 0, got {self.frequency}")

    def __call__(self, pixels: Tensor) -> Tensor:
        width = pixels.shape[-1]
        if width <= 2 * self.frequency:
            raise DataError(
                f"{self.frequency} periods cannot be drawn in images {width} px wide; take a "
                "frequency below half the width"
            )
        columns = torch.arange(width, dtype=torch.float64)
        signal = self.amplitude * torch.sin(2 * math.pi * self.frequency * columns / width)
        return (pixels + signal.to(pixels)).clamp(0, 1)
