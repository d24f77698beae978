"""Attention heads, found by watching a forward pass.

A head is a slice of what attention computes, which a later layer (the output projection) reads in
channels of its own, side by side with those of the other heads.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from .trace import LAYERS, Call, Product, Trace, channel_axis, last_before, nodes_before


@dataclass(frozen=True, eq=False)
class Heads:
    """The heads that a layer reads.

    Attributes:
        layer: Reads head h in its inputs h * width to (h + 1) * width.
        count: Number of heads, two or more.
        width: Inputs a head.
        module: In whose own forward the heads were computed.
    """

    layer: nn.Module
    count: int
    width: int
    module: nn.Module


def find_heads(trace: Trace) -> tuple[Heads, ...]:
    """All layers that read attention heads, in the order in which they ran.

    What a layer reads must come from one product of activations with an axis for heads, and of
    each slice along this axis nothing may reach the channels of another one. A norm over all heads
    in between is therefore none of this, and neither is a single head.

    Args:
        trace: of one forward pass; without gradients nothing is found.
    """
    products = {
        product.edges[0].node: product
        for product in trace.products
        if product.mixes and not product.elementwise and product.edges
    }
    layers = {c.edges[0].node for c in trace.calls if isinstance(c.module, LAYERS) and c.edges}
    first: dict[nn.Module, Call] = {}
    for call in trace.calls:
        if isinstance(call.module, LAYERS) and call.inputs:
            first.setdefault(call.module, call)
    found = (_heads(trace, call, products, layers) for call in first.values())
    return tuple(heads for heads in found if heads is not None)


def computing_only(trace: Trace, heads: Collection[Heads]) -> set[nn.Module]:
    """Layers that do nothing but compute these heads, as those of queries, keys and values.

    Also modules inside of the attention whose weights are used without a call of theirs.
    """
    reading = {h.layer for h in heads}
    stops = {c.edges[0].node for c in trace.calls if c.module in reading and c.edges}
    apart = nodes_before(trace.output_edges, stops)
    called = {call.module for call in trace.calls}
    elsewhere = {c.module for c in trace.calls if any(e.node in apart for e in c.edges)}
    inside = {module for h in heads for module in h.module.modules()}
    return (called - elsewhere) | (inside - called)


def _heads(
    trace: Trace, call: Call, products: dict[Node, Product], layers: set[Node]
) -> Heads | None:
    stops = last_before(call.inputs[:1], products.keys() | layers)
    sources = [products[node] for node in stops if node in products]
    weight = call.module._parameters.get("weight")
    if len(sources) != 1 or weight is None or getattr(call.module, "groups", 1) > 1:
        return None
    product, channels = sources[0], weight.shape[1]
    if trace.start and len(trace.activations(product)) < 2:
        return None
    for axis in range(1, len(product.shape) - 2):  # after the images, before tokens and channels
        count = product.shape[axis]
        possible = 1 < count < channels and channels % count == 0
        if possible and _side_by_side(call, product, axis, weight):
            return Heads(call.module, count, channels // count, product.module)
    return None


def _side_by_side(call: Call, product: Product, axis: int, weight: Tensor) -> bool:
    """Whether slice h along an axis of the product arrives in the h-th block of inputs alone."""
    count = product.shape[axis]
    noise = torch.randn(call.read, generator=torch.Generator().manual_seed(0)).to(weight)
    channels = channel_axis(call.module, noise.ndim)
    width = noise.shape[channels] // count
    for head in range(count):
        only = torch.zeros_like(noise)
        block = channels, head * width, width
        only.narrow(*block).copy_(noise.narrow(*block))
        try:
            (gradient,) = torch.autograd.grad(
                call.inputs[:1], product.edges[:1], (only,), retain_graph=True, allow_unused=True
            )
        except RuntimeError:  # no derivative, or what it needs was overwritten
            return False
        if gradient is None or gradient.shape != product.shape:
            return False
        reached = (gradient != 0).movedim(axis, 0).flatten(1).any(1)
        if not reached[head] or reached.sum() > 1:
            return False
    return True
