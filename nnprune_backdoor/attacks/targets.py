"""Targets of an attack: one label for all images, or one for each true label."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import DataError

Target = int | Sequence[int] | Tensor  # one label, or a map: entry i for images of label i


def all_to_all(classes: int) -> Tensor:
    """The map of labels (classes,) that adds one to each label; the last becomes 0."""
    return (torch.arange(classes) + 1) % classes


def target_labels(labels: Tensor, target: Target) -> Tensor:
    """The labels (N,) that the attacker wants for triggered images with true `labels` (N,).

    Raises:
        DataError: a map that is not one-dimensional or has no entry for some label.
    """
    targets = torch.as_tensor(target, device=labels.device)
    if targets.dim() == 0:
        return targets.expand_as(labels)
    if targets.dim() != 1 or (len(labels) and int(labels.max()) >= len(targets)):
        raise DataError(
            "expected one target label, or a map with one entry per class; got a map of shape "
            f"{tuple(targets.shape)} for labels up to {int(labels.max())}"
        )
    return targets[labels]
