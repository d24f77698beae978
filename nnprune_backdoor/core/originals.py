"""Refuse a copy that runs layers which were not copied with it.

`copy.deepcopy` leaves functions as they are: where a layer's `forward` was replaced by a lambda, a
compiled or a decorated function, or a hook holds a layer, the copy computes with the user's own
layers. Its scores would be those of a mixture, and a pass could change the user's model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedModelError


def refuse_originals(model: nn.Module, made: nn.Module, images: Tensor) -> None:
    """Raise UnsupportedModelError if a copy runs a layer, or reads a tensor, of the original.

    So for layers that belong to neither, of which a function holds the only one there is. They are
    stopped before they compute, so that nothing of them changes.

    Args:
        model: the original.
        made: a copy, in eval mode.
        images: (N, C, H, W), as the copy takes them; two are enough.
    """
    compiled = [
        name
        for name, module in made.named_modules()
        for function in vars(module).values()
        if hasattr(function, "_torchdynamo_orig_callable")
    ]
    if compiled:
        raise _error(f"a compiled function of {compiled[0] or 'the model'!r}")
    watch = _Watch(model, made)
    handle = register_module_forward_pre_hook(watch.module)
    try:
        with watch, torch.no_grad():
            made(images.clone())
    except Exception as error:  # whatever else it raises is found, and explained, by later checks
        if watch.found is None and isinstance(error, UnsupportedModelError):
            raise
    finally:
        handle.remove()
    if watch.found is not None:
        raise _error(watch.found)


class _Watch(TorchFunctionMode):
    """Raises where a module that is not the copy's or a tensor of the original is used.

    The hook on modules is one of the whole process; it looks at this thread's calls alone.
    """

    def __init__(self, model: nn.Module, made: nn.Module) -> None:
        super().__init__()
        self.found: str | None = None
        self._thread = threading.get_ident()
        self._names = {module: name for name, module in model.named_modules()}
        copied = _modules_in(made)
        self._own = {id(module) for module in copied}
        self._kept = copied  # alive, so that no other object gets their ids
        named = [*model.named_parameters(), *model.named_buffers()]
        self._tensors = {_place(tensor): name for name, tensor in named if tensor.numel()}
        for tensor in (*made.parameters(), *made.buffers()):
            # a copy may share what never changes, if its author says so
            self._tensors.pop(_place(tensor), None)

    def module(self, module: nn.Module, _: Any) -> None:
        """A hook that runs before any module's forward."""
        if threading.get_ident() != self._thread or id(module) in self._own:
            return
        name = self._names.get(module)
        # a forward pass may make modules, of activations for example, which hold no tensors
        if name is not None or any(True for _ in (*module.parameters(), *module.buffers())):
            self._stop(f"layer {name or type(module).__name__!r}")

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # the mode's own look at a tensor
            for tensor in _flat((*args, *(kwargs or {}).values())):
                name = self._tensors.get(_place(tensor))
                if name is not None:
                    self._stop(f"tensor {name!r}")
        return func(*args, **(kwargs or {}))

    def _stop(self, what: str) -> None:
        self.found = what
        raise _error(what)


def _error(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"a copy of the model still uses {what} of the model itself, through a replaced forward, a "
        "hook or a stored function, which copying leaves as it is; restore the plain forward "
        "(del layer.forward, or do not compile), or register the layer and write the change as a "
        "module of its own"
    )


def _modules_in(model: nn.Module) -> list[nn.Module]:
    """All modules that the model holds, those in plain attributes and containers too."""
    modules: list[nn.Module] = []
    seen: set[int] = set()
    waiting: list[Any] = [model]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (Tensor, str, bytes, int, float, type)):
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            modules.append(value)
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += value
        elif hasattr(value, "__self__"):  # a bound method
            waiting.append(value.__self__)
        elif (hasattr(value, "__dict__") and not callable(value)) or isinstance(value, nn.Module):
            waiting += vars(value).values()
    return modules


def _place(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage().data_ptr()


def _flat(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _flat(value)
