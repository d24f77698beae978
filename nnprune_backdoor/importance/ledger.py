"""The index ledger: which original channels are left, however often a model was pruned.

Torch-Pruning only ever knows *current* channel indices: after a cut, channel 3 is another one than
before.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch_pruning as tp
from torch import nn

from ..errors import UnsupportedModelError
from .graph import members
from .patching import Wrapping

Side = Literal["out", "in"]


class Ledger:
    """Which original channels each layer of a model still has, kept through every prune.

    Counting starts when the ledger is made. Every way to prune with Torch-Pruning (`step()`,
    interactive or not, `get_pruning_group(...).prune()`, replay of a history) ends in
    `Group.prune`, which tells all ledgers what was cut. Layers cut by hand are not noticed;
    parameters outside of known layers are not counted.

    A ledger keeps no model alive, and the package no ledger.
    """

    def __init__(self, model: nn.Module) -> None:
        self._rows: weakref.WeakKeyDictionary[nn.Module, dict[Side, tuple[int, ...]]] = (
            weakref.WeakKeyDictionary({module: _all_channels(module) for module in model.modules()})
        )
        _PRUNE.hold(self)

    def alive(self, layer: nn.Module, side: Side = "out") -> tuple[int, ...]:
        """Original indices of the channels that `layer` has today, in today's order.

        Raises:
            UnsupportedModelError: no layer of this model, or one that Torch-Pruning cannot cut.
        """
        row = self._rows.get(layer, {}).get(side)
        if row is None:
            raise UnsupportedModelError(
                f"expected a prunable layer of the ledger's model, got {type(layer).__name__}"
            )
        return row

    def state(self) -> dict[nn.Module, dict[Side, tuple[int, ...]]]:
        """What `restore` takes, for whoever undoes a prune; holds the layers alive."""
        return {layer: dict(rows) for layer, rows in self._rows.items()}

    def restore(self, state: dict[nn.Module, dict[Side, tuple[int, ...]]]) -> None:
        """Go back to an earlier `state`."""
        self._rows.clear()
        self._rows.update({layer: dict(rows) for layer, rows in state.items()})

    def _strike(self, cut: _Cut) -> None:
        if cut.layer not in self._rows:
            return
        rows = self._rows[cut.layer]
        row = rows.get(cut.side, tuple(range(cut.width)))  # none yet: a layer with its own pruner
        if len(row) == cut.width:  # else it was struck already, or the layer cut by hand before
            rows[cut.side] = tuple(
                original for index, original in enumerate(row) if index not in cut.channels
            )


def _all_channels(layer: nn.Module) -> dict[Side, tuple[int, ...]]:
    pruner = tp.pruner.function.PrunerBox.get(tp.ops.module2type(layer))
    if pruner is None:
        return {}
    widths: dict[Side, int | None] = {
        "out": pruner.get_out_channels(layer),
        "in": pruner.get_in_channels(layer),
    }
    return {side: tuple(range(width)) for side, width in widths.items() if width is not None}


@dataclass(frozen=True)
class _Cut:
    """What a group is about to take from one side of one layer of `width` channels."""

    layer: nn.Module
    side: Side
    channels: frozenset[int]
    width: int
    count: Callable[[nn.Module], int | None]

    def was_made(self) -> bool:
        """The layer has become that much narrower: a prune can raise half-way."""
        return self.count(self.layer) == self.width - len(self.channels)


def _cuts(group: tp.dependency.Group) -> Iterator[_Cut]:
    graph = group._DG
    for _, dependency, channels, _ in members(group):
        layer, handler = dependency.target.module, dependency.handler
        sides: list[tuple[Side, bool, Any]] = [
            ("out", graph.is_out_channel_pruning_fn(handler), graph.get_out_channels),
            ("in", graph.is_in_channel_pruning_fn(handler), graph.get_in_channels),
        ]
        for side, touched, count in sides:
            width = count(layer) if touched and isinstance(layer, nn.Module) else None
            if width is not None:
                yield _Cut(layer, side, frozenset(channels), width, count)


def _make(plain: Callable[..., None]) -> Callable[..., None]:
    def prune(
        self: tp.dependency.Group, idxs: Sequence[int] | None = None, record_history: bool = True
    ) -> None:
        if idxs is not None:  # makes a new group and prunes that one
            plain(self, idxs, record_history)
            return
        cuts = list(_cuts(self))
        try:
            plain(self, None, record_history)
        finally:
            for cut in filter(_Cut.was_made, cuts):
                for ledger in _PRUNE.users:
                    ledger._strike(cut)

    return prune


_PRUNE = Wrapping(tp.dependency.Group, "prune", _make)  # tells the ledgers
