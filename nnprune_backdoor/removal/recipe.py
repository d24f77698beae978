"""What was cut out of a network, as plain data, and how to cut it out of another copy.

A recipe says which original indices of each tensor stay, and which attributes of each layer change.
Applied to a network of the original architecture it gives the smaller one, without tracing or
unpickling anything.
"""

from __future__ import annotations

import re
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.copies import how_to_make_plain
from ..core.trace import LAYERS
from ..errors import DataError, UnsupportedModelError
from ..utils.short_repr import ShortRepr
from .filling import check_filling, surround_
from .reshapes import infer_last_sizes_


@dataclass(frozen=True, repr=False)
class Cut(ShortRepr):
    """What is cut out of a layer; all indices are those of the original network, ascending.

    Attributes:
        kept: Tensor (weight, bias, running_mean, ...) -> dimension -> indices that stay. In the
            weight of a convolution or linear layer, dimension 0 is outputs and dimension 1 inputs.
        attributes: New values of out_channels, groups, num_heads and the like.
        constants: Removed inputs that are constant, but not zero -> their value. What they add to
            the output is added to the bias, which is made if there is none.
        inferred: Whether the layer is attention that takes the width of its heads from its input,
            and has to take it from its weights (see `reshapes`).
        filled: Outputs that are no longer computed, but still read -> the constant that is put in
            their place (see `filling`).
        unread: Inputs that still arrive at a depthwise convolution, but are not read.
    """

    kept: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    attributes: Mapping[str, int] = field(default_factory=dict)
    constants: Mapping[int, float] = field(default_factory=dict)
    inferred: bool = False
    filled: Mapping[int, float] = field(default_factory=dict)
    unread: tuple[int, ...] = ()


