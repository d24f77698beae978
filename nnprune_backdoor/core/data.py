"""Clean images and their labels, checked once and kept in memory.

A few hundred images fit, and holding them makes every later step independent of the loader: its
shuffling, its workers and its random augmentation act once, while it is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..utils.tensors import placement
from .loaders import check_integer_labels, read_batches
from .splits import jittered, stratified


@dataclass(frozen=True)
class CleanData:
    """Clean images (N, C, H, W), normalised as the model expects, and labels (N,) or None."""

    images: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        _check_images(self.images)
        if self.labels is not None:
            check_integer_labels(self.labels, len(self.images))
            object.__setattr__(self, "labels", self.labels.reshape(-1).long())

    def __len__(self) -> int:
        return len(self.images)

    @property
    def targets(self) -> Tensor:
        """The labels (N,), int64; an error where the loader gave none."""
        if self.labels is None:
            raise DataError(
                "expected labelled clean images, got images alone; give batches (images, labels), "
                "or choose a criterion and a selector that need no labels"
            )
        return self.labels

    @classmethod
    def collect(cls, clean: CleanData | Iterable[Any]) -> CleanData:
        """Read a loader to its end; what comes back lies on the CPU.

        Args:
            clean: batches (images, labels, ...), (images,), images alone, or dictionaries with one
                of the usual keys (image, pixel_values, label, target, ...). Images: (B, C, H, W).

        Raises:
            DataError: nothing in it, shapes that differ, labels that are no integers, NaN or inf.
        """
        if not isinstance(clean, CleanData):
            return cls(*read_batches(clean))
        labels_elsewhere = clean.labels is not None and clean.labels.device.type != "cpu"
        plain = not clean.images.requires_grad and not clean.images.is_inference()
        if clean.images.device.type == "cpu" and not labels_elsewhere and plain:
            return clean
        images = clean.images.detach().cpu()
        # an inference tensor can be cloned but not be differentiated
        images = images.clone() if images.is_inference() else images
        return cls(images, None if clean.labels is None else clean.labels.cpu())

    def moved_to(self, model: nn.Module) -> CleanData:
        """Images on the model's device if an eighth of its free memory holds them, else on the CPU.

        No pass over them then copies any. Labels stay on the CPU.
        """
        device = placement(model)["device"]
        size = self.images.numel() * self.images.element_size()
        if self.images.device != device and size > _free(device) / 8:
            device = torch.device("cpu")
        labels = None if self.labels is None else self.labels.cpu()
        return self._checked(self.images.to(device), labels)

    @classmethod
    def _checked(cls, images: Tensor, labels: Tensor | None) -> CleanData:
        """Images and labels that were looked at before: doing so again makes a GPU wait."""
        made = object.__new__(cls)
        object.__setattr__(made, "images", images)
        object.__setattr__(made, "labels", labels)
        return made

    def take(self, indices: Tensor) -> CleanData:
        """The images (and labels) at `indices` (K,)."""
        return self._checked(
            self.images[indices], None if self.labels is None else self.labels[indices]
        )

    def examples(self) -> Tensor:
        """Up to 8 of the images, (N, C, H, W), to try something on."""
        return self.images[:8]

    def concatenate(self, other: CleanData) -> CleanData:
        """These images and the other ones; with labels if both have them."""
        labels = None
        if self.labels is not None and other.labels is not None:
            labels = torch.cat([self.labels, other.labels])
        images = torch.cat([self.images, other.images.to(self.images.device)])
        return self._checked(images, labels)

    def split(self, *shares: float, seed: int = 0) -> list[CleanData]:
        """Cut into disjoint parts of the given shares, class by class where labels are known.

        Raises:
            DataError: the shares do not sum to 1, or a part would be empty.
        """
        parts = stratified(self.labels, len(self), shares, seed)
        return [self.take(part) for part in parts]

    def batches(
        self, size: int, generator: torch.Generator, *, replacement: bool = False, shift: int = 0
    ) -> Iterator[CleanData]:
        """One epoch in random order; a single image left over joins the batch before it.

        Args:
            replacement: draw each image independently, all batches of full size.
            shift: largest random translation in pixels; > 0 also mirrors at random.
        """
        count = len(self)
        if replacement:
            order = torch.randint(count, (-(-count // size) * size,), generator=generator)
        else:
            order = torch.randperm(count, generator=generator)
        chunks = list(order.split(size))
        if len(chunks) > 1 and len(chunks[-1]) == 1:
            chunks[-2:] = [torch.cat(chunks[-2:])]  # batch statistics need two images
        for chunk in chunks:
            part = self.take(chunk)
            if shift:
                part = self._checked(jittered(part.images, shift, generator), part.labels)
            yield part


def _free(device: torch.device) -> float:
    """Bytes that are free there; none where that cannot be asked."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or len(images) == 0:
        raise DataError(f"expected images (N, C, H, W) with N > 0, got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise DataError(
            f"expected floating-point images, normalised as the model expects, got {images.dtype}"
        )
    if not torch.isfinite(images).all():
        bad = int((~torch.isfinite(images.flatten(1)).all(1)).sum())
        raise DataError(f"{bad} of {len(images)} clean images hold NaN or inf; drop or repair them")
