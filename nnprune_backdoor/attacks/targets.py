"""Where an attack sends each label: to one target, or each label to its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import DataError

Target = int | Sequence[int] | Tensor  # one label for all, or entry i for the images of label i


def all_to_all(classes: int) -> Tensor:
    """The label map (classes,) that shifts every label by one, the last one to 0."""
    return (torch.arange(classes) + 1) % classes


def wanted_labels(labels: Tensor, target: Target) -> Tensor:
    """What the attacker wants triggered images with true `labels` (N,) to be called: (N,).

    Raises:
        DataError: a map that is not one-dimensional or has no entry for some label.
    """
    where = torch.as_tensor(target, device=labels.device)
    if where.dim() == 0:
        return where.expand_as(labels)
    if where.dim() != 1 or (len(labels) and int(labels.max()) >= len(where)):
        raise DataError(
            "expected one target label, or a map with one entry per class; got a map of shape "
            f"{tuple(where.shape)} for labels up to {int(labels.max())}"
        )
    return where[labels]
