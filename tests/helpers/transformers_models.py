"""Small image classifiers of `transformers`, made from configurations; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.images import generator

transformers = pytest.importorskip("transformers")

CLASSES = 4
# name -> side of the images, and its configuration
SMALL: dict[str, tuple[int, dict[str, Any]]] = {
    "ViT": (
        32,
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
        | {"intermediate_size": 64, "image_size": 32},
    ),
    "ResNet": (32, {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}),
    "ConvNext": (
        32,
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32},
    ),
    "Swin": (
        32,
        {"image_size": 32, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
        | {"window_size": 4},
    ),
    "MobileViT": (
        64,
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": 2}
        | {
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 32],
            "aspp_out_channels": 16,
            "expand_ratio": 1.0,
            "classifier_dropout_prob": 0.0,
            "hidden_dropout_prob": 0.0,
        },
    ),
}


def small(name: str) -> nn.Module:
    """A network of four classes in eval mode, whose norms are stirred."""
    config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **SMALL[name][1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, f"{name}ForImageClassification")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim <= 1 or parameter.min() == parameter.max():
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def images_for(name: str, count: int) -> Tensor:
    """(count, 3, side, side), standard normal."""
    side = SMALL[name][0]
    return torch.randn(count, 3, side, side, generator=generator(1))


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """As somebody who uses transformers would call it."""
    with torch.no_grad():
        logits: Tensor = model(pixel_values=images).logits
    return logits
