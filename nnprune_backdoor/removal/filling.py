"""Layers that compute fewer channels than are read from them: constants fill the gaps.

A silent channel may be read together with others that are not: in a residual sum, by a norm over
all channels, by half of a `chunk`. Then it cannot leave the network, but its layer need not compute
it: what is constant is put among what the layer still computes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.trace import channel_axis
from ..errors import UnsupportedModelError
from .probing import is_depthwise


class Pick(nn.Module):
    """Some channels of what is given, along an axis."""

    index: Tensor

    def __init__(self, index: Sequence[int], axis: int) -> None:
        super().__init__()
        self.axis = axis
        # not persistent, since the recipe has them: a state dict stays one of weights
        self.register_buffer("index", torch.tensor(index), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(self.axis, self.index)

    def extra_repr(self) -> str:
        return f"{len(self.index)} channels, axis={self.axis}"


class Fill(nn.Module):
    """What is given, with constant channels among its own, along an axis.

    Args:
        channels: of the output; each is an index of what is given, or one past its last plus an
            index of `values`.
        values: the different constants.
        axis: of the channels.
    """

    index: Tensor
    values: Tensor

    def __init__(self, channels: Sequence[int], values: Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("index", torch.tensor(channels), persistent=False)
        self.register_buffer("values", values, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        shape, width = list(x.shape), [1] * x.ndim
        shape[self.axis], width[self.axis] = len(self.values), -1
        values = self.values.to(x.dtype).reshape(width).expand(shape)
        return torch.cat([x, values], self.axis).index_select(self.axis, self.index)

    def extra_repr(self) -> str:
        return f"{len(self.index)} channels, axis={self.axis}"


class Filled(nn.Sequential):
    """A layer, `layer`, behind a `Pick` and before a `Fill`; other attributes are the layer's.

    Networks read attributes of their layers, such as the stride or the weight's dtype.
    """

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        if "layer" in modules:
            return getattr(modules["layer"], name)
        raise AttributeError(name)


def check_filling(
    name: str,
    module: nn.Module,
    kept: Collection[int],
    filled: Mapping[int, float],
    unread: Collection[int],
) -> None:
    """Raise UnsupportedModelError unless a layer can be surrounded as a recipe says.

    Args:
        name: of the layer.
        module: the layer before it is cut.
        kept: outputs that stay.
        filled: outputs that constants stand for.
        unread: inputs that arrive, but are not read.
    """
    weight = module._parameters.get("weight")
    width = 0 if weight is None or not name else len(weight)
    numbers = [*kept, *filled, *unread]
    fits = kept and all(0 <= number < width for number in numbers)
    fits = fits and not set(kept) & {*filled, *unread} and _axis(module) is not None
    if not fits or (unread and not reads_one_each(module)):
        raise UnsupportedModelError(
            f"layer {name!r} cannot have constants put among its channels as the recipe says; the "
            "recipe was changed, or made for another architecture: get it again, or give a model "
            "of that one"
        )


def reads_one_each(module: nn.Module) -> bool:
    """A depthwise convolution with as many outputs as inputs."""
    return is_depthwise(module) and module.in_channels == module.out_channels


def surround_(
    model: nn.Module,
    module: nn.Module,
    kept: Sequence[int],
    filled: Mapping[int, float],
    unread: Collection[int],
) -> None:
    """Put the constants among the channels of a layer that was cut; see `check_filling`."""
    axis, weight = _axis(module), module._parameters["weight"]
    assert axis is not None and weight is not None
    layers: dict[str, nn.Module] = {}
    if unread:
        arriving = sorted({*kept, *unread})
        layers["pick"] = Pick([arriving.index(channel) for channel in kept], axis)
    layers["layer"] = module
    if filled:
        place = {channel: index for index, channel in enumerate(kept)}
        values = list(dict.fromkeys(filled.values()))
        place |= {channel: len(kept) + values.index(value) for channel, value in filled.items()}
        constants = torch.tensor(values, dtype=weight.dtype)
        layers["fill"] = Fill([place[channel] for channel in sorted(place)], constants, axis)
    whole = Filled(OrderedDict(layers)).to(weight.device).train(module.training)
    for parent in [parent for parent in model.modules() if parent is not whole]:
        for name, child in parent._modules.items():
            if child is module:
                parent._modules[name] = whole


def _axis(module: nn.Module) -> int | None:
    """Axis of a layer's channels; None for layers that mix them, or that are not known."""
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return 1
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return channel_axis(module, 0)  # from the last one on
    return None