@dataclass(frozen=True, repr=False)
class Recipe(ShortRepr):
    """What is cut out of a network.

    Attributes:
        layers: Name of the layer -> its cut; layers that stay whole are absent.
    """

    layers: Mapping[str, Cut] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.layers)

    def apply_(self, model: nn.Module) -> nn.Module:
        """Cut a network of the original architecture in place, and return it.

        What stays keeps its values, dtype, device and requires_grad; hooks and modes stay too.

        Raises:
            UnsupportedModelError: a layer or tensor is missing, too small for the recipe, or shared
                with another layer, or a new width is not that of the tensors as they are cut;
                nothing was cut.
        """
        holders: dict[int, int] = {}
        for module in model.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                holders[id(tensor)] = holders.get(id(tensor), 0) + 1
        modules = {name: _layer(model, name) for name in self.layers}
        for name, cut in self.layers.items():
            _check(name, modules[name], cut, holders)
            _check_widths(name, modules[name], cut)
            if cut.filled or cut.unread:
                if _tensor(modules[name], "weight") is None:
                    raise _not_plain(name, modules[name], "weight")
                kept = cut.kept.get("weight", {}).get(0, ())
                check_filling(name, modules[name], kept, cut.filled, cut.unread)
        for name, cut in self.layers.items():
            _apply_(modules[name], cut)
        for name, cut in self.layers.items():
            if cut.filled or cut.unread:
                kept = cut.kept["weight"][0]
                surround_(model, modules[name], kept, cut.filled, cut.unread)
        return model

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return {
            name: {
                "kept": {
                    tensor: {str(dim): list(indices) for dim, indices in sides.items()}
                    for tensor, sides in cut.kept.items()
                },
                "attributes": dict(cut.attributes),
                "constants": {str(index): value for index, value in cut.constants.items()},
                "inferred": cut.inferred,
                "filled": {str(index): value for index, value in cut.filled.items()},
                "unread": list(cut.unread),
            }
            for name, cut in self.layers.items()
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`; the data need not be trusted, since all of it is checked.

        Raises:
            DataError: an entry is not of the expected form.
        """
        layers = {}
        for name, entry in data.items():
            try:
                layers[name] = _parse(entry)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"recipe entry {name[:100]!r} is malformed: {str(error)[:300]}; get the record "
                    "again"
                ) from error
        return cls(layers)


def compose(first: Recipe, second: Recipe) -> Recipe:
    """The recipe for a network that does what two recipes do, of which the second is for its cut.

    All indices of the result are those of the uncut network.
    """
    layers = dict(first.layers)
    for name, later in second.layers.items():
        cut = layers.get(name, Cut())
        kept = {tensor: dict(sides) for tensor, sides in cut.kept.items()}
        for tensor, sides in later.kept.items():
            for dim, indices in sides.items():
                old = kept.setdefault(tensor, {}).get(dim)
                kept[tensor][dim] = indices if old is None else tuple(old[i] for i in indices)
        inputs = cut.kept.get("weight", {}).get(1)
        constants = {i if inputs is None else inputs[i]: v for i, v in later.constants.items()}
        attributes = {**cut.attributes, **later.attributes}
        constants = {**cut.constants, **constants}
        outputs = cut.kept.get("weight", {}).get(0)
        more = {c if outputs is None else outputs[c]: v for c, v in later.filled.items()}
        filled = {**cut.filled, **more}
        unread = (*cut.unread, *(c if outputs is None else outputs[c] for c in later.unread))
        inferred = cut.inferred or later.inferred
        layers[name] = Cut(kept, attributes, constants, inferred, filled, unread)
    return Recipe(layers)


def _parse(entry: Mapping[str, Any]) -> Cut:
    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    for tensor, sides in entry["kept"].items():
        for dim, indices in sides.items():
            if not indices:
                raise ValueError(f"{tensor}: expected indices, got {_short(indices)}")
            kept.setdefault(tensor, {})[_index(dim)] = _ascending(tensor, indices)
    attributes = entry["attributes"]
    for name, value in attributes.items():
        if name not in _KNOWN or type(value) is not int or not 1 <= value < _MAX_WIDTH:
            raise ValueError(f"expected a width of {', '.join(_KNOWN)}, got {name}={_short(value)}")
    inferred = entry.get("inferred", False)  # missing in recipes of format 1
    if type(inferred) is not bool:
        raise ValueError(f"expected inferred to be true or false, got {_short(inferred)}")
    filled, unread = entry.get("filled", {}), entry.get("unread", [])  # as are these
    return Cut(
        kept=kept,
        attributes=dict(attributes),
        constants=_floats(entry["constants"]),
        inferred=inferred,
        filled=_floats(filled),
        unread=_ascending("unread", unread),
    )


def _ascending(name: str, indices: Any) -> tuple[int, ...]:
    good = type(indices) is list and all(type(i) is int and i >= 0 for i in indices)
    if not good or indices != sorted(set(indices)):
        raise ValueError(f"{name}: expected ascending indices, got {_short(indices)}")
    return tuple(indices)


def _floats(values: Mapping[str, Any]) -> dict[int, float]:
    for value in values.values():
        # compared before it is converted, since an int may be too large for a float
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            raise ValueError(f"expected finite constants, got {_short(value)}")
    return {_index(index): float(value) for index, value in values.items()}


def _index(text: str) -> int:
    """A dimension or channel as `to_dict` writes it; ValueError for another spelling."""
    if not re.fullmatch(r"0|[1-9][0-9]{0,8}", text):
        raise ValueError(f"expected a dimension or channel, got {_short(text)}")
    return int(text)


_MAX_WIDTH = 2**31  # no layer is as wide

_short = reprlib.Repr().repr  # data that are not trusted may be long or deep


# attributes of layers with a number of channels
ATTRIBUTES = (
    "in_channels",
    "out_channels",
    "in_features",
    "out_features",
    "groups",
    "num_features",
    "num_channels",
    "num_groups",
    "num_parameters",
    "channels",
)

# attributes of attention with its number of heads, or of the channels of all heads
HEAD_COUNTS = ("num_heads", "num_attention_heads", "heads")
HEAD_WIDTHS = ("attn_dim", "key_attn_dim", "val_attn_dim", "all_head_size")

_KNOWN = ATTRIBUTES + HEAD_COUNTS + HEAD_WIDTHS  # no other attribute is ever set


def _layer(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"the recipe names a layer {name!r} that this model does not have, so it was probably "
            "made for another architecture; give a model of that one"
        ) from error


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    return module._parameters.get(name, module._buffers.get(name))


def _not_plain(name: str, module: nn.Module, tensor_name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"layer {name!r} has no plain {tensor_name!r} to cut; make it plain first with "
        f"{how_to_make_plain(module, tensor_name)}"
    )


def _check(name: str, module: nn.Module, cut: Cut, holders: dict[int, int]) -> None:
    weight = module._parameters.get("weight")
    if cut.constants and (weight is None or weight.ndim < 2 or getattr(module, "groups", 1) > 1):
        raise UnsupportedModelError(
            f"layer {name!r} cannot take constant inputs into its bias, so the recipe was probably "
            "made for another architecture; give a model of that one"
        )
    columns = {"weight": {1: tuple(sorted(cut.constants))}} if cut.constants else {}
    for tensor_name, sides in [*cut.kept.items(), *columns.items()]:
        tensor = _tensor(module, tensor_name)
        if tensor is None and tensor_name == "bias" and cut.constants and weight is not None:
            tensor = weight.new_empty(len(weight))  # stands for the bias that will be made
        if tensor is None:
            raise _not_plain(name, module, tensor_name)
        if holders.get(id(tensor), 1) > 1:
            raise UnsupportedModelError(
                f"layer {name!r} shares {tensor_name!r} with another layer; give each its own copy"
            )
        for dim, indices in sides.items():
            if dim >= tensor.ndim or indices[-1] >= tensor.shape[dim]:
                raise UnsupportedModelError(
                    f"layer {name!r}: {tensor_name!r} of shape {tuple(tensor.shape)} is too small "
                    "for the recipe, so it was probably made for another width; give a model of "
                    "that width"
                )


def _check_widths(name: str, module: nn.Module, cut: Cut) -> None:
    """Raise UnsupportedModelError unless the layer's widths are those of its tensors when cut."""
    held = {a: v for a in _KNOWN if type(v := getattr(module, a, None)) is int}
    widths = {**held, **cut.attributes}
    wrong = [a for a, value in cut.attributes.items() if a not in held or value > held[a]]
    # tensors of attention may happen to be as large as it has heads
    held = {a: v for a, v in held.items() if a in ATTRIBUTES}
    sizes = {
        tensor_name: tuple(
            len(cut.kept.get(tensor_name, {}).get(dim, range(size)))
            for dim, size in enumerate(tensor.shape)
        )
        for tensor_name, tensor in {**module._parameters, **module._buffers}.items()
        if tensor is not None
    }
    if not wrong and "weight" in sizes and isinstance(module, nn.Linear):
        outputs, inputs = sizes["weight"]
        wrong = _differing(widths, out_features=outputs, in_features=inputs)
        wrong += ["bias"] if sizes.get("bias", (outputs,)) != (outputs,) else []
    elif not wrong and "weight" in sizes and isinstance(module, nn.modules.conv._ConvNd):
        groups, (first, second) = widths["groups"], sizes["weight"][:2]
        outputs, inputs = first, second * groups
        if module.transposed:
            outputs, inputs = inputs, outputs
        wrong = _differing(widths, out_channels=outputs, in_channels=inputs)
        wrong += ["groups"] if first % groups else []
        wrong += ["bias"] if sizes.get("bias", (outputs,)) != (outputs,) else []
    elif not wrong:
        for attribute, old in held.items():
            for tensor_name, after in sizes.items():
                before = _tensor(module, tensor_name).shape  # type: ignore[union-attr]
                fits = {new for new, size in zip(after, before, strict=True) if size == old}
                if fits and widths[attribute] not in fits:
                    wrong.append(attribute)
        if widths.get("num_channels", 0) % widths.get("num_groups", 1):
            wrong.append("num_channels")
    if wrong:
        given = ", ".join(f"{a}={value}" for a, value in cut.attributes.items()) or wrong[0]
        raise UnsupportedModelError(
            f"layer {name!r} would not fit itself after the recipe's cut ({given}); the recipe was "
            "changed, or made for another architecture: get it again, or give a model of that one"
        )


def _differing(widths: Mapping[str, int], **wanted: int) -> list[str]:
    return [name for name, value in wanted.items() if widths.get(name) != value]


def _apply_(module: nn.Module, cut: Cut) -> None:
    if cut.constants:
        _fold_(module, cut.constants)
    for name, sides in cut.kept.items():
        tensor = _tensor(module, name)
        assert tensor is not None
        smaller = tensor.detach()
        for dim, indices in sides.items():
            smaller = smaller.index_select(dim, torch.tensor(indices, device=tensor.device))
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(smaller, tensor.requires_grad)
        else:
            module._buffers[name] = smaller
    for name, value in cut.attributes.items():
        setattr(module, name, value)
    if cut.inferred:
        infer_last_sizes_(module)
    if not isinstance(module, LAYERS):
        # attention that keeps what it computes from its tensors (LeViT's position biases) forgets
        # it where tensors are moved to another device or type
        module._apply(lambda tensor: tensor)


def _fold_(module: nn.Module, constants: Mapping[int, float]) -> None:
    """Add what constant inputs contribute to the bias."""
    weight = module._parameters["weight"]
    assert weight is not None
    columns = weight.detach()[:, list(constants)].reshape(len(weight), len(constants), -1).sum(2)
    values = torch.tensor(list(constants.values()), dtype=torch.float64, device=weight.device)
    contribution = (columns.double() @ values).to(weight)
    bias = module._parameters.get("bias")
    total = contribution if bias is None else bias.detach() + contribution
    trainable = (weight if bias is None else bias).requires_grad
    module._parameters["bias"] = nn.Parameter(total, trainable)
