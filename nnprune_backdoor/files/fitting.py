"""Fit the names of weights to those of a network: prefixes, tensors beside it, other spellings."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection
from inspect import signature
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..utils.time_limit import within
from .state_dicts import listed
from .tensor_names import is_averaged, is_beside

if TYPE_CHECKING:
    from .checkpoint import Weights

# from weights, and the network if it takes a second argument, to weights of other names
Converter = Callable[..., dict[str, Tensor]]

_COUNTER = "num_batches_tracked"  # of BatchNorm; no output depends on it in eval mode

# what profilers leave in every layer, by the last part of the name
_LEFT_BY_TOOLS = re.compile(r"total_ops|total_params")

# what timm's modules call their function for weights with other names
_CONVERTERS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")

_MAX_SECONDS = 30.0  # for such a function

_ANCHORS = 5  # names of the network that prefixes are looked for with


def fitted(weights: Weights, network: nn.Module, converter: Converter | None = None) -> Weights:
    """The weights by the names of the network, as far as the names show how.

    Taken off is a prefix before all names of the network, together with what lacks it. Left out are
    losses and metrics, what profilers wrote, and buffers that the network computes itself, if they
    are equal to those. Missing counters of BatchNorm become 0, as in PyTorch's own loading.
    Everything else stays, for `fill_` to refuse.

    Args:
        network: may be on the device "meta".
        converter: turns weights of other names into those of the network; tried where these lack
            some.

    Raises:
        CheckpointError: several sets of names fit.
    """
    wanted = {name for name, entry in network.state_dict().items() if isinstance(entry, Tensor)}
    wanted = {name for name in wanted if name.rsplit(".", 1)[-1] != _COUNTER}
    found = _without_prefix(weights, wanted)
    if converter is not None and not wanted <= found.keys():
        found = _converted(found, wanted, network, converter)
    if wanted <= found.keys():
        found = _without_others(found, network)
    return _with_counters(found, network)


def timm_converter(arch: str) -> Converter | None:
    """timm's function that renames weights of the architecture's authors, or of older versions.

    None where it has none, or does not know the architecture.
    """
    import timm

    if not timm.is_model(arch):
        return None
    module = sys.modules[timm.models.model_entrypoint(arch).__module__]
    found: list[Converter] = [vars(module)[name] for name in _CONVERTERS if name in vars(module)]
    return found[0] if found else None


def _without_prefix(weights: Weights, wanted: set[str]) -> Weights:
    """Without the prefix before the names of the network, and without what lacks it."""
    if wanted <= weights.keys():
        return weights
    anchors = sorted(wanted)[:: max(1, len(wanted) // _ANCHORS)]
    prefixes = {
        name[: -len(anchor)]
        for name in weights
        for anchor in anchors
        if name.endswith(f".{anchor}")
    }
    whole = sorted(p for p in prefixes if all(p + name in weights for name in wanted))
    if len(whole) > 1:
        raise CheckpointError(
            f"weights of the network are there under several prefixes: {listed(whole)}; say which "
            "by --prefix (prefix=...)"
        )
    if not whole:  # the names may be converted, if they share a prefix
        whole = sorted(
            p for p in prefixes if all(name.startswith(p) or is_beside(name) for name in weights)
        )
    if not whole:
        return weights
    prefix = whole[0]
    taken = {name[len(prefix) :]: t for name, t in weights.items() if name.startswith(prefix)}
    others = [name for name in weights if not name.startswith(prefix)]
    known = [name for name in others if is_beside(name) or is_averaged(name)]
    layers = [n for n in others if n not in known and _is_of_layer(n, weights[n])]
    if layers:
        raise CheckpointError(
            f"the network is there under {prefix!r}, and beside it are other layers: "
            f"{listed(layers)}; if they are no part of what the model computes, leave them out by "
            f"--prefix {prefix} (prefix=...)"
        )
    notes = [f"removed the prefix {prefix!r}"]
    notes += [f"left out, since they lack it: {listed(others)}"] if others else []
    result = weights.with_tensors(taken, *notes)
    result.mapping["prefix"] = weights.mapping.get("prefix", "") + prefix
    result.leave_out(others)
    return result


def _is_of_layer(name: str, tensor: Tensor) -> bool:
    """Whether it is the weight of a convolution or of a linear layer, by its form."""
    return name.endswith(".weight") and tensor.ndim > 1


def _converted(
    weights: Weights, wanted: set[str], network: nn.Module, converter: Converter
) -> Weights:
    """By the names that the converter gives, where these are more of what the network needs.

    Zeros that it makes up are left out, so that `fill_` says what is missing. Buffers that the
    network computes itself stay, to be compared with those.
    """

    def convert() -> dict[str, Tensor]:
        with torch.no_grad():
            return converter(*(dict(weights), network)[: len(signature(converter).parameters)])

    try:
        given = within(_MAX_SECONDS, "timm's function", convert)  # of hostile sizes it takes hours
        read = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
        new = {name: tensor for name, tensor in given.items() if isinstance(tensor, Tensor)}
        made = [n for n, t in new.items() if t.untyped_storage().data_ptr() not in read]
        new = {name: t for name, t in new.items() if name not in made or t.any()}
    except Exception:  # written for files of certain authors, and fails on others in any way
        return weights
    if len(wanted & new.keys()) <= len(wanted & weights.keys()):
        return weights
    name = f"{converter.__module__}.{converter.__qualname__}"
    notes = [f"named as the network by {name}"]
    notes += [f"joined, resized or made by it: {listed(made)}"] if made else []
    kept = {tensor.untyped_storage().data_ptr() for tensor in new.values()}
    gone = [n for n, t in weights.items() if t.untyped_storage().data_ptr() not in kept]
    buffers = {name for name, _ in network.named_buffers()}.intersection(gone)
    new.update({name: weights[name] for name in buffers.difference(new)})
    gone = [name for name in gone if name not in buffers and name not in made]
    notes += [f"{'joined or ' if made else ''}left out by it: {listed(gone)}"] if gone else []
    result = weights.with_tensors({n: t.contiguous() for n, t in new.items()}, *notes)
    result.mapping["converted_by"] = name
    if gone:
        result.leave_out(gone)
    return result


def _without_others(weights: Weights, network: nn.Module) -> Weights:
    """Without what is no part of the network, or what it computes itself."""
    state = network.state_dict().keys()
    buffers = {name: tensor for name, tensor in network.named_buffers() if name not in state}
    others = [name for name in weights if name not in state]
    left = [
        name
        for name in others
        if is_beside(name)
        or _LEFT_BY_TOOLS.fullmatch(name.rsplit(".", 1)[-1])
        or _is_spare_counter(name, weights, state)
        or (name in buffers and _equal(buffers[name], weights[name]))
    ]
    if not left:
        return weights
    tensors = {name: tensor for name, tensor in weights.items() if name not in left}
    result = weights.with_tensors(tensors, f"left out, no weights of the network: {listed(left)}")
    result.leave_out(left)
    return result


def _is_spare_counter(name: str, weights: Weights, state: Collection[str]) -> bool:
    """Whether it counts for a norm that the network has without a counter."""
    mean = name.removesuffix(_COUNTER) + "running_mean"
    return name.endswith(f".{_COUNTER}") and (mean in state or mean not in weights)


def _equal(own: Tensor, given: Tensor) -> bool:
    """Whether the network computes what is in the file; on the device "meta" only the shape."""
    if own.shape != given.shape or own.is_meta:
        return own.shape == given.shape
    return torch.allclose(own.double(), given.double())


def _with_counters(weights: Weights, network: nn.Module) -> Weights:
    """With a 0 for each counter of BatchNorm that is missing beside its statistics."""
    missing = [
        name
        for name, tensor in network.state_dict().items()
        if name not in weights
        and name.rsplit(".", 1)[-1] == _COUNTER
        and name.replace(_COUNTER, "running_mean") in weights
        and not tensor.ndim
    ]
    if not missing:
        return weights
    zeros = {name: torch.tensor(0) for name in missing}
    result = weights.with_tensors(
        {**weights, **zeros}, f"set to 0, not in the file: {len(missing)} {_COUNTER}"
    )
    result.mapping["set_to_0"] = missing
    return result
