"""Read clean images, and labels if there are any, from whatever loader the user has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError

_IMAGE_KEYS = ("image", "images", "pixel_values", "x", "input", "inputs", "data")
_LABEL_KEYS = ("label", "labels", "target", "targets", "y")


def read_batches(loader: Iterable[Any]) -> tuple[Tensor, Tensor | None]:
    """All images (N, C, H, W) and labels (N,) of a loader, on the CPU.

    Args:
        loader: batches (images, labels, ...), (images,), images alone, or dictionaries with one
            of the usual keys (image, pixel_values, label, target, ...). Images: (B, C, H, W).

    Raises:
        DataError: nothing in it, shapes that differ, labels that are no integers.
    """
    if isinstance(loader, Tensor):
        raise DataError(
            "expected a loader (an iterable of batches), got a tensor; "
            "wrap it: CleanData(images, labels)"
        )
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for number, batch in enumerate(loader):
        x, y = _unpack(batch, number)
        if images and x.shape[1:] != images[0].shape[1:]:
            raise DataError(
                f"expected images of shape {tuple(images[0].shape[1:])} as in batch 0, got "
                f"{tuple(x.shape[1:])} in batch {number}; resize them to one size"
            )
        if (y is None) != (not labels) and images:
            raise DataError(f"batch {number}: some batches have labels and some have none")
        images.append(x.detach().cpu())
        if y is not None:
            labels.append(y.detach().cpu().reshape(-1))
    if not images:
        raise DataError("the clean loader is empty; give at least a few images per class")
    return torch.cat(images), torch.cat(labels).long() if labels else None


def _unpack(batch: Any, number: int) -> tuple[Tensor, Tensor | None]:
    images: Any = batch
    labels: Any = None
    if isinstance(batch, Mapping):
        images = next((batch[key] for key in _IMAGE_KEYS if key in batch), None)
        labels = next((batch[key] for key in _LABEL_KEYS if key in batch), None)
    elif isinstance(batch, (tuple, list)) and batch:
        images = batch[0]
        labels = batch[1] if len(batch) > 1 else None
    if not isinstance(images, Tensor):
        keys = f" with keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else ""
        raise DataError(
            f"batch {number}: expected (images, labels), images, or a dictionary with one of "
            f"{_IMAGE_KEYS}, got {type(batch).__name__}{keys}"
        )
    if images.ndim != 4:
        raise DataError(
            f"batch {number}: expected images (B, C, H, W), got shape {tuple(images.shape)}"
        )
    if labels is not None:
        try:
            labels = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"batch {number}: expected {len(images)} integer labels, one an image ({error}); "
                "class indices are needed, not names"
            ) from error
        check_integer_labels(labels, len(images))
    return images, labels


def check_integer_labels(labels: Tensor, count: int) -> None:
    """Raise DataError unless these are `count` integers."""
    if labels.is_floating_point() or labels.is_complex() or labels.numel() != count:
        raise DataError(
            f"expected {count} integer labels, one an image, got shape {tuple(labels.shape)} of "
            f"{labels.dtype}; class indices are needed, not one-hot rows or probabilities"
        )
