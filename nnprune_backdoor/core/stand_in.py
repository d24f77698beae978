"""An image of noise that a model accepts, for what only watches how the network runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..utils.randomness import private_randomness
from ..utils.tensors import placement
from .copies import frozen_copy

_SIDES = (224, 32, 28, 64, 96, 128, 256, 299, 384)  # what classifiers are usually made for


def stand_in_images(model: nn.Module) -> Tensor:
    """Two images of noise (2, C, H, W), on the CPU, of a size that the model runs on.

    The size that the model names (`default_cfg` of timm, `config` of transformers), or else the
    first usual one.

    Raises:
        DataError: it runs on none of them.
        UnsupportedModelError: the model cannot be copied.
    """
    frozen = frozen_copy(model)
    for size in _sizes(frozen):
        images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
        try:
            with private_randomness(0), torch.no_grad():
                frozen(images.to(**placement(frozen)))
        except Exception:
            continue
        return images
    raise DataError(
        f"cannot tell what images this {type(model).__name__} takes; give one, without a label"
    )


def _sizes(model: nn.Module) -> Iterator[tuple[int, int, int]]:
    for module in model.modules():  # a wrapper's own, or the wrapped one's
        if named := _named_size(module):
            yield named
    convolutions = (m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    channels = next(convolutions, 3)
    yield from ((channels, side, side) for side in _SIDES)


def _named_size(module: nn.Module) -> tuple[int, int, int] | None:
    timm: Any = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
    if isinstance(timm, dict) and len(timm.get("input_size") or ()) == 3:
        channels, height, width = timm["input_size"]
        return int(channels), int(height), int(width)
    config = getattr(module, "config", None)
    side = getattr(config, "image_size", None)
    if isinstance(side, int):
        return int(getattr(config, "num_channels", 3)), side, side
    return None
