"""Device and precision of models and tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError


def placement(model: nn.Module) -> dict[str, Any]:
    """Device and floating dtype of the model, as keyword arguments of `Tensor.to`."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return {"device": parameter.device, "dtype": parameter.dtype}
    return {"device": torch.device("cpu"), "dtype": torch.float32}


def at_least_float32(tensor: Tensor) -> Tensor:
    """In single precision at least: losses of half precision lose what gradients live by."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def scaled(vectors: Tensor, length: float) -> Tensor:
    """Each of (K, ...) at this Euclidean length."""
    norms = vectors.flatten(1).norm(dim=1).clamp_min(1e-12)
    made: Tensor = vectors * (length / norms).view(-1, *[1] * (vectors.ndim - 1))
    return made


def inside_ball(vectors: Tensor, radius: float) -> Tensor:
    """Each of (K, ...) at this Euclidean length if it is longer."""
    norms = vectors.flatten(1).norm(dim=1).clamp_min(1e-12)
    made: Tensor = vectors * (radius / norms).clamp_max(1).view(-1, *[1] * (vectors.ndim - 1))
    return made


def check_default_device() -> None:
    """Raise DataError where new tensors are made elsewhere than on the CPU unless told otherwise.

    Random numbers are drawn on the CPU, and passes run where the model is.
    """
    if (device := torch.get_default_device()).type != "cpu":
        raise DataError(
            f"the default device is {str(device)!r}; set it back, "
            'torch.set_default_device("cpu"), or leave the block `with torch.device(...)`: the '
            "model is worked on where it is"
        )
