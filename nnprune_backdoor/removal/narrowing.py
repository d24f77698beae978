"""Silent channels that others are read together with: their layers need not compute them.

What `liveness` cannot take out of the network, since a residual sum or a norm needs its place, is
still constant. So the rows of its layer go, and the constant is put in its place (`filling`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..core.scores import Selection
from ..core.sites import Neuron, Site
from ..core.trace import channel_axis
from ..utils.hooks import hooked
from .filling import reads_one_each
from .probing import Marks, ProbedNetwork, is_dense
from .search import working_parts

UNEVEN = "a convolution in groups would lose more channels in one group than in another"

LAST = "it is the last channel of its layer"

ROUNDED = "its layer keeps a multiple of round_to channels"

MIXED = "a norm over several channels needs it (GroupNorm)"

COMPUTED = "its layer does not give a constant there"

_CONSTANT = 1e-6  # relative range up to which an output counts as constant


@dataclass(frozen=True, eq=False)
class Narrowed:
    """Channels that their layers no longer compute, while others still read them.

    Attributes:
        outputs: Of the layers that compute them, and of the norms behind.
        values: Constants (channels,) in the place of all outputs; of the last of these layers.
        unread: Depthwise convolutions that do not read what arrives in these places.
        neurons: Whose channels they are.
    """

    outputs: Marks = field(default_factory=dict)
    values: dict[nn.Module, Tensor] = field(default_factory=dict)
    unread: frozenset[nn.Module] = frozenset()
    neurons: frozenset[Neuron] = frozenset()

    def before_norm(self) -> Narrowed | None:
        """The same with zeros before the norm, whose silent channels do not read them.

        It is for modules that give a norm's output the shape of its input. None without a norm.
        """
        if len(self.outputs) == 1:
            return None
        producer, marks = next(iter(self.outputs.items()))
        zeros = {producer: torch.zeros_like(marks, dtype=torch.float)}
        return replace(self, outputs={producer: marks}, values=zeros)

    @classmethod
    def merge(cls, parts: Iterable[Narrowed]) -> Narrowed:
        """All parts together; no two have a layer in common."""
        outputs: Marks = {}
        values: dict[nn.Module, Tensor] = {}
        unread: frozenset[nn.Module] = frozenset()
        neurons: frozenset[Neuron] = frozenset()
        for part in parts:
            outputs |= part.outputs
            values |= part.values
            unread |= part.unread
            neurons |= part.neurons
        return cls(outputs, values, unread, neurons)


def surplus(marks: Tensor, round_to: int) -> Tensor:
    """Those of the marked channels, from the last on, that stay so that a multiple stays."""
    count = -int((~marks).sum()) % round_to
    return marks & (marks.flip(0).cumsum(0).flip(0) <= count)


def narrow(
    network: ProbedNetwork,
    selection: Selection,
    silent: set[Neuron],
    gone: Marks,
    problem: Callable[[Narrowed], str],
    *,
    round_to: int = 1,
) -> tuple[Narrowed, dict[Neuron, str]]:
    """Silent neurons that constants can stand for, and why others cannot go.

    Args:
        network: the silenced model.
        selection: has the sites of the neurons.
        silent: neurons that could not be taken out of the network.
        gone: outputs of layers that are taken out.
        problem: why constants cannot stand for some channels; empty if they can.
        round_to: layers go on computing so many channels that this is a multiple of it.
    """
    parts, reasons = _parts(network, selection, silent, gone, round_to)
    working: list[Narrowed] = []

    def problem_with(more: list[Narrowed]) -> str:
        return problem(Narrowed.merge([*working, *more]))

    while parts:
        more, failures = working_parts(parts, problem_with, network.check_time)
        working += more
        reasons |= {n: why for why, some in failures.items() for p in some for n in p.neurons}
        parts = [other for some in failures.values() for p in some if (other := p.before_norm())]
    narrowed = Narrowed.merge(working)
    return narrowed, {n: why for n, why in reasons.items() if n not in narrowed.neurons}


def _parts(
    network: ProbedNetwork,
    selection: Selection,
    silent: set[Neuron],
    gone: Marks,
    round_to: int,
) -> tuple[list[Narrowed], dict[Neuron, str]]:
    """The channels of these neurons, site by site, and why others must stay."""
    model = network.model
    values = _constants(model, network.example, [site.name for site in selection.sites])
    parts: list[Narrowed] = []
    reasons: dict[Neuron, str] = {}
    for site in selection.sites:
        channels = [n.channel for n in selection.neurons if n.site == site.name and n in silent]
        if not channels:
            continue
        mine = torch.zeros(site.channels, dtype=torch.bool, device=network.example.device)
        mine[channels] = True
        producer = model.get_submodule(site.producer)
        others = gone.get(producer, torch.zeros_like(mine))
        marks, why = _marks(model, site, mine, others, values[site.name])
        spared = surplus(marks | others, round_to) & marks
        if spared.any() and _is_grouped(producer):
            spared = marks  # or its groups would be uneven
        reasons |= dict.fromkeys(_neurons(site, mine & ~marks), why)
        reasons |= dict.fromkeys(_neurons(site, spared), ROUNDED)
        if (marks & ~spared).any():
            parts.append(_narrowed(model, site, marks & ~spared, values[site.name]))
    return parts, reasons


def _neurons(site: Site, marks: Tensor) -> list[Neuron]:
    return [Neuron(site.name, channel) for channel in marks.nonzero().flatten().tolist()]


def _marks(
    model: nn.Module, site: Site, mine: Tensor, gone: Tensor, values: Tensor | None
) -> tuple[Tensor, str]:
    """Those of the channels that the site's layers need not compute, and why not the others."""
    producer, last = model.get_submodule(site.producer), model.get_submodule(site.name)
    none = torch.zeros_like(mine)
    if last is not producer and not isinstance(last, nn.modules.batchnorm._NormBase):
        return none, MIXED
    if not _is_producer(producer):
        return none, UNEVEN  # several outputs of each input
    if values is None:
        return none, COMPUTED
    marks = mine & values.isfinite()
    if not marks.any():
        return none, COMPUTED
    if _is_grouped(producer):
        return _as_many_in_each(marks, gone, int(producer.groups)), UNEVEN  # type: ignore[arg-type]
    if bool((marks | gone).all()):
        marks[int(marks.nonzero()[0])] = False
    return marks, LAST


