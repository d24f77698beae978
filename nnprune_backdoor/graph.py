"""The one door to Torch-Pruning's dependency graph: safe tracing, groups as data, index ledger.

Torch-Pruning finds coupled channels by an autograd trace. It leaves the model in eval mode, its
own hooks behind when the forward pass raises, and everything out that runs without gradients; it
has no limit of time. And it only ever knows *current* channel indices: after a cut, channel 3 is
another one than before. What is here takes care of that, without touching the installed package's
files.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from .data import refuse_wrapped
from .errors import UnsupportedModelError
from .guard import as_it_was, within
from .sites import LAYERS, NORMS

Side = Literal["out", "in"]
Role = Literal["producer", "consumer", "passing", "parameter"]


# --- tracing ---


def trace(
    model: nn.Module,
    example: Tensor,
    *,
    ignored: Iterable[nn.Module | nn.Parameter] = (),
    seconds: float | None = 60.0,
) -> tp.DependencyGraph:
    """The dependency graph of `model`, which is left as it was, also when something raises.

    Works under `no_grad` and on frozen models: every parameter asks for a gradient during the
    trace. Fused attention needs no care here: its one autograd node has query, key and value as
    inputs, which gives the same groups as the plain matrix products (a test compares them).

    Args:
        model: any classifier; it is traced in eval mode.
        example: images (N, C, H, W) on the model's device; two are enough.
        ignored: modules whose output channels no group of `get_all_groups` may touch, the layers
            inside them included, and parameters that are never cut (tables of relative positions).
        seconds: wall time after which tracing is given up; None for no limit. One long call into
            compiled code is only interrupted when it comes back.

    Raises:
        UnsupportedModelError: the model is wrapped, raises, is not traceable, takes too long, or
            runs layers without gradients, whose groups would be incomplete.
    """
    refuse_wrapped(model)
    ignored = list(ignored)
    modules = [item for item in ignored if isinstance(item, nn.Module)]
    parameters = [item for item in ignored if not isinstance(item, nn.Module)]
    with torch.inference_mode(False), torch.enable_grad(), as_it_was(model):
        graph = tp.DependencyGraph()
        try:
            for parameter in model.parameters():
                parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
            build = functools.partial(
                graph.build_dependency,
                model,
                # given without a tuple, a batch would be unpacked into images first
                (example.detach().clone(),),
                # its own way to call the model swallows every error, interrupts included
                forward_fn=_forward,
                unwrapped_parameters=[],
                customized_pruners={},
                ignored_params=parameters,
                verbose=False,
            )
            within(seconds, "tracing its dependency graph", build)
        except UnsupportedModelError:
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"Torch-Pruning cannot trace this {type(model).__name__} "
                f"({type(error).__name__}: {error}); its neurons can be scored and silenced "
                "without it"
            ) from error
    # only now: a layer that is ignored while tracing would be taken for an element-wise operation
    graph.IGNORED_LAYERS_IN_TRACING = [layer for module in modules for layer in module.modules()]
    return graph


def _forward(model: nn.Module, inputs: tuple[Tensor]) -> Any:
    """Run the model; layers whose output carries no gradient would be missing from the graph."""
    names = {module: name for name, module in model.named_modules()}
    blind: list[str] = []

    def look(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.grad_fn is None:
            blind.append(names[module])

    learned = [m for m in names if isinstance(m, LAYERS + NORMS) and m.weight is not None]
    hooks = [layer.register_forward_hook(look) for layer in learned]
    try:
        output = model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if blind:
        raise UnsupportedModelError(
            f"layer {blind[0]!r} and {len(blind) - 1} more run without gradients (no_grad or "
            "inference_mode inside the forward pass), so that Torch-Pruning cannot see what they "
            "are coupled with"
        )
    return output


# --- groups as plain data ---


@dataclass(frozen=True)
class Endpoint:
    """One side of one layer (or one parameter) that a group cuts, and where.

    `roots[i]` is the channel of the group's root that `channels[i]` goes with; None where
    Torch-Pruning does not know.
    """

    name: str
    role: Role
    channels: tuple[int, ...]
    roots: tuple[int | None, ...]


@dataclass(frozen=True)
class Coupled:
    """A group: channels that can only go together, in the model's names.

    The endpoint of the root comes first. A *producer* computes the channels (convolutions,
    linear layers, embeddings, attention), a *consumer* reads them; norms and depthwise
    convolutions pass them on; a parameter that belongs to no known layer may do anything.
    """

    root: str
    channels: tuple[int, ...]  # of the root, in the order that was asked for
    endpoints: tuple[Endpoint, ...]

    @property
    def producers(self) -> tuple[str, ...]:
        """Names of the layers whose output it cuts."""
        return self._names("producer")

    @property
    def consumers(self) -> tuple[str, ...]:
        """Names of the layers whose input it cuts."""
        return self._names("consumer")

    @property
    def private(self) -> bool:
        """Exactly one layer produces these channels: no residual sum shares them."""
        return len(self.producers) == 1

    def _names(self, role: Role) -> tuple[str, ...]:
        return tuple(endpoint.name for endpoint in self.endpoints if endpoint.role == role)


def describe(group: tp.dependency.Group) -> Coupled:
    """The group as plain data, detached from the graph; indices are today's."""
    endpoints = tuple(
        Endpoint(name, _role(group, dependency), channels, roots)
        for name, dependency, channels, roots in members(group)
    )
    return Coupled(endpoints[0].name, endpoints[0].channels, endpoints)


