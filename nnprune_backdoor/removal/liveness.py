"""Which channels a network would not miss, found by running it, on any architecture.

Its dense layers are cut loose from each other (`passes`), so that what lies between them is seen:

1. emit noise, but the bias alone where a weight row is zero: an input channel that stays constant
   is fed by silent channels only, whatever the other layers say (`constants`);
2. emit noise and differentiate all that is read, those constants aside: an output channel without
   a gradient is heard by nobody, whatever it says (`unheard`);
3. emit NaN on those channels: every place that they pass through becomes NaN, and has to go too
   (`taint`).

Silent neurons, and what serves nobody but them (the gate of a silent channel, the convolution
before a silent depthwise one), are found alike; channels that are added to others, normalised or
mixed with them stay, since something else is read through them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .probing import Marks, Network, Taint, constants, revived, taint, unheard


@dataclass(frozen=True, eq=False)
class Lane:
    """Channels that can go at once, and every place that they pass through."""

    outputs: Marks  # of dense layers
    inputs: Marks  # of dense layers
    along: dict[nn.Module, tuple[Tensor, Tensor]]  # of layers in between: inputs, outputs
    constants: dict[nn.Module, Tensor]  # values (channels,) of `inputs`; 0 where nothing arrives


UNEVEN = "a convolution in groups would lose more channels in one group than in another"

LAST = "it is the last channel of its layer"


def unneeded(network: Network) -> tuple[Lane, dict[str, Marks]]:
    """All channels that can go without changing what the network computes.

    Returns:
        These, and by reason the outputs of dense layers that nobody would miss either, but that
        have to stay.
    """
    still, values = constants(network)
    gone = unheard(network, still)
    last = {module: marks.all() & (marks.cumsum(0) == 1) for module, marks in gone.items()}
    gone = {module: marks & ~last[module] for module, marks in gone.items()}
    uneven = {module: torch.zeros_like(marks) for module, marks in gone.items()}
    while True:
        here = taint(network, gone)
        if not _any(gone):
            break
        stays = taint(network, {module: ~marks for module, marks in gone.items()})
        even = dict(gone)
        shared: Marks = {}
        ragged: Marks = {}
        for module, marks in here.inputs.items():
            shared[module] = marks & (~still[module] | stays.inputs[module])
            fitting, even[module] = _even(module, marks, gone[module])
            ragged[module] = marks & ~fitting & ~shared[module]
        less = _without_sources(network, even, shared)
        level = _without_sources(network, less, ragged)
        for module, marks in gone.items():
            uneven[module] |= (marks & ~even[module]) | (less[module] & ~level[module])
        if _same(level, gone):
            if not (here.astray or _any(shared) or _any(ragged)):
                break
            level = _without_culprits(network, gone, shared)
        gone = level
    return _lane(gone, here, values), {UNEVEN: uneven, LAST: last}


def coupled(network: Network, wanted: Marks) -> Lane | None:
    """Channels with all that they are added to or multiplied with, which changes the function.

    None where that would empty a layer, leave groups of a convolution uneven, or where a norm or
    attention over channels stands in between.
    """
    gone = wanted
    while True:
        here = taint(network, gone)
        stays = taint(network, {module: ~gone[module] for module in gone})
        if here.astray or any(bool(marks.all()) for marks in gone.values()):
            return None
        shared = {module: marks & stays.inputs[module] for module, marks in here.inputs.items()}
        if not _any(shared):
            break
        with revived(network.model):
            others = unheard(network, {m: ~marks for m, marks in shared.items()}, logits=False)
        more = {module: marks | ~others[module] for module, marks in gone.items()}
        if _same(more, gone):
            return None
        gone = more
    for module, marks in here.inputs.items():
        if not all(map(torch.equal, _even(module, marks, gone[module]), (marks, gone[module]))):
            return None
    return _lane(gone, here, {})


def _lane(gone: Marks, here: Taint, values: dict[nn.Module, Tensor]) -> Lane:
    return merge([Lane(gone, here.inputs, here.along, values)])


def _any(marks: Marks) -> bool:
    return any(bool(some.any()) for some in marks.values())


def _same(one: Marks, other: Marks) -> bool:
    return all(torch.equal(one[module], other[module]) for module in one)


def _without_sources(network: Network, gone: Marks, places: Marks) -> Marks:
    """`gone` without the channels that arrive at some inputs of dense layers."""
    if not _any(places):
        return gone
    with revived(network.model):
        others = unheard(network, {m: ~marks for m, marks in places.items()}, logits=False)
    return {module: marks & others[module] for module, marks in gone.items()}


def _without_culprits(network: Network, gone: Marks, shared: Marks) -> Marks:
    """`gone` without the layers that by themselves do what no gradient explains."""
    kept = {}
    for module, marks in gone.items():
        alone = taint(network, {module: marks}) if marks.any() else Taint()
        harm = any(bool((found & shared[m]).any()) for m, found in alone.inputs.items())
        kept[module] = torch.zeros_like(marks) if harm or alone.astray else marks
    return kept if not _same(kept, gone) else {m: torch.zeros_like(x) for m, x in gone.items()}


def _even(module: nn.Module, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Of the marked channels of a convolution in groups, those whose going leaves groups alike.

    These are whole groups, inputs and outputs, and of the other groups the same places in each.
    """
    groups = int(getattr(module, "groups", 1))
    if groups == 1:
        return inputs, outputs
    before, after = inputs.reshape(groups, -1), outputs.reshape(groups, -1)
    whole = (before.all(1) & after.all(1))[:, None]
    if whole.all():
        return torch.zeros_like(inputs), torch.zeros_like(outputs)
    sides = (marks & (whole | (marks | whole).all(0)) for marks in (before, after))
    one, other = (marks.reshape(-1) for marks in sides)
    return one, other


def split(network: Network, lane: Lane) -> list[Lane]:
    """The parts of a lane that have no place in common, each of which can go by itself."""
    alone = {module: taint(network, {module: marks}) for module, marks in lane.outputs.items()}
    head = {module: module for module in alone}  # of the set that each layer belongs to

    def join(one: nn.Module, other: nn.Module) -> None:
        old, new = head[one], head[other]
        head.update({module: new for module in head if head[module] is old})

    first: dict[tuple[nn.Module, int], nn.Module] = {}
    for module, found in alone.items():
        arrivals = [*found.inputs.items(), *((m, after) for m, (_, after) in found.along.items())]
        for place, marks in arrivals:
            for channel in marks.nonzero().flatten().tolist():
                join(first.setdefault((place, channel), module), module)
            if marks.any() and place in alone and getattr(place, "groups", 1) > 1:
                join(place, module)  # whole groups lose inputs and outputs at once
    return [
        merge(
            Lane({m: lane.outputs[m]}, alone[m].inputs, alone[m].along, lane.constants)
            for m in alone
            if head[m] is leader
        )
        for leader in dict.fromkeys(head.values())
    ]


def merge(lanes: Iterable[Lane]) -> Lane:
    """Lanes as one."""
    whole = Lane({}, {}, {}, {})
    for lane in lanes:
        for into, marks in ((whole.outputs, lane.outputs), (whole.inputs, lane.inputs)):
            for module, some in marks.items():
                if some.any():
                    into[module] = some | into.get(module, some)
        for module, (before, after) in lane.along.items():
            old = whole.along.get(module, (before, after))
            whole.along[module] = before | old[0], after | old[1]
        whole.constants.update(lane.constants)
    return whole
