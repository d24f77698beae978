"""BatchNorm statistics: which ones a pass uses, and how to estimate them anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

Statistics = Literal["batch", "running"]

_BatchNorm = nn.modules.batchnorm._BatchNorm


def use_statistics_(model: nn.Module, statistics: Statistics) -> None:
    """Put the model into eval mode, its BatchNorm layers into train mode if `batch` is asked for.

    So that dropout and drop-path stay off: the published networks have none.
    """
    model.eval()
    if statistics == "batch":
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.train()


def keeps_statistics(module: nn.Module) -> bool:
    """Whether it is a BatchNorm with a running mean and variance."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def recalibrate_norms_(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    run: Callable[[Tensor], Tensor] | None = None,
    buffers: dict[str, Tensor] | None = None,
) -> None:
    """Replace all running means and variances by their averages over the batches, in place.

    Measured on backdoored ResNets: what this gives back in accuracy after silencing it gives back
    to the backdoor as well (docs/ranking.md), so nothing here does it unless asked.

    Args:
        batches: images (B, C, H, W) on the model's device, B >= 2; read once.
        run: what to run on them, by default the model; a masked view of it, for example.
        buffers: where `run` keeps the model's buffers, if not in the model.
    """
    layers: dict[str, Any] = {
        name: module for name, module in model.named_modules() if keeps_statistics(module)
    }
    held = dict(model.named_buffers()) if buffers is None else buffers
    modes = {module: module.training for module in model.modules()}
    momenta = {name: layer.momentum for name, layer in layers.items()}
    uncounted = [layer for layer in layers.values() if layer.num_batches_tracked is None]
    use_statistics_(model, "batch")
    try:
        for name, layer in layers.items():
            layer.momentum = None  # a cumulative average, which starts where the count is 0
            if layer in uncounted:
                layer.num_batches_tracked = torch.zeros((), dtype=torch.long)
            else:
                held[f"{name}.num_batches_tracked"].zero_()
        with torch.no_grad():
            for images in batches:
                (run or model)(images)
    finally:
        for name, layer in layers.items():
            layer.momentum = momenta[name]
            if layer in uncounted:
                layer.num_batches_tracked = None
        for module, training in modes.items():
            module.training = training
