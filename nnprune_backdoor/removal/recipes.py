"""From channels that can go (`liveness.Lane`) to what happens to each tensor (`recipe.Recipe`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .liveness import Lane
from .recipe import ATTRIBUTES, Cut, Recipe


def recipe_of(names: dict[nn.Module, str], lane: Lane) -> Recipe:
    """The recipe that takes a lane out."""
    layers = {}
    for module in dict.fromkeys([*lane.inputs, *lane.outputs]):
        none = torch.zeros(0, dtype=torch.bool)
        inputs, outputs = (marks.get(module, none) for marks in (lane.inputs, lane.outputs))
        layers[names[module]] = _dense_cut(module, inputs, outputs, lane.constants.get(module))
    for module, (before, after) in lane.along.items():
        layers[names[module]] = _between_cut(module, before, after)
    return Recipe({name: cut for name, cut in layers.items() if cut.kept or cut.attributes})


def _dense_cut(module: nn.Module, inputs: Tensor, outputs: Tensor, constants: Tensor | None) -> Cut:
    """Of a convolution or linear layer; marks are empty where a side stays whole."""
    attributes: dict[str, int] = {}
    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    values: dict[int, float] = {}
    groups = int(getattr(module, "groups", 1))
    whole = torch.zeros(groups, dtype=torch.bool, device=outputs.device)
    if len(inputs) and len(outputs):
        whole = inputs.reshape(groups, -1).all(1) & outputs.reshape(groups, -1).all(1)
    if whole.any():
        attributes["groups"] = int((~whole).sum())
    if len(outputs):
        attributes["out_features" if isinstance(module, nn.Linear) else "out_channels"] = int(
            (~outputs).sum()
        )
        for name, tensor in _tensors(module).items():
            if tensor.ndim and tensor.shape[0] == len(outputs):
                kept[name] = {0: _stay(outputs)}
    if len(inputs):
        attributes["in_features" if isinstance(module, nn.Linear) else "in_channels"] = int(
            (~inputs).sum()
        )
        places = inputs.reshape(groups, -1)[~whole][0]  # the same in every group that stays
        if places.any():
            kept.setdefault("weight", {})[1] = _stay(places)
        if constants is not None:
            gone = inputs & (constants != 0)
            values = {c: float(constants[c]) for c in gone.nonzero().flatten().tolist()}
    if values and len(outputs):
        kept["bias"] = {0: _stay(outputs)}  # also where it is only made by folding
    return Cut(kept, attributes, values)


def _between_cut(module: nn.Module, before: Tensor, after: Tensor) -> Cut:
    """Of a norm, a depthwise convolution, a scale: whatever channels pass through."""
    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, tensor in _tensors(module).items():
        dims = [dim for dim, size in enumerate(tensor.shape) if size == len(after)]
        if dims:
            kept[name] = {dims[0]: _stay(after)}
    attributes = {}
    for name in ATTRIBUTES:
        marks = before if name in ("in_channels", "groups") else after
        if getattr(module, name, None) == len(marks):
            attributes[name] = int((~marks).sum())
    return Cut(kept, attributes)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    held = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def _stay(marks: Tensor) -> tuple[int, ...]:
    return tuple((~marks).nonzero().flatten().tolist())