def members(
    group: tp.dependency.Group,
) -> Iterator[tuple[str, Any, tuple[int, ...], tuple[int | None, ...]]]:
    """Name, dependency, channels and root channels of all that a group cuts, its root first."""
    for item in group.items:
        dependency, channels = item
        name = name_of(group, dependency)
        if name is not None:
            # indices may be tensors of no dimension; an item that the pruner emptied has no roots
            roots = getattr(item, "root_idxs", ())
            yield (
                name,
                dependency,
                tuple(map(int, channels)),
                tuple(None if root is None else int(root) for root in roots),
            )


def name_of(group: tp.dependency.Group, dependency: Any) -> str | None:
    """The model's name for what a dependency cuts; None for concat, split, view and the like."""
    target, graph = dependency.target, group._DG
    if target.type == tp.ops.OPTYPE.PARAMETER:
        name: str = graph._param_to_name[target.module]  # `_module2name` numbers them at random
        return name
    return graph._module2name.get(target.module)  # type: ignore[no-any-return]


def out_of_range(group: tp.dependency.Group) -> str | None:
    """The first layer of which the group names channels that it does not have, or None.

    Torch-Pruning loses count where tensors are split, or channels become tokens; such a group
    cannot be cut rightly, and scoring it would stop the pruner with an IndexError.
    """
    graph, asked = group._DG, {int(root) for root in group[0].idxs}
    for name, dependency, channels, roots in members(group):
        if not asked.issuperset(root for root in roots if root is not None):
            return name
        widths = []
        if graph.is_out_channel_pruning_fn(dependency.handler):
            widths.append(graph.get_out_channels(dependency.target))
        if graph.is_in_channel_pruning_fn(dependency.handler):
            widths.append(graph.get_in_channels(dependency.target))
        for width in widths:
            if width is not None and any(not 0 <= channel < width for channel in channels):
                return name
    return None


def _role(group: tp.dependency.Group, dependency: Any) -> Role:
    graph, kinds = group._DG, tp.ops.OPTYPE
    if dependency.target.type == kinds.PARAMETER:
        return "parameter"
    if dependency.target.type in (kinds.EMBED, kinds.MHA):
        return "producer"
    if not graph.is_out_channel_pruning_fn(dependency.handler):
        return "consumer"
    return "passing" if graph.is_in_channel_pruning_fn(dependency.handler) else "producer"


# --- the index ledger ---


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
        _LEDGERS.add(self)
        _wrap_prune()
        weakref.finalize(self, _unwrap_prune)

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


_LEDGERS: weakref.WeakSet[Ledger] = weakref.WeakSet()


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


_WRAPPERS: weakref.WeakSet[Any] = weakref.WeakSet()  # all that stand, or stood, in `Group.prune`


def _wrap_prune() -> None:
    """Let `Group.prune` tell the ledgers. The only place that changes a class of Torch-Pruning."""
    group = tp.dependency.Group
    if inspect.unwrap(group.prune, stop=_WRAPPERS.__contains__) in _WRAPPERS:
        return
    plain = group.prune

    @functools.wraps(plain)
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
                for ledger in list(_LEDGERS):
                    ledger._strike(cut)

    _WRAPPERS.add(prune)
    group.prune = prune


def _unwrap_prune() -> None:
    """Take the wrapper off when the last ledger is gone, unless somebody has wrapped it again."""
    group = tp.dependency.Group
    while not list(_LEDGERS) and group.prune in _WRAPPERS:
        group.prune = group.prune.__wrapped__
