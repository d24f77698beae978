"""Remove silent neurons from the tensors where that changes nothing.

`liveness` finds the channels that a network does not need. Here they are cut out of a copy, and the
logits are compared with those of the silenced model. If the copy does not run, or computes other
logits, independent parts of the channels are tried one by one. Where others are read together with
a silent channel, its layer no longer computes it, and a constant takes its place (`narrowing`).
Neurons that cannot be removed stay silenced, and the report gives the reason.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.copies import clone, frozen_copy
from ..core.drift import allowed_drift, logit_drift
from ..core.originals import refuse_originals
from ..core.outputs import give_logits_alone_, take_images_by_name_
from ..core.scores import Selection
from ..core.sites import Neuron
from ..errors import DataError
from ..utils.randomness import usual_passes
from .heads import NOT_SILENT, remove_heads
from .liveness import Removable, find_coupled, find_removable, merge, split
from .narrowing import Narrowed, narrow
from .probing import OutOfTime, ProbedNetwork, is_dense
from .recipe import Recipe, compose
from .recipes import recipe_of
from .report import RemovalReport, Size
from .search import working_parts

_TRIAL_IMAGES = 4  # on which each cut is tried; the result is compared on all images

COUPLED = "others are read together with it (a residual sum, a norm over channels, attention)"


@usual_passes()
def compact(
    model: nn.Module,
    selection: Selection,
    example: Tensor,
    *,
    seconds: float = 300.0,
    groups: bool = False,
    fill: bool = True,
    round_to: int = 1,
) -> tuple[nn.Module, RemovalReport]:
    """A smaller copy of a silenced model that computes the same logits.

    Args:
        model: its selected neurons are silent (`silence_`); it is not changed.
        selection: these neurons. Those that cannot be removed stay silent in the copy.
        example: images (N, C, H, W), N >= 2, to run and compare on; eight or more are better.
        seconds: time limit of the analysis, of heads and of other neurons each; what is not decided
            by then stays silent.
        groups: also remove neurons that are added to others, together with those others (the whole
            coupled group). This changes the logits; `RemovalReport.drift` says by how much.
        fill: also remove neurons that are read together with others, and put a constant in the
            place of each. It takes time when the model runs: without it fewer parameters go, but
            the model is faster.
        round_to: layers from which channels go keep a multiple of this, for hardware that wants
            that, so fewer go; `groups` apart.

    Raises:
        DataError: fewer than two images; `round_to` is not positive.
        UnsupportedModelError: the model is wrapped, cannot be copied, or its copy runs layers of
            the model itself.
    """
    start = time.monotonic()
    if example.ndim != 4 or len(example) < 2:
        raise DataError(f"expected two images (N, C, H, W) or more, got {tuple(example.shape)}")
    if round_to < 1:
        raise DataError(f"expected round_to to be 1 or more, got {round_to}")
    example = _detached(example)
    silenced = frozen_copy(model)
    take_images_by_name_(silenced)
    refuse_originals(model, silenced, example)
    give_logits_alone_(silenced, example)
    selected_heads, others = _heads_apart(selection)
    heads, reasons = _without_heads(silenced, selected_heads, example, seconds)
    probed = heads.apply_(copy.deepcopy(silenced))
    probed = probed.float()  # noise of large scale would overflow half precision
    names = {module: name for name, module in probed.named_modules()}
    comparison = _Comparison(silenced, names, example, heads)
    removable = Removable.none()
    if len(others):
        removable, why = _removable(
            comparison, probed, others, seconds, groups=groups, fill=fill, round_to=round_to
        )
        reasons |= why
    recipe = recipe_of(names, removable)
    drift = comparison.drift(recipe)
    recipe = compose(heads, recipe)
    smaller = recipe.apply_(clone(model))
    before, after = (Size.of(frozen_copy(each), example) for each in (model, smaller))
    return smaller, RemovalReport(
        removed=tuple(neuron for neuron in selection.neurons if neuron not in reasons),
        filled=tuple(n for n in selection.neurons if n in removable.narrowed.neurons),
        silenced=reasons,
        channels=_outputs(model) - _outputs(smaller),
        recipe=recipe,
        drift=drift,
        before=before,
        after=after,
        seconds=time.monotonic() - start,
    )


def _outputs(model: nn.Module) -> int:
    """Number of output channels of all dense layers together."""
    widths = ("out_channels", "out_features")
    layers = (module for module in model.modules() if is_dense(module))
    return sum(getattr(layer, name, 0) for layer in layers for name in widths)


def _heads_apart(selection: Selection) -> tuple[Selection, Selection]:
    """The selected attention heads, and the other neurons."""
    with_heads = {site.name for site in selection.sites if site.kind == "heads"}
    heads = tuple(neuron for neuron in selection.neurons if neuron.site in with_heads)
    others = tuple(neuron for neuron in selection.neurons if neuron.site not in with_heads)
    return Selection(selection.sites, heads), Selection(selection.sites, others)


def _without_heads(
    silenced: nn.Module, heads: Selection, example: Tensor, seconds: float
) -> tuple[Recipe, dict[Neuron, str]]:
    """The recipe that removes attention heads, and the reasons why some of them stay."""
    if not len(heads):
        return Recipe(), {}
    comparison = _Comparison(silenced, {}, example)
    try:
        some = comparison.smaller()
        recipe, reasons = remove_heads(silenced, heads, example, some.problem_of, seconds)
        problem = comparison.problem_of(recipe)
    except Exception as error:  # a network may raise anything
        problem = f"the network cannot be analysed ({_first_line(error)})"
    return (Recipe(), dict.fromkeys(heads.neurons, problem)) if problem else (recipe, reasons)


def _removable(
    comparison: _Comparison,
    probed: nn.Module,
    selection: Selection,
    seconds: float,
    *,
    groups: bool,
    **how: Any,
) -> tuple[Removable, dict[Neuron, str]]:
    """What `_decide` says, if the whole cut holds; else nothing, and why."""
    try:
        network = ProbedNetwork(probed, comparison.example[:2].float(), seconds)
        some = comparison.smaller()
        removable, reasons = _decide(some, network, selection, groups=groups, **how)
        problem = comparison.problem(removable, any_drift=groups)
    except OutOfTime as error:
        problem = str(error)
    except Exception as error:  # a network may raise anything on noise or NaN
        problem = f"the network cannot be analysed ({_first_line(error)})"
    if problem:
        return Removable.none(), dict.fromkeys(selection.neurons, problem)
    return removable, reasons


def _decide(
    comparison: _Comparison,
    network: ProbedNetwork,
    selection: Selection,
    *,
    groups: bool,
    fill: bool,
    round_to: int,
) -> tuple[Removable, dict[Neuron, str]]:
    """The channels to remove, and the reasons why other selected neurons stay."""
    try:
        candidates = find_removable(network, round_to)
    except Exception:  # OutOfTime, or whatever a network raises on noise or NaN
        candidates = Removable.none()
    removable = _working_part(comparison, network, candidates)
    if groups:
        removable = _with_groups(comparison, network, selection, removable)
    silent, left = _left(network.model, selection, removable)
    reasons = dict.fromkeys(left - silent, NOT_SILENT)
    if not fill:
        return removable, reasons | dict.fromkeys(silent, COUPLED)
    reference = comparison.after(removable) if groups else comparison

    def problem(narrowed: Narrowed) -> str:
        return reference.problem(replace(removable, narrowed=narrowed))

    network.use_reserve()
    narrowed, stuck = narrow(
        network, selection, silent, removable.gone(), problem, round_to=round_to
    )
    return replace(removable, narrowed=narrowed), reasons | stuck


@dataclass
class _Comparison:
    """Compares a silenced model with copies from which channels are cut.

    Attributes:
        model: The silenced model, in eval mode.
        names: Names of the layers in a `Removable`, which are those of another copy.
        example: Images (N, C, H, W).
        before: Is applied to each copy first.
    """

    model: nn.Module
    names: dict[nn.Module, str]
    example: Tensor
    before: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        with torch.no_grad():
            self._expected = self.model(self.example)
        self._latest = Recipe(), self._measure(Recipe()) if self.before else 0.0

    def smaller(self) -> _Comparison:
        """The same on few images."""
        if len(self.example) <= _TRIAL_IMAGES:
            return self
        return _Comparison(self.model, self.names, self.example[:_TRIAL_IMAGES], self.before)

    def after(self, removable: Removable) -> _Comparison:
        """Compares with the model without these channels, whatever they changed."""
        recipe, other = recipe_of(self.names, removable), copy.copy(self)
        with torch.no_grad():
            smaller = compose(self.before, recipe).apply_(copy.deepcopy(self.model))
            other._expected = smaller(self.example)
        other._latest = recipe, 0.0
        return other

    def drift(self, recipe: Recipe) -> float:
        """How far the logits are apart after a cut."""
        if recipe != self._latest[0]:
            self._latest = recipe, self._measure(recipe)
        return self._latest[1]

    def _measure(self, recipe: Recipe) -> float:
        smaller = compose(self.before, recipe).apply_(copy.deepcopy(self.model))
        with torch.no_grad():
            logits = smaller(self.example)
        if logits.shape != self._expected.shape:
            raise ValueError(f"logits of shape {tuple(logits.shape)}")
        return logit_drift(self._expected, logits)

    def problem(self, removable: Removable, *, any_drift: bool = False) -> str:
        """Why these channels cannot be removed; empty if they can."""
        if not removable.outputs and not removable.narrowed.neurons:
            return ""
        return self.problem_of(recipe_of(self.names, removable), any_drift=any_drift)

    def problem_of(self, recipe: Recipe, *, any_drift: bool = False) -> str:
        """Why this recipe cannot be applied; empty if it can."""
        try:
            drift = self.drift(recipe)
        except Exception as error:  # a network may raise anything on shapes it does not expect
            return f"the network does not run without it ({_first_line(error)})"
        if not drift <= (float("inf") if any_drift else allowed_drift(self.example.dtype)):
            return f"without it the logits change by {drift:.1e}"
        return ""


def _working_part(
    comparison: _Comparison, network: ProbedNetwork, candidates: Removable
) -> Removable:
    """As many of the channels as can be removed."""
    if not comparison.problem(candidates):
        return candidates
    parts = split(network, candidates)
    working, _ = working_parts(
        parts, lambda some: comparison.problem(merge(some)), network.check_time
    )
    return merge(working)


def _with_groups(
    comparison: _Comparison, network: ProbedNetwork, selection: Selection, removable: Removable
) -> Removable:
    """`removable` and the coupled groups of the other selected neurons, layer by layer."""
    for site, channels in selection.by_site().items():
        producer = next(s.producer for s in selection.sites if s.name == site)
        module = network.model.get_submodule(producer)
        if module not in network.dense:
            continue
        outputs = {m: removable.outputs.get(m, network.unmarked(m)) for m in network.dense}
        left = torch.zeros_like(outputs[module])
        left[channels] = True
        left &= ~outputs[module]
        if not left.any():
            continue
        try:
            group = find_coupled(network, {**outputs, module: outputs[module] | left})
        except OutOfTime:
            break
        if group is not None:
            larger = merge([removable, group])
            if not comparison.problem(larger, any_drift=True):
                removable = larger
    return removable


def _left(
    model: nn.Module, selection: Selection, removed: Removable
) -> tuple[set[Neuron], set[Neuron]]:
    """Selected neurons that were not removed: the silent ones, and all."""
    gone, left = removed.gone(), set()
    producers = {site.name: model.get_submodule(site.producer) for site in selection.sites}
    for neuron in selection.neurons:
        marks = gone.get(producers[neuron.site])
        if marks is None or not marks[neuron.channel]:
            left.add(neuron)
    weights = {name: model.get_submodule(name).weight for name in selection.by_site()}
    return {n for n in left if not weights[n.site][n.channel].any()}, left  # type: ignore[index]


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:100] if text else ''}"


def _detached(example: Tensor) -> Tensor:
    """The images without gradient, as if made outside of inference mode."""
    with torch.inference_mode(False):
        return example.detach().clone() if example.is_inference() else example.detach()
