"""Find channels that a network does not need by running it, on any architecture.

Its dense layers are disconnected (`probing`), then:

1. Dense layers emit noise, but their bias alone where a row of the weight is zero. An input that
   stays constant depends on silent channels only (`constant_inputs`).
2. Dense layers emit noise, and all inputs that are not constant are differentiated. An output
   without a gradient is not needed (`without_influence`).
3. The outputs that are not needed emit NaN. Every channel that becomes NaN has to be removed with
   them (`reach_of`).

This finds silent neurons, and channels that only they need: the gate of a silent channel, the
convolution before a silent depthwise one. Channels that are added to others, normalised with them
or mixed with them are left to `narrowing`, since the others are read through them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .narrowing import Narrowed, surplus
from .probing import (
    Marks,
    ProbedNetwork,
    Reach,
    constant_inputs,
    reach_of,
    without_influence,
    zeros_as_ones,
)


@dataclass(frozen=True, eq=False)
class Removable:
    """Channels that can be removed together.

    Attributes:
        outputs: Outputs of dense layers.
        inputs: Inputs of dense layers.
        between: Inputs and outputs of the layers between dense layers.
        constants: Values (channels,) of `inputs`; the bias of their layer replaces those that are
            not zero.
        narrowed: Channels in whose place there is a constant.
    """

    outputs: Marks
    inputs: Marks
    between: dict[nn.Module, tuple[Tensor, Tensor]]
    constants: dict[nn.Module, Tensor]
    narrowed: Narrowed = field(default_factory=Narrowed)

    @classmethod
    def none(cls) -> Removable:
        """No channels."""
        return cls({}, {}, {}, {})

    def gone(self) -> Marks:
        """Outputs of all layers."""
        return {module: after for module, (_, after) in self.between.items()} | self.outputs


def find_removable(network: ProbedNetwork, round_to: int = 1) -> Removable:
    """All channels that can be removed without changing what the network computes.

    Args:
        network: a silenced model.
        round_to: dense layers lose so many outputs that a multiple of this stays, or none.
    """
    constant, values = constant_inputs(network)
    unneeded = without_influence(network, constant)
    for module, marks in unneeded.items():
        unneeded[module] = marks & ~(marks.all() & (marks.cumsum(0) == 1))  # a layer keeps one
    while True:
        removed, reach = _confined(network, constant, unneeded)
        spared = {module: surplus(marks, round_to) for module, marks in removed.items()}
        if not _any(spared):
            return _removable(removed, reach, values)
        unneeded = {module: marks & ~spared[module] for module, marks in unneeded.items()}


def _confined(network: ProbedNetwork, constant: Marks, removed: Marks) -> tuple[Marks, Reach]:
    """Those of the channels that can go without others, and what they reach."""
    while True:
        reach = reach_of(network, removed)
        if not _any(removed):
            break
        reach_of_others = reach_of(network, {module: ~marks for module, marks in removed.items()})
        even = dict(removed)
        shared: Marks = {}
        uneven_inputs: Marks = {}
        for module, marks in reach.inputs.items():
            shared[module] = marks & (~constant[module] | reach_of_others.inputs[module])
            even_inputs, even[module] = _even(module, marks, removed[module])
            uneven_inputs[module] = marks & ~even_inputs & ~shared[module]
        unshared = _without_sources(network, even, shared)
        left = _without_sources(network, unshared, uneven_inputs)
        if _same(left, removed):
            if not (reach.unconfined or _any(shared) or _any(uneven_inputs)):
                break
            left = _without_unexplained(network, removed, shared)
        removed = left
    return removed, reach


def find_coupled(network: ProbedNetwork, outputs: Marks) -> Removable | None:
    """Channels, and all channels that they are added to or multiplied with.

    Removing them changes what the network computes.

    Returns:
        None if a layer would lose all channels, groups of a convolution would become uneven, or a
        norm or attention over channels is in between.
    """
    removed = outputs
    while True:
        reach = reach_of(network, removed)
        reach_of_others = reach_of(network, {module: ~removed[module] for module in removed})
        if reach.unconfined or any(bool(marks.all()) for marks in removed.values()):
            return None
        shared = {
            module: marks & reach_of_others.inputs[module] for module, marks in reach.inputs.items()
        }
        if not _any(shared):
            break
        not_sources = _not_sources(network, shared)
        more = {module: marks | ~not_sources[module] for module, marks in removed.items()}
        if _same(more, removed):
            return None
        removed = more
    for module, marks in reach.inputs.items():
        both = marks, removed[module]
        if not all(map(torch.equal, _even(module, *both), both)):
            return None
    return _removable(removed, reach, {})


def _removable(outputs: Marks, reach: Reach, values: dict[nn.Module, Tensor]) -> Removable:
    return merge([Removable(outputs, reach.inputs, reach.between, values)])


def _any(marks: Marks) -> bool:
    return any(bool(layer.any()) for layer in marks.values())


def _same(one: Marks, other: Marks) -> bool:
    return all(torch.equal(one[module], other[module]) for module in one)


def _not_sources(network: ProbedNetwork, inputs: Marks) -> Marks:
    """Outputs of dense layers that do not arrive at the marked inputs, even if no scale is zero."""
    others = {module: ~marks for module, marks in inputs.items()}
    with zeros_as_ones(network.model):
        return without_influence(network, others, logits=False)


def _without_sources(network: ProbedNetwork, outputs: Marks, inputs: Marks) -> Marks:
    """`outputs` without those that arrive at the marked inputs."""
    if not _any(inputs):
        return outputs
    not_sources = _not_sources(network, inputs)
    return {module: marks & not_sources[module] for module, marks in outputs.items()}


def _without_unexplained(network: ProbedNetwork, outputs: Marks, shared: Marks) -> Marks:
    """`outputs` without the layers that reach shared inputs, or all channels, by themselves.

    It is for networks where gradients do not show which outputs arrive there. If no layer does so
    by itself, nothing is left.
    """
    left = {}
    for module, marks in outputs.items():
        reach = reach_of(network, {module: marks}) if marks.any() else Reach()
        reaches = any(bool((inputs & shared[m]).any()) for m, inputs in reach.inputs.items())
        stays = reaches or reach.unconfined
        left[module] = torch.zeros_like(marks) if stays else marks
    if _same(left, outputs):
        return {module: torch.zeros_like(marks) for module, marks in outputs.items()}
    return left


def _even(module: nn.Module, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """The marked channels of a grouped convolution that leave its groups equally large.

    These are whole groups, inputs and outputs, and the same channels in each of the other groups.
    """
    groups = int(getattr(module, "groups", 1))
    if groups == 1:
        return inputs, outputs
    grouped_inputs, grouped_outputs = inputs.reshape(groups, -1), outputs.reshape(groups, -1)
    whole = (grouped_inputs.all(1) & grouped_outputs.all(1))[:, None]
    if whole.all():
        return torch.zeros_like(inputs), torch.zeros_like(outputs)
    even_inputs, even_outputs = (
        (marks & (whole | (marks | whole).all(0))).reshape(-1)
        for marks in (grouped_inputs, grouped_outputs)
    )
    return even_inputs, even_outputs


def split(network: ProbedNetwork, removable: Removable) -> list[Removable]:
    """Parts that have no channel in common, and can be removed one without another."""
    reaches = {m: reach_of(network, {m: marks}) for m, marks in removable.outputs.items()}
    part_of = {module: module for module in reaches}  # named by one of its layers

    def join(one: nn.Module, other: nn.Module) -> None:
        old, new = part_of[one], part_of[other]
        part_of.update({module: new for module in part_of if part_of[module] is old})

    first: dict[tuple[nn.Module, int], nn.Module] = {}
    for module, reach in reaches.items():
        arrivals = [*reach.inputs.items(), *((m, after) for m, (_, after) in reach.between.items())]
        for layer, marks in arrivals:
            for channel in marks.nonzero().flatten().tolist():
                join(first.setdefault((layer, channel), module), module)
            if marks.any() and layer in reaches and getattr(layer, "groups", 1) > 1:
                join(layer, module)  # whole groups lose inputs and outputs together
    return [
        merge(
            Removable(
                {m: removable.outputs[m]},
                reaches[m].inputs,
                reaches[m].between,
                removable.constants,
            )
            for m in reaches
            if part_of[m] is part
        )
        for part in dict.fromkeys(part_of.values())
    ]


def merge(parts: Iterable[Removable]) -> Removable:
    """The channels of all parts together."""
    whole, parts = Removable.none(), list(parts)
    for part in parts:
        for total, marks in ((whole.outputs, part.outputs), (whole.inputs, part.inputs)):
            for module, layer in marks.items():
                if layer.any():
                    total[module] = layer | total.get(module, layer)
        for module, (before, after) in part.between.items():
            old = whole.between.get(module, (before, after))
            whole.between[module] = before | old[0], after | old[1]
        whole.constants.update(part.constants)
    return replace(whole, narrowed=Narrowed.merge(part.narrowed for part in parts))
