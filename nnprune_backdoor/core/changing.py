"""Training in eval mode networks that keep what they once computed from their weights.

In eval mode timm's LeViT, EfficientViT, EfficientFormer and TinyViT gather attention biases from a
weight in the first pass and keep them. While weights change these are of weights that are gone, and
so is the graph that the second backward pass would need. By convention such modules forget what
they keep whenever their mode is set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def changing_weights(model: nn.Module) -> Iterator[None]:
    """Inside the block each pass of the model starts from its weights, and so does the first after.

    Modes stay as they are.
    """
    keeping = any(type(module).train is not nn.Module.train for module in model.modules())
    if not keeping:
        yield
        return
    handle = model.register_forward_pre_hook(_forget)
    try:
        yield
    finally:
        handle.remove()
        _forget(model)


def _forget(model: nn.Module, *_: Any) -> None:
    modes = [(module, module.training) for module in model.modules()]
    model.train(model.training)
    for module, mode in modes:
        module.training = mode
