"""A perturbation for each image by itself that moves it towards a label.

Projected gradient descent (Madry et al., "Towards Deep Learning Models Resistant to Adversarial
Attacks", ICLR 2018), towards a label and in a ball of the Euclidean norm. An image that gets there
is not moved on: training against it costs less accuracy so (Zhang et al., "Attacks Which Do Not
Kill Training Make Adversarial Learning Stronger", ICML 2020). A backdoor whose trigger differs from
image to image is a short cut that no universal perturbation shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.passes import Passes, Task, Work
from ..core.predictions import images_per_pass, predict_labels
from ..core.recovered import PixelRange
from ..errors import DataError
from ..utils.tensors import at_least_float32, inside_ball, placement, scaled


@dataclass(frozen=True, kw_only=True)
class IndividualPerturbations:
    """How they are found: normalised gradient steps inside a ball, from a random beginning.

    The paper trains CIFAR-10 against 7 steps of 2/255 inside 8/255 of the largest change, away from
    the right label. The ball of the mean square, the label and fewer steps are ours.

    Attributes:
        rms: Radius of the ball: root mean square change as a share of the valid range.
        steps: Gradient steps, each of a radius over their number; an image stops when it is there.
    """

    rms: float = 8 / 255
    steps: int = 4

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.rms <= 1:
            raise DataError(
                f"expected steps of at least 1 and rms in (0, 1], got {self.steps} and {self.rms:g}"
            )

    def passes(self, task: Task, batch: int, images: float) -> Work:
        """What moving so many images sends through the network, so many at once, if none stops."""
        return (Passes("images", max(1, min(batch, task.at_once)), self.steps * images),)

    def perturb(
        self,
        model: nn.Module,
        images: Tensor,
        label: int,
        pixels: PixelRange,
        generator: torch.Generator,
    ) -> Tensor:
        """The images, each changed so that the model sends it to the label if it can.

        Nothing of the model changes; no gradient of its weights is computed.

        Args:
            model: (N, C, H, W) -> (N, classes), in eval mode.
            images: (N, C, H, W), normalised as the model expects.
            label: that they are moved towards.
            pixels: valid range; what is returned lies in it.
            generator: of the random beginnings, on the CPU.

        Returns:
            (N, C, H, W), of the type and on the device of `images`.
        """
        place = placement(model)
        low, high = pixels.low.to(**place), pixels.high.to(**place)
        given = images.to(**place)
        radius = self.rms * given[0].numel() ** 0.5
        labels = torch.full((len(given),), label, device=given.device)
        # in shares of the valid range, where all channels weigh alike
        shares = torch.randn(given.shape, generator=generator).to(**place)
        shares = scaled(shares, 0.1 * radius)
        for _ in range(self.steps):
            shares.requires_grad_(True)
            logits = model((given + shares * (high - low)).clamp(low, high))
            there = (logits.argmax(1) == label)[:, None, None, None]
            if there.all():
                break
            loss = F.cross_entropy(at_least_float32(logits), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, shares)
            with torch.no_grad():
                moved = inside_ball(shares - scaled(gradient, radius / self.steps), radius)
                shares = torch.where(there, shares, moved)
        return (given + shares.detach() * (high - low)).clamp(low, high).to(images)

    def reach(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Iterable[int],
        pixels: PixelRange,
        *,
        seed: int = 0,
    ) -> dict[int, float]:
        """The share of the images that are sent to each label, without those already there.

        Args:
            model, images, pixels: as for `perturb`.
            labels: classes of the model.
            seed: of the random beginnings, the same for every label.
        """
        predicted = predict_labels(model, images)
        shares = {}
        for label in labels:
            others, generator = images[predicted != label], torch.Generator().manual_seed(seed)
            sent = torch.zeros(1, dtype=torch.bool)
            if len(others):
                parts = others.split(images_per_pass(others, model))
                moved = [self.perturb(model, part, label, pixels, generator) for part in parts]
                sent = predict_labels(model, torch.cat(moved)) == label
            shares[label] = sent.float().mean().item()
        return shares
