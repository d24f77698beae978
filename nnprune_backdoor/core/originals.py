"""Refuse a copy that runs parts of the model it was made from.

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

    What belongs to the original is stopped before it computes, so that nothing of it changes.

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
    """Raises where a module or a tensor of the original is used, and keeps which one.

    The hook on modules is one of the whole process; it looks at this thread's calls alone.
    """

    def __init__(self, model: nn.Module, made: nn.Module) -> None:
        super().__init__()
        self.found: str | None = None
        self._thread = threading.get_ident()
        self._modules = {module: name for name, module in model.named_modules()}
        own = set(map(_place, _tensors(made)))
        named = [*model.named_parameters(), *model.named_buffers()]
        self._tensors = {_place(tensor): name for name, tensor in named if tensor.numel()}
        for place in own:  # a copy may share what never changes, if its author says so
            self._tensors.pop(place, None)

    def module(self, module: nn.Module, _: Any) -> None:
        """A hook that runs before any module's forward."""
        if threading.get_ident() == self._thread and module in self._modules:
            self._stop(f"layer {self._modules[module] or type(module).__name__!r}")

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
        "(del layer.forward, or do not compile), or write the change as a module of its own"
    )


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _place(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage().data_ptr()


def _flat(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _flat(value)
