"""Copies of the user's model, and checks that it can be copied and worked on."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..errors import UnsupportedModelError

# how modules are told to compute a part again in the backward pass: timm, transformers, torchvision
_CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing", "memory_efficient")


def clone(model: nn.Module) -> nn.Module:
    """A deep copy with the same modes, flags and hooks.

    Unlike `copy.deepcopy` it also copies networks that keep results of a forward pass with
    gradients (old weight norm, `torch.nn.utils.prune`, stored features), without their history.
    See `frozen_copy` for a copy to compute on.

    Raises:
        UnsupportedModelError: it is no module, is wrapped (compiled, data-parallel), has no weights
            or weights of unusual types (`refuse_unusual_weights`), or cannot be copied.
    """
    _refuse_other_things(model)
    refuse_wrapped(model)
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise UnsupportedModelError(
            "a part of the model is TorchScript, whose layers cannot be worked on; give the eager "
            "one that it was made from"
        )
    refuse_unusual_weights(model)
    try:
        results = {id(value): value.detach().clone() for value in _results(model)}
        return copy.deepcopy(model, results)
    except Exception as error:  # whatever a __deepcopy__ written by somebody raises
        raise UnsupportedModelError(
            f"the model cannot be copied ({type(error).__name__}: {error}), and it would not be "
            "worked on in place"
        ) from error


def frozen_copy(model: nn.Module) -> nn.Module:
    """A deep copy to compute on: in eval mode, without gradients, gradient checkpointing off.

    Checkpointing computes parts again in the backward pass, where masks and noise would be
    silently missing; `Compute(micro_batch=...)` bounds memory instead.

    Raises:
        UnsupportedModelError: see `clone`.
    """
    frozen = clone(model)
    for module in frozen.modules():
        for switch in _CHECKPOINTING:
            if getattr(module, switch, None) is True:
                setattr(module, switch, False)
    return frozen.eval().requires_grad_(False)


def refuse_unusual_weights(model: nn.Module) -> None:
    """Raise UnsupportedModelError if layers have no weights yet, or weights that are not plain.

    No weights: on the device "meta", or of a lazy layer that has not run. Not plain: quantised, or
    of a convolution or linear layer and of another type than half, single and double precision.
    """
    for name, module in model.named_modules():
        if "quantized" in type(module).__module__.split("."):
            raise UnsupportedModelError(
                f"layer {name!r} is quantised, and its weights cannot be masked or trained; give "
                "the model as it was before it was quantised"
            )
        for kind, parameter in module._parameters.items():
            if parameter is None:
                continue
            if is_lazy(parameter):
                raise UnsupportedModelError(
                    f"layer {name!r} is lazy and has no weights yet; load them, or run the model "
                    "once on an image"
                )
            if parameter.is_meta:
                raise UnsupportedModelError(
                    'the model is on the device "meta" and has no weights; load them first'
                )
            bits = torch.finfo(parameter.dtype).bits if parameter.is_floating_point() else 0
            layer = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
            if bits < 16 and (layer or bits):
                raise UnsupportedModelError(
                    f"{kind!r} of layer {name or type(module).__name__!r} is of type "
                    f"{parameter.dtype}, which is not supported; give the model in single or half "
                    "precision: model.float()"
                )


def _refuse_other_things(model: object) -> None:
    if isinstance(model, nn.Module):
        return
    advice = "give the network itself"
    if isinstance(model, Mapping):
        advice = "build the network and load these weights: network.load_state_dict(...)"
    elif isinstance(model, (str, os.PathLike)):
        advice = "build the network and load the file's weights: load_weights(path) reads them"
    raise UnsupportedModelError(
        f"expected a model (torch.nn.Module), got {type(model).__name__}; {advice}"
    )


def how_to_make_plain(layer: nn.Module, name: str = "weight") -> str:
    """What undoes that a layer's tensor is computed in each forward pass, for messages."""
    if parametrize.is_parametrized(layer, name):
        return f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})"
    for hook in layer._forward_pre_hooks.values():
        if getattr(hook, "name", getattr(hook, "_tensor_name", None)) != name:
            continue
        if isinstance(hook, WeightNorm):
            return f"torch.nn.utils.remove_weight_norm(layer, {name!r})"
        if isinstance(hook, SpectralNorm):
            return f"torch.nn.utils.remove_spectral_norm(layer, {name!r})"
        if isinstance(hook, BasePruningMethod):
            return f"torch.nn.utils.prune.remove(layer, {name!r})"
    return f"a layer of the plain kind with {name!r} as its parameter"


