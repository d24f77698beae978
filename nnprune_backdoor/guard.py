"""Work on somebody else's model: leave it as it was, and do not take for ever."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import random
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .data import refuse_wrapped
from .errors import UnsupportedModelError

_T = TypeVar("_T")


# how modules are told to compute a part again in the backward pass: timm, transformers, torchvision
_CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing", "memory_efficient")


def private_copy(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode whose parameters ask for no gradient, without checkpointing.

    What is computed again in the backward pass would be computed without masks and noise, and
    silently; `Compute(micro_batch=...)` bounds memory as well.

    Raises:
        UnsupportedModelError: the model is wrapped (compiled, data-parallel), has no weights (is on
            the device "meta") or cannot be copied.
    """
    refuse_wrapped(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedModelError(
            'the model is on the device "meta" and has no weights; load them first'
        )
    try:
        # results that a network keeps for later, computed with gradients, refuse to be copied
        results = {id(value): value.detach().clone() for value in _results(model)}
        own = copy.deepcopy(model, results)
    except (RuntimeError, TypeError) as error:
        raise UnsupportedModelError(
            f"the model cannot be copied ({error}), and it would not be worked on in place"
        ) from error
    for module in own.modules():
        for switch in _CHECKPOINTING:
            if getattr(module, switch, None) is True:
                setattr(module, switch, False)
    return own.eval().requires_grad_(False)


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
            parameter.requires_grad_(parameter.ndim <= 1)
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
    """Tensors that modules hold, alone or in dictionaries, and that autograd has computed."""
    for module in model.modules():
        for value in vars(module).values():
            held = value.values() if isinstance(value, dict) else [value]
            yield from (t for t in held if isinstance(t, Tensor) and not t.is_leaf)


@contextlib.contextmanager
def private_randomness(seed: int) -> Iterator[None]:
    """Global generators (torch, numpy, random) start from `seed` inside and come back as before.

    Loaders draw from them: for shuffling, for the seeds of workers, for augmentation. Two more
    things that a caller may have set would change results: the default precision is single inside,
    and inference mode, in which nothing can be differentiated, is left.
    """
    states = random.getstate(), np.random.get_state()
    precision = torch.get_default_dtype()
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False):
        try:
            torch.set_default_dtype(torch.float32)
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
        finally:
            torch.set_default_dtype(precision)
            random.setstate(states[0])
            np.random.set_state(states[1])


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
