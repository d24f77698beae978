"""Attention that takes the width of its heads from its input, made to take it from its weights.

Much attention ends with `reshape(B, N, C)`, where C is the width of the input. Without some of its
heads it is narrower than that. If the last size of each reshape is inferred, the same forward runs
at any number of heads; where it ran before, it computes the same, since sizes are products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_RESHAPES = (Tensor.reshape, Tensor.view, torch.reshape)


class _LastSizeInferred(TorchFunctionMode):
    """Inside, reshapes infer their last size, unless they infer another one."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _RESHAPES and len(args) > 1 and not isinstance(args[1], torch.dtype):
            sizes = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
            if len(sizes) and -1 not in sizes:
                args = args[0], (*sizes[:-1], -1)
        return func(*args, **(kwargs or {}))


def infer_last_sizes_(module: nn.Module) -> None:
    """Make a module infer the last size of each reshape in its forward, in place.

    It stays an instance of its class, and can be copied, pickled, compiled and exported as before.
    """
    if not isinstance(module, _Inferring):
        module.__class__ = _inferring(type(module))


class _Inferring:
    """Marks the classes that `_inferring` makes."""


_MADE: dict[type[nn.Module], type[nn.Module]] = {}


def _inferring(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose forward infers last sizes; the same for the same class."""
    if kind in _MADE:
        return _MADE[kind]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _LastSizeInferred():
            return kind.forward(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _rebuilt, (kind,), self.__dict__

    made = {"forward": forward, "__reduce_ex__": reduce, "__module__": kind.__module__}
    return _MADE.setdefault(kind, type(kind.__name__, (kind, _Inferring), made))


def _rebuilt(kind: type[nn.Module]) -> nn.Module:
    """An empty module of the class made of `kind`, for copies and pickles."""
    return object.__new__(_inferring(kind))
