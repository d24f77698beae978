"""Run a classifier on images in batches, and check labels given by hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import SupportsIndex

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..utils.progress import progress_bar
from ..utils.randomness import as_integer
from ..utils.tensors import placement


@torch.no_grad()
def predict(
    model: nn.Module, images: Tensor, batch_size: int = 256, progress: bool = False
) -> Tensor:
    """Predicted labels (N,) of images (N, C, H, W), in eval mode; the mode comes back."""
    modes = {module: module.training for module in model.modules()}
    where = placement(model)
    try:
        model.eval()
        parts = []
        with progress_bar(len(images), "predicting", progress) as bar:
            for part in images.split(batch_size):
                parts.append(model(part.to(**where)).argmax(1).cpu())
                bar.update(len(part))
    finally:
        for module, training in modes.items():
            module.training = training
    return torch.cat(parts)


def check_labels(labels: Iterable[SupportsIndex], classes: int) -> list[int]:
    """The labels as plain integers; DataError if none, one not in [0, classes) or one twice."""
    try:
        found = [as_integer(label, "a label") for label in labels]
    except TypeError:  # also a tensor without an axis
        raise DataError(f"expected a list of labels, got {labels!r}") from None
    good = all(0 <= label < classes for label in found)
    if not found or not good or len(set(found)) < len(found):
        raise DataError(f"expected different labels in [0, {classes}), got {found}")
    return found


@torch.no_grad()
def predict_labels(model: nn.Module, images: Tensor) -> Tensor:
    """The model's own labels (N,) for images (N, C, H, W), int64 on the CPU."""
    where, size = placement(model), max(16, at_once(images, model))
    return torch.cat([model(part.to(**where)).argmax(1).cpu() for part in images.split(size)])


def at_once(images: Tensor, model: nn.Module) -> int:
    """Images (N, C, H, W) a forward pass, fewer of larger ones, so that memory stays in bounds.

    An accelerator is idle with so few as a processor is content with: there, 16 times as many.
    """
    height, width = images.shape[2:]
    pixels = _AT_ONCE * 1024 * (1 if placement(model)["device"].type == "cpu" else 16)
    return max(1, min(_AT_ONCE, pixels // (height * width)))


_AT_ONCE = 256  # images a forward pass
