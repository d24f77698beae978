"""Make a recipe from channels that can be removed."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from .liveness import Removable
from .probing import is_dense
from .recipe import ATTRIBUTES, Cut, Recipe


def recipe_of(names: dict[nn.Module, str], removable: Removable) -> Recipe:
    """The recipe that cuts these channels out; `names` has the names of their layers."""
    narrowed, none = removable.narrowed, torch.zeros(0, dtype=torch.bool)
    outputs_of, between = dict(removable.outputs), dict(removable.between)
    for module, marks in narrowed.outputs.items():
        if is_dense(module):
            outputs_of[module] = marks | outputs_of.get(module, marks)
        else:
            before, after = between.get(module, (marks, marks))
            between[module] = before | marks, after | marks
    layers = {}
    for module in dict.fromkeys([*removable.inputs, *outputs_of]):
        inputs, outputs = removable.inputs.get(module, none), outputs_of.get(module, none)
        constants = removable.constants.get(module)
        layers[names[module]] = _dense_cut(module, inputs, outputs, constants)
    for module, (before, after) in between.items():
        layers[names[module]] = _between_cut(module, before, after)
    for module, marks in narrowed.outputs.items():
        channels, values = marks.nonzero().flatten().tolist(), narrowed.values.get(module)
        filled = {} if values is None else {c: float(values[c]) for c in channels}
        unread = tuple(channels) if module in narrowed.unread else ()
        cut = layers[names[module]]
        layers[names[module]] = dataclasses.replace(cut, filled=filled, unread=unread)
    return Recipe({name: cut for name, cut in layers.items() if cut.kept or cut.attributes})


def _dense_cut(module: nn.Module, inputs: Tensor, outputs: Tensor, constants: Tensor | None) -> Cut:
    """The cut of a linear layer or convolution; marks are empty for a side that stays whole."""
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
                kept[name] = {0: stay_of(outputs)}
    if len(inputs):
        attributes["in_features" if isinstance(module, nn.Linear) else "in_channels"] = int(
            (~inputs).sum()
        )
        group_inputs = inputs.reshape(groups, -1)[~whole][0]  # the same in every group that stays
        if group_inputs.any():
            kept.setdefault("weight", {})[1] = stay_of(group_inputs)
        if constants is not None:
            replaced = inputs & (constants != 0)
            values = {c: float(constants[c]) for c in replaced.nonzero().flatten().tolist()}
    if values and len(outputs):
        kept["bias"] = {0: stay_of(outputs)}  # also of a bias that is only made for the constants
    return Cut(kept, attributes, values)


def _between_cut(module: nn.Module, before: Tensor, after: Tensor) -> Cut:
    """The cut of a norm, a depthwise convolution or a scale."""
    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, tensor in _tensors(module).items():
        dims = [dim for dim, size in enumerate(tensor.shape) if size == len(after)]
        if dims:
            kept[name] = {dims[0]: stay_of(after)}
    attributes = {}
    for name in ATTRIBUTES:
        marks = before if name in ("in_channels", "groups") else after
        if getattr(module, name, None) == len(marks):
            attributes[name] = int((~marks).sum())
    if isinstance(module, nn.GroupNorm):
        attributes["num_groups"] = int((~after.reshape(module.num_groups, -1).all(1)).sum())
    return Cut(kept, attributes)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    tensors = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def stay_of(marks: Tensor) -> tuple[int, ...]:
    """Indices that are not marked."""
    return tuple((~marks).nonzero().flatten().tolist())
