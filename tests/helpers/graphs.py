"""A network whose weights show which channels are left, and groups of channels as plain data."""

from __future__ import annotations

from dataclasses import dataclass

import timm
import torch
import torch_pruning as tp
from torch import nn

from helpers.images import noise_images
from nnprune_backdoor.importance.graph import members

EXAMPLE = noise_images(2)


def narrow() -> nn.Module:
    """A ResNet-18 in eval mode with few channels, whose rows and columns say who they were.

    Row i of every convolution is i everywhere (and so is channel i of every norm): whatever is
    cut, and however the columns are cut, a row still tells its original index.
    """
    model: nn.Module = timm.create_model("resnet18", num_classes=10, channels=(8, 16, 16, 32))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                rows = torch.arange(float(module.out_channels))
                module.weight.copy_(rows[:, None, None, None].expand_as(module.weight))
            elif isinstance(module, nn.BatchNorm2d):
                module.bias.copy_(torch.arange(float(module.num_features)))
    return model.eval()


def marks(model: nn.Module) -> dict[str, list[int]]:
    """Layer -> original indices of its output channels, read from the weights."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            found[name] = module.weight[:, 0, 0, 0].int().tolist()
        elif isinstance(module, nn.BatchNorm2d):
            found[name] = module.bias.int().tolist()
    return found


@dataclass(frozen=True)
class End:
    """Channels that a group takes from one side of a layer, and the root channels they go with."""

    name: str
    output: bool
    channels: tuple[int, ...]
    roots: tuple[int | None, ...]


def describe(group: tp.dependency.Group) -> tuple[End, ...]:
    """All that a group takes, the root first."""
    is_output = group._DG.is_out_channel_pruning_fn
    return tuple(
        End(name, is_output(dependency.handler), channels, roots)
        for name, dependency, channels, roots in members(group)
    )
