"""Which layers give the logits: found by what their outputs do to them, not by position or width.

A layer is a classifier if each element of its output moves one logit alone (or one against all
others), and does so either with no layer in between or in proportion, as a layer that calibrates
single logits lets it. Heads that are averaged, concatenated or added up are thus all found.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from ..errors import UnsupportedModelError
from .trace import LAYERS, Call, Product, Trace, last_before

_Producer = Call | Product

_DIRECTIONS = 6  # random weightings of the logits, which tell one logit from another
_NOTHING = 1e-6  # of the largest pull in a tensor: rounding
_EXACT = 1e-3  # the sine of an angle between directions that are the same
_IN_PROPORTION = 0.01  # relative deviation; an activation function makes much more
_SHIFT = 10.0  # of a layer's largest output: no activation function is linear over so much


@dataclass(frozen=True)
class LogitLayers:
    """Layers near the logits.

    Attributes:
        classifiers: Each of their channels moves one logit; in the order in which they run. Empty
            where the logits come from a product with a parameter outside of any layer.
        calibrating: Those of them that are given single logits by others.
        last: All layers from which the logits are reached without passing another layer.
    """

    classifiers: tuple[nn.Module, ...]
    calibrating: frozenset[nn.Module]
    last: frozenset[nn.Module]


def find_logit_layers(model: nn.Module, images: Tensor, trace: Trace) -> LogitLayers:
    """The layers that give the logits.

    Args:
        model: in eval mode.
        images: what the trace was taken on.
        trace: of one forward pass.

    Raises:
        UnsupportedModelError: the output is not (N, classes), or logits that vary between the
            images come neither from a layer nor from a product with a parameter.
    """
    logits = trace.output
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UnsupportedModelError(
            f"expected a classifier with output (N, classes), got {found}; wrap the model so "
            "that its forward returns the logits alone"
        )
    if not logits.requires_grad:
        return _without_gradients(trace, logits)
    return _Search(model, images, trace, logits).run()


def _without_gradients(trace: Trace, logits: Tensor) -> LogitLayers:
    """Where nothing can be told from gradients: the layer whose very output the logits are."""
    for call in reversed(trace.calls):
        if isinstance(call.module, LAYERS) and call.is_output(logits):
            return LogitLayers((call.module,), frozenset(), frozenset({call.module}))
    raise _unnamed("no gradient reaches the logits")


def _unnamed(why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"cannot tell which layers give the logits ({why}), so that a class could be taken for a "
        "neuron; give a model that ends with linear layers or convolutions, one output channel a "
        "class, and returns their logits"
    )


class _Search:
    """From the logits back over the layers, until these are no longer classifiers."""

    def __init__(self, model: nn.Module, images: Tensor, trace: Trace, logits: Tensor) -> None:
        self._model, self._images, self._trace, self._logits = model, images, trace, logits
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(_DIRECTIONS, logits.shape[1], generator=generator)
        self._free = weights.to(logits.device).double()
        # what all logits have in common, as log_softmax subtracts it, does not count
        self._centred = self._free - self._free.mean(1, keepdim=True)
        self._calls = [c for c in trace.calls if isinstance(c.module, LAYERS) and c.edges]
        self._producers: dict[Node, _Producer] = {c.edges[0].node: c for c in self._calls}
        for product in trace.products:
            if product.edges and len(trace.activations(product)) == 1:
                self._producers.setdefault(product.edges[0].node, product)

    def run(self) -> LogitLayers:
        classifiers: set[nn.Module] = set()
        calibrating: set[nn.Module] = set()
        last: set[nn.Module] = set()
        covered: set[int] = set()
        # a producer of logits, and the producers between it and the output
        waiting = [(p, frozenset[_Producer]()) for p in self._before(self._trace.output_edges)]
        seen = {producer for producer, _ in waiting}
        while waiting:
            producer, between = waiting.pop()
            layer = _layers([producer])
            hands_on = self._hands_on(producer)
            transparent = isinstance(producer, Product) and producer.elementwise and hands_on
            if not transparent:
                last |= layer if not between else set()
                moved = self._moved(producer.edges, self._centred)
                if not moved or (between and not self._in_proportion(producer)):
                    continue
                covered |= moved
                classifiers |= layer
                calibrating |= _layers(between)
                between |= {producer}
            if hands_on:
                behind = [p for p in self._before(self._inputs(producer)) if p not in seen]
                waiting += [(p, between) for p in behind]
                seen.update(behind)
        vary = (self._logits != self._logits[:1]).any(0).nonzero().flatten().tolist()
        if missing := set(vary) - covered:
            raise _unnamed(f"{len(missing)} of {self._logits.shape[1]} come from none")
        ordered = dict.fromkeys(c.module for c in self._calls if c.module in classifiers)
        return LogitLayers(tuple(ordered), frozenset(calibrating), frozenset(last))

    def _before(self, edges: Iterable[GradientEdge]) -> list[_Producer]:
        """The producers from which these are reached without passing another one."""
        return [self._producers[node] for node in last_before(edges, set(self._producers))]

    def _inputs(self, producer: _Producer) -> list[GradientEdge]:
        if isinstance(producer, Call):
            return list(producer.inputs)
        return self._trace.activations(producer)

    def _hands_on(self, producer: _Producer) -> bool:
        """Whether each element that it is given moves one logit, so that it may be one already.

        Of two logits there is one difference alone, which everything moves; there each counts.
        """
        inputs, classes = self._inputs(producer), self._logits.shape[1]
        weights = self._free if classes == 2 else self._centred
        return classes > 1 and all(self._moved([edge], weights) for edge in inputs)

    def _moved(self, edges: Iterable[GradientEdge], weights: Tensor) -> set[int]:
        """The logits that the elements of a tensor move, one an element; else, and for none, empty.

        Args:
            edges: of the tensor.
            weights: of the logits, (directions, classes).
        """
        pulls = torch.stack([pulls[0].flatten() for pulls in self._pulls(edges, weights)])
        rounding = max(torch.finfo(t.dtype).eps for t in (pulls, self._logits))
        pull = pulls.double()
        sizes = pull.norm(dim=0)
        pull = pull[:, sizes > _NOTHING * sizes.max()]
        if not pull.numel() or not pull.isfinite().all():
            return set()
        directions = F.normalize(weights, dim=0).T @ F.normalize(pull, dim=0)
        likeness, nearest = directions.abs().max(0)
        sine = (1 - likeness.clamp(max=1) ** 2).sqrt()
        if bool((sine > max(_EXACT, 8 * rounding)).any()):
            return set()
        # two logits have one difference, so that what moves one moves the other one against it
        return {0, 1} if len(directions) == 2 else set(nearest.tolist())

    def _pulls(self, edges: Iterable[GradientEdge], weights: Tensor) -> list[list[Tensor]]:
        """Gradients at the edges of each weighting (directions, classes) of the logits."""
        edges = list(edges)
        rows = []
        for row in weights:
            with torch.inference_mode(False), torch.enable_grad():
                total = (self._logits.double() * row).sum()
            pulls = torch.autograd.grad(total, edges, retain_graph=True, materialize_grads=True)
            rows.append(list(pulls))
        return rows

    def _in_proportion(self, producer: _Producer) -> bool:
        """Whether the logits follow the producer's output in proportion, however far it moves."""
        if isinstance(producer, Product):
            return True
        calls = [call for call in self._calls if call.module is producer.module]
        generator = torch.Generator().manual_seed(0)
        shifts = [
            torch.randn(call.shape, generator=generator).to(self._logits.device) * _SHIFT * size
            for call, size in zip(calls, self._sizes(producer.module), strict=True)
        ]
        edges = [edge for call in calls for edge in call.edges]
        expected = [
            sum(float((p.double() * s).sum()) for p, s in zip(pulls, shifts, strict=True))
            for pulls in self._pulls(edges, self._free)
        ]
        moved = self._run_with(producer.module, lambda call, output: output + shifts[call])
        actual = self._free @ (moved - self._logits.detach()).double().sum(0)
        gap = actual - torch.tensor(expected, device=actual.device)
        return bool(gap.norm() < _IN_PROPORTION * actual.norm())

    def _sizes(self, module: nn.Module) -> list[float]:
        """The largest size of what a layer gives, call by call."""
        sizes: list[float] = []

        def measured(_: int, output: Tensor) -> Tensor:
            sizes.append(float(output.abs().max()))
            return output

        self._run_with(module, measured)
        return sizes

    def _run_with(self, module: nn.Module, change: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Logits if each output of a layer, the first is number 0, is changed."""
        numbers, thread = itertools.count(), threading.get_ident()

        def changed(_: nn.Module, inputs: object, output: Tensor) -> Tensor:
            if threading.get_ident() != thread:
                return output
            return change(next(numbers), output).to(output)

        with module.register_forward_hook(changed), torch.no_grad():
            logits: Tensor = self._model(self._images.clone())
        return logits


def _layers(producers: Iterable[_Producer]) -> set[nn.Module]:
    return {producer.module for producer in producers if isinstance(producer, Call)}
