"""Torch-Pruning's dependency graph: trace it safely, and read its groups.

Torch-Pruning finds coupled channels by an autograd trace. By itself, it leaves the model in eval
mode, leaves its hooks behind when the forward pass raises, misses all that runs without gradients,
and may run forever. `trace` prevents this; errors of the graph itself are corrected by
`graph_fixes`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from ..core.copies import as_it_was, refuse_wrapped
from ..core.trace import LAYERS, NORMS
from ..errors import UnsupportedModelError
from ..utils.time_limit import within
from .graph_fixes import GRAPH_FIXES

# --- tracing ---


def trace(
    model: nn.Module,
    example: Tensor,
    *,
    ignored: Iterable[nn.Module | nn.Parameter] = (),
    seconds: float | None = 60.0,
) -> tp.DependencyGraph:
    """The dependency graph of `model`, which is left as it was even when tracing raises.

    Frozen models can be traced too, also under `no_grad`: all parameters require gradients during
    the trace. Fused attention gives the same groups as plain matrix products.

    Args:
        model: any classifier; it is traced in eval mode.
        example: images (N, C, H, W) on the model's device; two are enough.
        ignored: modules whose output channels `get_all_groups` must not prune, including all layers
            inside them, and parameters that are never pruned (tables of relative positions).
        seconds: limit of wall time; None for no limit. A long call into compiled code is only
            interrupted when it returns.

    Raises:
        UnsupportedModelError: the model is wrapped, raises, cannot be traced, takes too long, or
            runs layers without gradients, so that groups would be incomplete.
    """
    refuse_wrapped(model)
    ignored = list(ignored)
    modules = [item for item in ignored if isinstance(item, nn.Module)]
    parameters = [item for item in ignored if not isinstance(item, nn.Module)]
    with torch.inference_mode(False), torch.enable_grad(), as_it_was(model):
        graph = tp.DependencyGraph()
        GRAPH_FIXES.hold(graph)
        try:
            for parameter in model.parameters():
                parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
            build = functools.partial(
                graph.build_dependency,
                model,
                (example.detach().clone(),),  # a tuple, since a tensor would be unpacked
                # by default it catches all exceptions of the model, even interrupts
                forward_fn=_forward,
                unwrapped_parameters=[],
                customized_pruners={},
                ignored_params=parameters,
                verbose=False,
            )
            within(seconds, "tracing the dependency graph", build)
        except UnsupportedModelError:
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"Torch-Pruning cannot trace this {type(model).__name__} "
                f"({type(error).__name__}: {error}); its neurons can be scored and silenced "
                "without it"
            ) from error
    # after tracing, since ignored layers would be traced as element-wise operations
    graph.IGNORED_LAYERS_IN_TRACING = [layer for module in modules for layer in module.modules()]
    return graph


def _forward(model: nn.Module, inputs: tuple[Tensor]) -> Any:
    """Run the model; raise if a layer runs without gradients, since the graph would miss it."""
    names = {module: name for name, module in model.named_modules()}
    without_gradient: list[str] = []

    def check(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.grad_fn is None:
            without_gradient.append(names[module])

    layers = [m for m in names if isinstance(m, LAYERS + NORMS) and m.weight is not None]
    hooks = [layer.register_forward_hook(check) for layer in layers]
    try:
        output = model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if without_gradient:
        raise UnsupportedModelError(
            f"layer {without_gradient[0]!r} and {len(without_gradient) - 1} more run without "
            "gradients, so that Torch-Pruning cannot see what they are coupled with; take no_grad "
            "and inference_mode out of the forward pass"
        )
    return output


# --- groups ---


def members(
    group: tp.dependency.Group,
) -> Iterator[tuple[str, Any, tuple[int, ...], tuple[int | None, ...]]]:
    """Name, dependency, channels and root channels of each layer that a group prunes, root first.

    The i-th root channel is the channel of the group's root that the i-th channel is coupled with;
    None where Torch-Pruning does not know.
    """
    for item in group.items:
        dependency, channels = item
        name = name_of(group, dependency)
        if name is not None:
            # indices may be 0-dimensional tensors; an item that the pruner emptied has no roots
            roots = getattr(item, "root_idxs", ())
            yield (
                name,
                dependency,
                tuple(map(int, channels)),
                tuple(None if root is None else int(root) for root in roots),
            )


def name_of(group: tp.dependency.Group, dependency: Any) -> str | None:
    """Name in the model of what a dependency prunes; None for concat, split, view and the like."""
    target, graph = dependency.target, group._DG
    if target.type == tp.ops.OPTYPE.PARAMETER:
        name: str = graph._param_to_name[target.module]  # `_module2name` has generated names
        return name
    return graph._module2name.get(target.module)  # type: ignore[no-any-return]


def out_of_range(group: tp.dependency.Group) -> str | None:
    """Name of the first layer that does not have the channels the group would prune, or None.

    Torch-Pruning computes wrong indices where tensors are split or channels become tokens. Such a
    group cannot be pruned, and scoring it would stop the pruner with an IndexError.
    """
    graph, root_channels = group._DG, {int(root) for root in group[0].idxs}
    for name, dependency, channels, roots in members(group):
        if not root_channels.issuperset(root for root in roots if root is not None):
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


def one_channel(graph: tp.DependencyGraph, layer: nn.Module) -> tp.dependency.Group:
    """The group of one output channel of a layer; more where channels can only go together.

    Of a grouped convolution and of whole heads, one channel of each. The group is not pruned.
    """
    handler = graph.get_pruner_of_module(layer).prune_out_channels
    group = graph.get_pruning_group(layer, handler, [0])
    count = max(_channel_groups(dependency.target.module) for _, dependency, *_ in members(group))
    if count == 1:
        return group
    channels = range(graph.get_out_channels(layer))
    return graph.get_pruning_group(layer, handler, channels[:: max(1, len(channels) // count)])


def _channel_groups(layer: Any) -> int:
    """Number of channel groups of a layer; pruning must keep groups equally large."""
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups
    if isinstance(layer, nn.MultiheadAttention):
        return int(layer.num_heads)
    groups = int(getattr(layer, "groups", 1))
    return groups if groups < int(getattr(layer, "out_channels", 1)) else 1
