"""Original channel indices of a model's layers while Torch-Pruning prunes it.

Torch-Pruning numbers the channels that are left anew after each prune.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch_pruning as tp
from torch import nn

from ..errors import UnsupportedModelError
from .graph import members
from .patching import Patch


class Ledger:
    """Records which original output channels each layer of a model still has.

    It counts from the state of the model when the ledger is made. Every way to prune with
    Torch-Pruning (`step()`, interactive or not, `get_pruning_group(...).prune()`, a replayed
    history) calls `Group.prune`, which is patched to inform all ledgers. Layers that are cut
    without Torch-Pruning are not noticed, and parameters outside of known layers are not counted.

    A ledger does not keep its model alive.

    Args:
        model: the model that will be pruned.
        refuses: asked about each group of the model before it is pruned; where it is true the group
            is left alone.

    Attributes:
        cuts: Number of times that layers lost channels.
    """

    def __init__(
        self,
        model: nn.Module,
        refuses: Callable[[tp.dependency.Group], bool] = lambda group: False,
    ) -> None:
        self.refuses = refuses
        self.cuts = 0
        self._channels: weakref.WeakKeyDictionary[nn.Module, tuple[int, ...] | None] = (
            weakref.WeakKeyDictionary({layer: _all_channels(layer) for layer in model.modules()})
        )
        _PRUNE.hold(self)

    def alive(self, layer: nn.Module) -> tuple[int, ...]:
        """Original indices of the output channels that `layer` still has, in their present order.

        Raises:
            UnsupportedModelError: the layer is not of this model, or Torch-Pruning cannot prune it.
        """
        channels = self._channels.get(layer)
        if channels is None:
            raise UnsupportedModelError(
                f"expected a prunable layer of the ledger's model, got {type(layer).__name__}"
            )
        return channels

    def __contains__(self, layer: object) -> bool:
        return layer in self._channels

    def _remove(self, cut: _Cut) -> None:
        if cut.layer not in self._channels:
            return
        self.cuts += 1
        channels = self._channels[cut.layer]
        if channels is None:  # a layer with a pruner of its own
            channels = tuple(range(cut.width))
        if len(channels) == cut.width:  # otherwise recorded before, or cut without Torch-Pruning
            self._channels[cut.layer] = tuple(
                original for index, original in enumerate(channels) if index not in cut.channels
            )


def _all_channels(layer: nn.Module) -> tuple[int, ...] | None:
    pruner = tp.pruner.function.PrunerBox.get(tp.ops.module2type(layer))
    width = None if pruner is None else pruner.get_out_channels(layer)
    return None if width is None else tuple(range(width))


@dataclass(frozen=True)
class _Cut:
    """Output channels that a group is about to remove from a layer.

    Attributes:
        layer: The layer.
        channels: Their present indices.
        width: Number of output channels of the layer now.
        count: Gives the number of output channels of a layer.
    """

    layer: nn.Module
    channels: frozenset[int]
    width: int
    count: Callable[[nn.Module], int | None]

    def was_made(self) -> bool:
        """Whether the layer has lost these channels; pruning may have raised half-way."""
        return self.count(self.layer) == self.width - len(self.channels)


def _cuts(group: tp.dependency.Group) -> Iterator[_Cut]:
    graph = group._DG
    for _, dependency, channels, _ in members(group):
        layer = dependency.target.module
        if isinstance(layer, nn.Module) and graph.is_out_channel_pruning_fn(dependency.handler):
            width = graph.get_out_channels(layer)
            if width is not None:
                yield _Cut(layer, frozenset(channels), width, graph.get_out_channels)


def _informing_ledgers(original: Callable[..., None]) -> Callable[..., None]:
    def prune(
        self: tp.dependency.Group, idxs: Sequence[int] | None = None, record_history: bool = True
    ) -> None:
        if idxs is not None:  # makes a new group of these indices, and calls this function again
            original(self, idxs, record_history)
            return
        root = self[0].dep.target.module
        if any(root in ledger and ledger.refuses(self) for ledger in _PRUNE.users):
            return
        cuts = list(_cuts(self))
        try:
            original(self, None, record_history)
        finally:
            for cut in filter(_Cut.was_made, cuts):
                for ledger in _PRUNE.users:
                    ledger._remove(cut)

    return prune


_PRUNE = Patch(tp.dependency.Group, "prune", _informing_ledgers)
