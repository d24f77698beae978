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
from ..utils.short_repr import ShortRepr
from ..utils.tensors import check_default_device, placement
from .loaders import check_images, check_integer_labels, own, read_batches
from .splits import equal_images, jittered, stratified


@dataclass(frozen=True, repr=False)
class CleanData(ShortRepr):
    """Clean images (N, C, H, W), normalised as the model expects, and labels (N,) or None.

    It holds the tensors that it is made of; what `collect` reads from a loader is copied.
    """

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
        """Copy a loader's images, to its end; what comes back lies on the CPU.

        Args:
            clean: batches (images, labels, ...), (images,), images alone, or dictionaries or
                objects with one of the usual keys (image, pixel_values, label, target, ...).
                Images: (B, C, H, W).

        Raises:
            DataError: nothing in it, no end to it, shapes that differ, labels that are no integers,
                NaN or inf; tensors are not made on the CPU by default.
        """
        check_default_device()
        if not isinstance(clean, CleanData):
            return cls(*read_batches(clean))
        tensors = [clean.images] if clean.labels is None else [clean.images, clean.labels]
        if all(_usable(tensor) for tensor in tensors):
            return clean
        return cls(*map(own, tensors))

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

        Equal images come into the same part, so that no part is measured on what another one saw.

        Raises:
            DataError: the shares do not sum to 1, or a part would be empty.
        """
        labels = None if self.labels is None else self.labels.cpu()
        parts = stratified(labels, equal_images(self.images), shares, seed)
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


def _usable(tensor: Tensor) -> bool:
    """On the CPU, without a history; a tensor of inference mode could not be differentiated."""
    plain = not tensor.requires_grad and not tensor.is_inference()
    return plain and tensor.device.type == "cpu"


def _check_images(images: Tensor) -> None:
    check_images(images)
    if images.numel() == 0:
        raise DataError(
            f"expected images (N, C, H, W) with C, H, W and N > 0, got {tuple(images.shape)}"
        )
    if not torch.isfinite(images).all():
        bad = int((~torch.isfinite(images.flatten(1)).all(1)).sum())
        raise DataError(f"{bad} of {len(images)} clean images hold NaN or inf; drop or repair them")
