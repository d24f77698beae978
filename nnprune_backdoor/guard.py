"""Work on somebody else's model: leave it as it was, and do not take for ever."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import operator
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import SupportsIndex, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .data import refuse_wrapped
from .errors import DataError, UnsupportedModelError

_T = TypeVar("_T")


# how modules are told to compute a part again in the backward pass: timm, transformers, torchvision
_CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing", "memory_efficient")


def copied(model: nn.Module) -> nn.Module:
    """A deep copy with the same modes, flags and hooks, where `copy.deepcopy` may refuse.

    It does so for results of a forward pass with gradients that a network keeps (old weight norm,
    `torch.nn.utils.prune`, features kept for later); they are copied without their history.

    Raises:
        UnsupportedModelError: it is no module, is wrapped (compiled, data-parallel), has no weights
            (is on the device "meta") or cannot be copied.
    """
    _refuse_other_things(model)
    refuse_wrapped(model)
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise UnsupportedModelError(
            "a part of the model is TorchScript, whose layers cannot be worked on; give the eager "
            "one that it was made from"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedModelError(
            'the model is on the device "meta" and has no weights; load them first'
        )
    try:
        results = {id(value): value.detach().clone() for value in _results(model)}
        return copy.deepcopy(model, results)
    except Exception as error:  # whatever a __deepcopy__ written by somebody raises
        raise UnsupportedModelError(
            f"the model cannot be copied ({type(error).__name__}: {error}), and it would not be "
            "worked on in place"
        ) from error


def private_copy(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode whose parameters ask for no gradient, without checkpointing.

    What is computed again in the backward pass would be computed without masks and noise, and
    silently; `Compute(micro_batch=...)` bounds memory as well.

    Raises:
        UnsupportedModelError: see `copied`.
    """
    own = copied(model)
    for module in own.modules():
        for switch in _CHECKPOINTING:
            if getattr(module, switch, None) is True:
                setattr(module, switch, False)
    return own.eval().requires_grad_(False)


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


def refuse_recomputing(own: nn.Module, images: Tensor) -> None:
    """Raise UnsupportedModelError if the backward pass computes a part of the model again.

    By a switch of its own, that is; those that are known are off in a private copy. Masks and
    noise would be missing there. Models that cannot be differentiated at all are let through.

    Args:
        own: a private copy; a copy of it is tried, since networks may keep what they compute.
        images: (N, C, H, W), on its device and in its dtype; one serves.
    """
    part = None
    for through_images in (True, False):
        try:
            part = _recomputed(copy.deepcopy(own), images[:1].detach().clone(), through_images)
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


def restore_modes_(own: nn.Module, given: nn.Module) -> None:
    """Give a private copy the modes, checkpointing and gradient flags of the model it is of."""
    for mine, theirs in zip(own.modules(), given.modules(), strict=True):
        mine.training = theirs.training
        for switch in _CHECKPOINTING:
            if getattr(theirs, switch, None) is True:
                setattr(mine, switch, True)
    for weight, theirs_too in zip(own.parameters(), given.parameters(), strict=True):
        weight.requires_grad_(theirs_too.requires_grad)


def _results(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that modules hold, alone or in collections, and that autograd has computed."""
    for module in model.modules():
        for value in vars(module).values():
            held = value.values() if isinstance(value, dict) else value
            many = held if isinstance(value, (dict, list, tuple)) else [value]
            yield from (t for t in many if isinstance(t, Tensor) and not t.is_leaf)


@contextlib.contextmanager
def private_randomness(seed: int) -> Iterator[None]:
    """Global generators (torch, numpy, random) start from `seed` inside and come back as before.

    Loaders draw from them: for shuffling, for the seeds of workers, for augmentation. What else a
    caller may have set is off inside as well, see `usual_passes`.

    Raises:
        DataError: the seed is no integer, negative or too large.
    """
    plain = checked_seed(seed)
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count())
    with usual_passes(), torch.random.fork_rng(devices=devices):
        try:
            torch.manual_seed(plain)
            np.random.seed(plain % 2**32)
            random.seed(plain)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextlib.contextmanager
def usual_passes() -> Iterator[None]:
    """Passes inside are run as usual, whatever the caller has set; all of it comes back.

    The default precision is single. Inference mode, in which nothing can be differentiated, is
    left. Autocast is off, because it keeps casts of weights for as long as the caller's block
    lasts, so that a weight which is trained inside would never be seen to change; `Compute` has one
    without that. PyTorch's fused encoder layers are off: they call none of the layers inside, so
    masks and hooks on these do nothing, and no operation of theirs is counted.
    """
    precision = torch.get_default_dtype()
    fused = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        if not _USUAL.get():  # the autocast that is on further inside is `Compute`'s
            stack.callback(_USUAL.reset, _USUAL.set(True))
            for kind in _DEVICES:
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        try:
            torch.set_default_dtype(torch.float32)
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.set_default_dtype(precision)
            torch.backends.mha.set_fastpath_enabled(fused)


_USUAL: ContextVar[bool] = ContextVar("usual_passes", default=False)
_DEVICES = ("cpu", "cuda", "mps", "xpu")  # that autocast may be on for


def checked_seed(seed: int) -> int:
    """A seed as a plain integer, whatever kind of integer it was; DataError if it cannot be one."""
    plain = as_integer(seed, "seed")
    if not 0 <= plain < 2**63:
        raise DataError(f"expected a seed in [0, 2**63), got {plain}")
    return plain


def as_integer(value: SupportsIndex, name: str) -> int:
    """An integer of numpy or a tensor of one as a plain one; DataError if it is no integer."""
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"expected {name} to be an integer, got {value!r}") from None


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


class _TimeIsUp(BaseException):
    """Not an Exception, so that a model's own `except Exception` lets it through."""


def within(seconds: float | None, doing: str, work: Callable[[], _T]) -> _T:
    """What `work` returns, if it does so in `seconds` of wall time; works in every thread.

    An alarm signal would be simpler, but it works in the main thread only, not on Windows, and
    takes the alarm away from whoever else uses it (pytest-timeout does). A function and not a
    context manager, because an interrupt could strike between `with` and the first line inside.

    Args:
        seconds: None for no limit. A long call into compiled code is interrupted when it returns.
        doing: what the message says was given up.

    Raises:
        UnsupportedModelError: time was up.
    """
    if seconds is None:
        return work()
    caller = ctypes.c_ulong(threading.get_ident())
    interrupt = ctypes.pythonapi.PyThreadState_SetAsyncExc
    done = threading.Event()

    def watch() -> None:
        wait = seconds
        while not done.wait(wait):
            interrupt(caller, ctypes.py_object(_TimeIsUp))
            wait = 1.0  # again, should a bare except have swallowed it

    watchdog = threading.Thread(target=watch, daemon=True)

    def call_off() -> None:
        done.set()
        if watchdog.is_alive():
            watchdog.join()
        interrupt(caller, None)  # one that is set and not yet raised

    try:
        try:
            watchdog.start()
            return work()
        finally:
            call_off()
    except _TimeIsUp:
        call_off()  # the interrupt may have struck while it was being called off
        raise UnsupportedModelError(
            f"{doing} took longer than {seconds:g} s and was given up"
        ) from None
