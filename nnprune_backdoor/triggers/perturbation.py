"""One small picture that, added to any image, sends it to a label.

Moosavi-Dezfooli, Fawzi, Fawzi and Frossard, "Universal adversarial perturbations", CVPR 2017; here
one for each label. A backdoor whose trigger covers the whole image is such a short cut, and so are
the ones that every network has: how well a small one works is evidence only beside what benign
networks give.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.recovered import PixelRange
from ..errors import DataError
from ..utils.short_repr import ShortRepr
from ..utils.tensors import inside_ball, scaled
from .universal import UniversalSearch


@dataclass(frozen=True, eq=False, repr=False)
class RecoveredPerturbation(ShortRepr):
    """A picture that sends images to `target` when it is added; calling it adds it.

    Attributes:
        target: The label that images are sent to.
        pattern: What is added, (C, H, W), in the unit of the normalised images, on the CPU.
        pixels: Valid range; sums are clamped to it.
        success: Share of held-out clean images sent to the target, without those already there.
        tested: Number of images behind that share; success is 0 where there were none.
    """

    target: int
    pattern: Tensor
    pixels: PixelRange
    success: float
    tested: int

    @property
    def rms(self) -> float:
        """Root mean square of the pattern, as a share of the valid range."""
        return self._shares.square().mean().sqrt().item()

    @property
    def largest(self) -> float:
        """Largest change of one value, as a share of the valid range."""
        return self._shares.abs().max().item()

    @property
    def _shares(self) -> Tensor:
        return self.pattern / (self.pixels.high - self.pixels.low)

    def __call__(self, images: Tensor) -> Tensor:
        """Add to images (N, C, H, W), normalised as the model expects; same shape and dtype."""
        low, high = self.pixels.low.to(images), self.pixels.high.to(images)
        return (images + self.pattern.to(images)).clamp(low, high)


@dataclass(frozen=True, kw_only=True)
class UniversalPerturbation(UniversalSearch[RecoveredPerturbation]):
    """How they are found: inside a ball; the first step is an eighth of its radius.

    Attributes:
        rms: Radius of the ball: root mean square change as a share of the valid range.
        steps, batch_size, momentum, held_out: see `UniversalSearch`.
    """

    rms: float = 8 / 255

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rms <= 1:
            raise DataError(f"expected rms in (0, 1], got {self.rms:g}")

    def longest(self, values: int) -> float:
        return self._radius(values) / 8

    def beginning(self, noise: Tensor) -> Tensor:
        return scaled(noise, 0.1 * self._radius(noise[0].numel()))

    def kept(self, pictures: Tensor) -> Tensor:
        return inside_ball(pictures, self._radius(pictures[0].numel()))

    def shown(self, images: Tensor, pictures: Tensor, pixels: PixelRange) -> Tensor:
        low, high = pixels.low.to(images), pixels.high.to(images)
        added = images + (pictures.to(images) * (high - low))[:, None]
        return added.clamp(low, high)

    def made(
        self, label: int, picture: Tensor, pixels: PixelRange, success: float, tested: int
    ) -> RecoveredPerturbation:
        span = pixels.high - pixels.low
        return RecoveredPerturbation(label, picture.to(span) * span, pixels, success, tested)

    def _radius(self, values: int) -> float:
        return self.rms * float(values**0.5)
