"""Layers inside attention and gates: what multiplies activations is not a neuron of its own."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.autograd.graph import GradientEdge, Node

from .trace import LAYERS, Product, Trace, last_before, nodes_before


def layers_in_products(model: nn.Module, trace: Trace) -> set[nn.Module]:
    """Modules inside attention and gates.

    These are all modules inside a module that multiplies activations in its own forward. A whole
    network that does so, for bilinear or attention pooling, is no attention block, however deep it
    is wrapped: of its layers only those count that compute one factor from the other one, or two
    factors apart from each other, as queries and keys.

    Args:
        model: the traced model.
        trace: of one forward pass.
    """
    inside: set[nn.Module] = set()
    flow = _Flow(trace)
    for product in trace.products:
        if not product.mixes or (trace.start and len(trace.activations(product)) < 2):
            continue  # what is the same for all images only weighs activations
        if flow.is_network(product, model):
            inside |= flow.projections(product) & set(product.module.modules())
        else:
            inside.update(product.module.modules())
    return inside


class _Flow:
    """Which layer is computed from which."""

    def __init__(self, trace: Trace) -> None:
        self._layers: dict[Node, nn.Module] = {}
        self._inputs: dict[nn.Module, list[GradientEdge]] = {}
        for call in trace.calls:
            if isinstance(call.module, LAYERS) and call.edges:
                self._layers[call.edges[0].node] = call.module
                self._inputs.setdefault(call.module, []).extend(call.inputs)

    def is_network(self, product: Product, model: nn.Module) -> bool:
        """Whether the module that multiplies is a network rather than a block of one.

        It is given the images themselves, or holds most of the layers.
        """
        module = product.module
        held = sum(layer in self._inputs for layer in module.modules())
        if module is model or 2 * held > len(self._inputs):
            return True
        return bool(product.given) and not self._before(product.given)

    def projections(self, product: Product) -> set[nn.Module]:
        """Layers that give a factor of their own, and those that compute it from another factor."""
        givers = [self._givers(factor) for factor in product.factors]
        sources: set[nn.Module] = set()  # what other factors are computed from, or the same as
        for factor, layers in enumerate(givers):
            others = [product.factors[f] for f in range(len(givers)) if f != factor]
            sources |= layers & set().union(*map(self._before, others))
        projections = set().union(*givers) - sources
        return projections | {
            layer
            for projection in projections
            for layer in self._before(self._inputs[projection])
            if sources & self._before(self._inputs[layer])
        }

    def _givers(self, edges: Iterable[GradientEdge]) -> set[nn.Module]:
        """The layers whose outputs these are computed from, without another layer."""
        return {self._layers[node] for node in last_before(edges, set(self._layers))}

    def _before(self, edges: Iterable[GradientEdge]) -> set[nn.Module]:
        """All layers that these are computed from."""
        return {self._layers[n] for n in nodes_before(edges) if n in self._layers}
