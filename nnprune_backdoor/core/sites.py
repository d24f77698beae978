"""Find the neurons of any network by watching one forward pass.

Nothing is inferred from names or from the order of registration: a norm layer belongs to the
convolution whose very output it was given, the classifier is what moves single logits, and
attention is where activations are multiplied with activations, and a head is what a layer reads of
it in channels of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..utils.tensors import check_default_device
from .copies import refuse_unusual_weights
from .heads import Heads, find_heads
from .logits import find_logit_layers
from .outputs import gives_logits, logits_alone, wants_name
from .products import layers_in_products
from .trace import LAYERS, NORMS, Call, Trace, layers_without_effect


@dataclass(frozen=True)
class Site:
    """A layer that has neurons: its output channels, or the attention heads that it reads.

    Attributes:
        name: Of the layer.
        channels: Number of neurons.
        kind: "norm" (a norm layer standing for itself and the convolution or linear layer,
            `producer`, that feeds it directly), "layer" (a convolution or linear layer without
            one), or "heads" (the output projection of attention, whose inputs are the heads).
        producer: The convolution or linear layer whose weights are the neurons'.
        width: Inputs of the layer that one head has; 1 for other kinds.
    """

    name: str
    channels: int
    kind: Literal["norm", "layer", "heads"]
    producer: str
    width: int = 1

    def weights_of(self, layer: nn.Module) -> Tensor:
        """The weights of each neuron, (channels, ...): a view of the weight of this site's layer.

        Of a norm gamma, of other layers the rows, of heads the columns that read them.

        Raises:
            UnsupportedModelError: the layer has another width.
        """
        weight: Any = layer.weight
        rows = self.kind != "heads"
        found = weight.shape[0 if rows else 1]
        if found != self.channels * self.width:
            raise UnsupportedModelError(
                f"the site has {self.channels * self.width} channels of {self.name!r}, the model "
                f"has {found}; find the sites of this model, or take it in its full shape"
            )
        whole: Tensor = weight
        return whole if rows else whole.unflatten(1, (self.channels, self.width)).movedim(1, 0)


class Neuron(NamedTuple):
    """One output channel, or one head, of one site."""

    site: str
    channel: int


def find_sites(model: nn.Module, example: Tensor) -> tuple[Site, ...]:
    """Every site of the model, in the order in which the layers run.

    Attention (a module that multiplies activations with activations, or calls softmax attention)
    has heads for neurons, if it has several; its projections are no sites of their own. Also left
    out, because silencing them would not switch a neuron off: the classifier; gates (convolutions
    and linear layers inside a module that multiplies its own input by what it computes, as
    squeeze-and-excitation does); layers that the logits do not depend on.

    Args:
        model: any classifier in eval mode, (N, C, H, W) -> (N, classes); it is left as it was.
        example: images (N, C, H, W) on the model's device; two are enough.

    Raises:
        DataError: tensors are not made on the CPU by default.
        UnsupportedModelError: there is no site (the message lists the layer types seen); the
            layers that give the logits cannot be told; weights are of unusual types; the affine
            weights of a norm layer are frozen into buffers (FrozenBatchNorm).
    """
    check_default_device()
    refuse_unusual_weights(model)
    model, trace = _traced(model, example)
    layers = {call.module for call in trace.calls if isinstance(call.module, LAYERS)}
    if not layers:
        raise _no_neuron(trace)
    logits = find_logit_layers(model, example, trace)
    left_out = {*logits.classifiers, *logits.last, *layers_without_effect(model, example, trace)}
    heads = {h.layer: h for h in find_heads(trace) if h.layer not in left_out}
    sites = _sites(model, trace, left_out | layers_in_products(model, trace), heads)
    if not sites:
        raise _no_neuron(trace)
    return sites


def find_classifiers(model: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Names of the layers that give the logits, last to run first.

    One, or several where heads are averaged or concatenated. A layer that calibrates the logits of
    another one is not among them.

    Args:
        model: any classifier in eval mode; it is left as it was.
        example: images (N, C, H, W) on the model's device; two are enough.

    Raises:
        UnsupportedModelError: no layer gives the logits, or it cannot be told which ones do.
    """
    model, trace = _traced(model, example)
    logits = find_logit_layers(model, example, trace)
    names = {module: name for name, module in model.named_modules()}
    found = [names[m] for m in reversed(logits.classifiers) if m not in logits.calibrating]
    if not found:
        raise UnsupportedModelError(
            "found no classifier: expected convolutions or linear layers to give the logits, one "
            "channel a class"
        )
    return tuple(found)


def _traced(model: nn.Module, example: Tensor) -> tuple[nn.Module, Trace]:
    """What one pass did, and in which model: a copy where the given one gives more than logits."""
    if not wants_name(model):
        trace = Trace.of(model, example)
        if gives_logits(trace.output):
            return model, trace
    model = logits_alone(model, example)
    return model, Trace.of(model, example)


def _sites(
    model: nn.Module, trace: Trace, left_out: set[nn.Module], heads: dict[nn.Module, Heads]
) -> tuple[Site, ...]:
    left_out = left_out | heads.keys()
    names = {module: name for name, module in model.named_modules()}
    first: dict[nn.Module, Call] = {}
    for call in trace.calls:
        first.setdefault(call.module, call)
    producers = {c.gave: m for m, c in first.items() if isinstance(m, LAYERS)}
    sites: dict[nn.Module, Site] = {}
    with_norm: set[nn.Module] = set()
    for module, call in first.items():
        if not isinstance(module, NORMS) or module.weight is None:
            continue
        producer = producers.get(call.given)
        if producer is None or _width(producer) != _width(module):
            continue
        with_norm.add(producer)
        if producer not in left_out and module not in left_out:
            sites[module] = Site(names[module], _width(module), "norm", names[producer])
    for module in producers.values():
        if module not in with_norm and module not in left_out:
            sites[module] = Site(names[module], _width(module), "layer", names[module])
    for module, found in heads.items():
        sites[module] = Site(names[module], found.count, "heads", names[module], found.width)
    return tuple(sites[module] for module in first if module in sites)


def _no_neuron(trace: Trace) -> UnsupportedModelError:
    types = ", ".join(sorted(trace.types)) or "none"
    return UnsupportedModelError(
        "found no neuron to score: expected convolution or linear layers besides the classifier, "
        f"attention projections and gates; layer types seen: {types}"
    )


def _width(module: nn.Module) -> int:
    """Number of output channels of a layer or norm."""
    for attribute in ("out_channels", "out_features", "num_features", "num_channels"):
        if hasattr(module, attribute):
            return int(getattr(module, attribute))
    raise AssertionError(f"{type(module).__name__} is neither a layer nor a norm")
