"""BatchNorm statistics: which ones a pass uses."""

from __future__ import annotations

from typing import Literal

from torch import nn

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
