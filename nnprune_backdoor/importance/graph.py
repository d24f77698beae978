"""The door to Torch-Pruning's dependency graph: safe tracing, and groups as plain data.

Torch-Pruning finds coupled channels by an autograd trace. It leaves the model in eval mode, its
own hooks behind when the forward pass raises, and everything out that runs without gradients; it
has no limit of time. What is here takes care of that; what the trace itself gets wrong is set right
by `mending`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from ..core.copies import as_it_was, frozen_copy, refuse_wrapped
from ..core.sites import LAYERS, NORMS
from ..errors import UnsupportedModelError
from ..utils.time_limit import within
from .graph_fixes import MENDED

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
        MENDED.hold(graph)
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


def breaks(group: tp.dependency.Group, example: Tensor, shape: torch.Size) -> str:
    """Why the network does not run without some channels of a group; empty if it does.

    The least that can go (a channel, one of each group of a convolution in groups) is cut out of a
    copy. Views by a number of heads that does not change, splits of fixed sizes and layers that
    Torch-Pruning cuts wrongly show in this way.

    Args:
        group: with all channels of its root; nothing is pruned.
        example: images (N, C, H, W) on the model's device.
    """
    graph, root, every = group._DG, group[0].dep, [int(channel) for channel in group[0].idxs]
    apart = max(
        _groups_of_channels(dependency.target.module) for _, dependency, *_ in members(group)
    )
    some = every[:: max(1, len(every) // apart)]
    own = frozen_copy(graph.model)
    try:
        with torch.no_grad():
            _cut(own, graph.get_pruning_group(root.target.module, root.handler, some))
            got = own(example).shape
    except Exception as error:  # whatever a network does with shapes that it does not expect
        return f"{type(error).__name__}: {error}"
    return "" if got == shape else f"logits of shape {tuple(got)}"


def _cut(model: nn.Module, group: tp.dependency.Group) -> None:
    """Prune the layers of another model that are named like those of the group's."""
    for name, dependency, channels, _ in members(group):
        dependency.handler.__self__.pruning_dim = dependency.target.pruning_dim
        if dependency.target.type == tp.ops.OPTYPE.PARAMETER:
            holder, _, attribute = name.rpartition(".")
            place = model.get_submodule(holder)
            smaller = dependency.handler(getattr(place, attribute), list(channels))
            setattr(place, attribute, smaller)
        else:
            dependency.handler(model.get_submodule(name), list(channels))


def _groups_of_channels(layer: Any) -> int:
    """How many channels have to go at once, so that a layer's groups stay alike."""
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups
    groups = int(getattr(layer, "groups", 1))
    return groups if groups < int(getattr(layer, "out_channels", 1)) else 1


def _role(group: tp.dependency.Group, dependency: Any) -> Role:
    graph, kinds = group._DG, tp.ops.OPTYPE
    if dependency.target.type == kinds.PARAMETER:
        return "parameter"
    if dependency.target.type in (kinds.EMBED, kinds.MHA):
        return "producer"
    if not graph.is_out_channel_pruning_fn(dependency.handler):
        return "consumer"
    return "passing" if graph.is_in_channel_pruning_fn(dependency.handler) else "producer"