def _is_producer(module: nn.Module) -> bool:
    return is_dense(module) or reads_one_each(module)


def _is_grouped(module: nn.Module) -> bool:
    return is_dense(module) and int(getattr(module, "groups", 1)) > 1


def _as_many_in_each(marks: Tensor, gone: Tensor, groups: int) -> Tensor:
    """As many of the marked channels in every group of a convolution that stays; not all."""
    chosen, stay = marks.reshape(groups, -1).clone(), ~gone.reshape(groups, -1)
    rows = stay.any(1)
    count = min(int(chosen[rows].sum(1).min()), int(stay[rows].sum(1).min()) - 1)
    return (chosen & (chosen.cumsum(1) <= count) & rows[:, None]).reshape(-1)


def _narrowed(model: nn.Module, site: Site, marks: Tensor, values: Tensor | None) -> Narrowed:
    producer, last = model.get_submodule(site.producer), model.get_submodule(site.name)
    assert values is not None
    return Narrowed(
        outputs={producer: marks, last: marks},
        values={last: values},
        unread=frozenset([] if is_dense(producer) else [producer]),
        neurons=frozenset(_neurons(site, marks)),
    )


def _constants(model: nn.Module, example: Tensor, names: list[str]) -> dict[str, Tensor | None]:
    """What each channel of a layer gives (channels,), NaN where that is not constant.

    None where a layer does not run, or gives something else.
    """
    modules = {model.get_submodule(name): name for name in names}
    low: dict[nn.Module, Tensor] = {}
    high: dict[nn.Module, Tensor] = {}

    def observe(module: nn.Module, _: object, output: object) -> None:
        if not isinstance(output, Tensor):
            return
        norm = isinstance(module, nn.modules.batchnorm._NormBase)
        axis = 1 if norm else channel_axis(module, output.ndim)
        flat = output.movedim(axis, 0).flatten(1)
        least, most = flat.amin(1), flat.amax(1)
        low[module] = torch.minimum(least, low.get(module, least))
        high[module] = torch.maximum(most, high.get(module, most))

    seen = [m for m in modules if _is_producer(m) or isinstance(m, nn.modules.batchnorm._NormBase)]
    with hooked(seen, observe), torch.no_grad():
        model(example)
    values: dict[str, Tensor | None] = dict.fromkeys(names)
    for module, least in low.items():
        size = torch.maximum(least.abs(), high[module].abs())
        same = high[module] - least <= _CONSTANT * size
        values[modules[module]] = torch.where(same, least, torch.nan)
    return values
