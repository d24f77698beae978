"""Floating-point operations and peak memory of a piece of work, the same on any machine."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class PeakMemory(TorchDispatchMode):
    """Most bytes alive at once in tensors that operations made inside the block.

    Looked at after every operation: what is alive then, each storage once. What an operation takes
    and gives back by itself is not seen. `peak` does not depend on the load of the machine.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {id_of(leaf) for leaf in tree_leaves((args, kwargs)) if is_tensor(leaf)}
        for leaf in tree_leaves(result):
            if is_tensor(leaf) and id_of(leaf) not in before:
                storage = leaf.untyped_storage()
                self._alive[id_of(leaf)] = (
                    torch.multiprocessing.reductions.StorageWeakRef(storage),
                    storage.nbytes(),
                )
        self._alive = {k: (w, n) for k, (w, n) in self._alive.items() if not w.expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._alive.values()))
        return result


def is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def id_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def count(work: Callable[[], Any]) -> dict[str, float]:
    """Multiply-adds times two of all matrix products and convolutions, and the peak in MB."""
    gc.collect()
    with FlopCounterMode(display=False) as flops, PeakMemory() as memory:
        work()
    return {"gflop": flops.get_total_flops() / 1e9, "peak_mb": memory.peak / 1e6}
