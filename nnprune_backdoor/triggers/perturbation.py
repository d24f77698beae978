"""One small picture that, added to any image, sends it to a label.

Moosavi-Dezfooli, Fawzi, Fawzi and Frossard, "Universal adversarial perturbations", CVPR 2017; here
one for each label. A backdoor whose trigger covers the whole image is such a short cut, and so are
the ones that every network has: how well a small one works is evidence only beside what benign
networks give.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.data import CleanData
from ..core.passes import Task, Work
from ..core.predictions import predict_labels
from ..core.recovered import PixelRange
from ..errors import DataError, ScoringError
from ..utils.progress import progress_bar
from ..utils.randomness import checked_seed, private_randomness
from ..utils.short_repr import ShortRepr
from ..utils.tensors import at_least_float32, inside_ball, placement, scaled
from .search import Search, search_passes


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
class UniversalPerturbation:
    """How they are found: normalised gradient steps with momentum, inside a ball.

    The first step is an eighth of the ball's radius, the last one zero.

    Attributes:
        rms: Radius of the ball: root mean square change as a share of the valid range.
        steps: Gradient steps.
        batch_size: Images for each label and step.
        momentum: Of the steps.
        held_out: Share of the images that only measure success.
    """

    rms: float = 8 / 255
    steps: int = 60
    batch_size: int = 16
    momentum: float = 0.9
    held_out: float = 0.3

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size) < 1 or not 0 < self.rms <= 1:
            raise DataError("expected steps and batch_size of at least 1 and rms in (0, 1]")

    def passes(self, task: Task, labels: int) -> Work:
        """What a search for so many labels sends through the network."""
        held = self.held_out * task.images
        fit = task.images - held
        search = search_passes(task, fit, self.batch_size, self.steps, labels)
        return (*search, task.forward((labels + 1) * held))

    def recover(
        self,
        model: nn.Module,
        clean: CleanData | Iterable[Any],
        labels: Iterable[SupportsIndex] | None = None,
        *,
        pixels: PixelRange | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> tuple[RecoveredPerturbation, ...]:
        """One a label, several labels to a forward pass; arguments as of `Inversion.recover`.

        Raises:
            DataError, UnsupportedModelError: as there.
            ScoringError: the loss became NaN or inf.
        """
        seed = checked_seed(seed)
        with private_randomness(seed), torch.enable_grad():
            search = Search.of(
                model,
                clean,
                labels,
                pixels,
                held_out=self.held_out,
                batch_size=self.batch_size,
                seed=seed,
            )
            found: list[RecoveredPerturbation] = []
            steps = self.steps * len(search.groups)
            predicted = predict_labels(search.model, search.held.images)
            with progress_bar(steps, "universal perturbations", progress) as bar:
                for group in search.groups:
                    patterns = self._descend(search, group, seed=seed, bar=bar)
                    for label, pattern in zip(group, patterns, strict=True):
                        others = search.held.images[predicted != label]
                        made = RecoveredPerturbation(label, pattern, search.pixels, 0.0, 0)
                        sent = predict_labels(search.model, made(others)) == label
                        success = sent.float().mean().item() if len(sent) else 0.0
                        found.append(replace(made, success=success, tested=len(sent)))
        return tuple(found)

    def _descend(self, search: Search, labels: list[int], *, seed: int, bar: Any) -> Tensor:
        """Patterns (K, C, H, W) for a few labels at once, on the CPU."""
        model, fit, pixels = search.model, search.fit, search.pixels
        place = placement(model)
        low, high = pixels.low.to(**place), pixels.high.to(**place)
        # in shares of the valid range, where all channels weigh alike
        shape = fit.images.shape[1:]
        radius = self.rms * shape.numel() ** 0.5
        # beginnings and batches depend on the seed and the label alone, not on the company
        start = [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed + label))
            for label in labels
        ]
        shares = scaled(torch.stack(start), 0.1 * radius).to(place["device"])
        velocity = torch.zeros_like(shares)
        generator = torch.Generator().manual_seed(seed)
        size = min(self.batch_size, len(fit))
        targets = torch.tensor(labels, device=place["device"]).repeat_interleave(size)
        for step in range(self.steps):
            chosen = torch.randint(len(fit), (size,), generator=generator)
            images = fit.images[chosen].to(**place)
            shares.requires_grad_(True)
            added = images + (shares.to(images) * (high - low))[:, None]
            logits = at_least_float32(model(added.clamp(low, high).flatten(0, 1)))
            loss = F.cross_entropy(logits, targets, reduction="sum")
            if not torch.isfinite(loss):
                raise ScoringError(
                    f"the search for universal perturbations diverged after {step} steps; does "
                    "the model give finite logits on all valid images?"
                )
            (gradient,) = torch.autograd.grad(loss, shares)
            with torch.no_grad():
                velocity = self.momentum * velocity + scaled(gradient, 1.0)
                length = radius / 8 * (1 - step / self.steps)
                shares = inside_ball(shares.detach() - scaled(velocity, length), radius)
            bar.update()
        return (shares.to(low) * (high - low)).float().cpu()