def refuse_computed_weights(model: nn.Module, names: Iterable[str]) -> None:
    """Raise UnsupportedModelError if one of these layers computes its weight in each pass.

    Weight norm, spectral norm, `torch.nn.utils.prune`: writing zeros to it would change nothing.
    """
    for name in names:
        layer = model.get_submodule(name)
        if "weight" not in layer._parameters:
            raise UnsupportedModelError(
                f"layer {name!r} has a parametrised weight; make it plain first with "
                f"{how_to_make_plain(layer)}"
            )


def refuse_inference_weights(model: nn.Module, names: Iterable[str]) -> None:
    """Raise UnsupportedModelError if one of these layers was made in inference mode.

    Such tensors can be neither changed nor differentiated.
    """
    for name in names:
        if any(weight.is_inference() for weight in model.get_submodule(name).parameters()):
            raise UnsupportedModelError(
                f"layer {name!r} was made in inference mode, so its weights can be neither changed "
                "nor differentiated; take a copy that is made outside of it: copy.deepcopy(model)"
            )


def refuse_recomputing(frozen: nn.Module, images: Tensor) -> None:
    """Raise UnsupportedModelError if the backward pass computes a part of the model again.

    Switches for this that are known are off in a frozen copy; this finds others. Masks and noise
    would be missing there. Models that cannot be differentiated at all pass.

    Args:
        frozen: from `frozen_copy`; a copy is tried, since networks may keep what they compute.
        images: (N, C, H, W), on its device and in its dtype; one serves.
    """
    part = None
    for through_images in (True, False):
        try:
            part = _recomputed(copy.deepcopy(frozen), images[:1].detach().clone(), through_images)
            break
        except Exception as error:  # whatever a forward written by somebody raises
            if "checkpoint" in str(error).lower():
                part = "a part of it"
                break
    if part is not None:
        raise UnsupportedModelError(
            f"the model computes {part!r} again in the backward pass (gradient checkpointing), "
            "where masks and noise are missing; switch that off before, and bound memory by "
            "Compute(micro_batch=...)"
        )


def _recomputed(model: nn.Module, images: Tensor, through_images: bool) -> str | None:
    """The first module with weights that runs in a backward pass to gammas and biases."""
    again: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: again.append(name)

    with torch.enable_grad():
        for parameter in model.parameters():  # those that masks multiply; others cost memory
            learns = parameter.is_floating_point() or parameter.is_complex()
            parameter.requires_grad_(learns and parameter.ndim <= 1)
        logits = model(images.requires_grad_(through_images))
        for name, module in model.named_modules():
            if module._parameters:
                module.register_forward_pre_hook(note(name))
        if logits.requires_grad:
            logits.sum().backward()
    return again[0] if again else None


def restore_modes_(frozen: nn.Module, given: nn.Module) -> None:
    """Give a frozen copy the modes, checkpointing and gradient flags of the model it is of."""
    for mine, theirs in zip(frozen.modules(), given.modules(), strict=True):
        mine.training = theirs.training
        for switch in _CHECKPOINTING:
            if getattr(theirs, switch, None) is True:
                setattr(mine, switch, True)
    for weight, theirs_too in zip(frozen.parameters(), given.parameters(), strict=True):
        weight.requires_grad_(theirs_too.requires_grad)


def _results(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that modules hold, alone or in collections, and that autograd has computed."""
    for module in model.modules():
        for value in vars(module).values():
            held = value.values() if isinstance(value, dict) else value
            many = held if isinstance(value, (dict, list, tuple)) else [value]
            yield from (t for t in many if isinstance(t, Tensor) and not t.is_leaf)


def refuse_wrapped(model: nn.Module) -> None:
    """Raise UnsupportedModelError for a compiled or data-parallel model; it names the plain one."""
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            "the model is TorchScript, whose layers cannot be masked; give the eager one that it "
            "was made from, and script the product"
        )
    for attribute, wrapper in (("_orig_mod", "torch.compile"), ("module", "DataParallel")):
        inner = getattr(model, attribute, None)
        if isinstance(inner, nn.Module) and type(model).__name__ in (
            "OptimizedModule",
            "DataParallel",
            "DistributedDataParallel",
        ):
            raise UnsupportedModelError(
                f"the model is wrapped by {wrapper}; give the plain one: model.{attribute}"
            )


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model is in eval mode inside; every module's own mode comes back."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Put modes, gradient flags, hooks and buffers back, whatever happens inside."""
    modules = list(model.modules())
    training = [module.training for module in modules]
    hooks = [set(module._forward_hooks) for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, mode, known, held in zip(modules, training, hooks, buffers, strict=True):
            module.training = mode
            for key in set(module._forward_hooks) - known:
                del module._forward_hooks[key]
            module._buffers.clear()
            module._buffers.update(held)
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
