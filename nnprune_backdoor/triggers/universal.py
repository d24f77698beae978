"""What every search for a picture that works on all images does: steps along the gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, SupportsIndex, TypeVar

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
from ..utils.tensors import at_least_float32, placement, scaled
from .search import Search, search_passes

Found = TypeVar("Found", bound=Callable[[Tensor], Tensor])


@dataclass(frozen=True, kw_only=True)
class UniversalSearch(ABC, Generic[Found]):
    """Normalised gradient steps with momentum; the first is the longest, the last one zero.

    Pictures are held in shares of the valid range, where all channels weigh alike.

    Attributes:
        steps: Gradient steps.
        batch_size: Images for each label and step.
        momentum: Of the steps.
        held_out: Share of the images that only measure success.
    """

    steps: int = 60
    batch_size: int = 16
    momentum: float = 0.9
    held_out: float = 0.3

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size) < 1:
            raise DataError("expected steps and batch_size of at least 1")

    @abstractmethod
    def longest(self, values: int) -> float:
        """Length of the first step for a picture of so many values."""

    @abstractmethod
    def beginning(self, noise: Tensor) -> Tensor:
        """Pictures (K, C, H, W) to begin with, from normal noise of that shape."""

    @abstractmethod
    def kept(self, pictures: Tensor) -> Tensor:
        """The valid pictures nearest to these (K, C, H, W)."""

    @abstractmethod
    def shown(self, images: Tensor, pictures: Tensor, pixels: PixelRange) -> Tensor:
        """Images (N, C, H, W) under each picture, (K, N, C, H, W)."""

    @abstractmethod
    def made(
        self, label: int, picture: Tensor, pixels: PixelRange, success: float, tested: int
    ) -> Found:
        """The trigger of a picture (C, H, W), on the CPU."""

    def passes(self, task: Task, labels: int) -> Work:
        """What a search for so many labels sends through the network."""
        held = self.held_out * task.images
        fit = task.images - held
        steps = search_passes(task, fit, self.batch_size, self.steps, labels)
        return (*steps, task.forward((labels + 1) * held))

    def recover(
        self,
        model: nn.Module,
        clean: CleanData | Iterable[Any],
        labels: Iterable[SupportsIndex] | None = None,
        *,
        pixels: PixelRange | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> tuple[Found, ...]:
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
            found: list[Found] = []
            steps = self.steps * len(search.groups)
            predicted = predict_labels(search.model, search.held.images)
            with progress_bar(steps, "universal perturbations", progress) as bar:
                for group in search.groups:
                    pictures = self._descend(search, group, seed=seed, bar=bar)
                    for label, picture in zip(group, pictures, strict=True):
                        others = search.held.images[predicted != label]
                        made = self.made(label, picture, search.pixels, 0.0, 0)
                        sent = predict_labels(search.model, made(others)) == label
                        success = sent.float().mean().item() if len(sent) else 0.0
                        found.append(self.made(label, picture, search.pixels, success, len(sent)))
        return tuple(found)

    def _descend(self, search: Search, labels: list[int], *, seed: int, bar: Any) -> Tensor:
        """Pictures (K, C, H, W) for a few labels at once."""
        model, fit = search.model, search.fit
        place = placement(model)
        shape = fit.images.shape[1:]
        # beginnings and batches depend on the seed and the label alone, not on the company
        noise = [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed + label))
            for label in labels
        ]
        pictures = self.beginning(torch.stack(noise)).to(place["device"])
        velocity = torch.zeros_like(pictures)
        generator = torch.Generator().manual_seed(seed)
        size = min(self.batch_size, len(fit))
        targets = torch.tensor(labels, device=place["device"]).repeat_interleave(size)
        for step in range(self.steps):
            chosen = torch.randint(len(fit), (size,), generator=generator)
            images = fit.images[chosen].to(**place)
            pictures.requires_grad_(True)
            shown = self.shown(images, pictures, search.pixels)
            logits = at_least_float32(model(shown.flatten(0, 1)))
            loss = F.cross_entropy(logits, targets, reduction="sum")
            if not torch.isfinite(loss):
                raise ScoringError(
                    f"the search for universal perturbations diverged after {step} steps; does "
                    "the model give finite logits on all valid images?"
                )
            (gradient,) = torch.autograd.grad(loss, pictures)
            with torch.no_grad():
                velocity = self.momentum * velocity + scaled(gradient, 1.0)
                length = self.longest(shape.numel()) * (1 - step / self.steps)
                pictures = self.kept(pictures.detach() - scaled(velocity, length))
            bar.update()
        return pictures
