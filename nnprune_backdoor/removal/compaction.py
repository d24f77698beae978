"""Remove silent neurons from the tensors where that changes nothing.

`liveness` finds the channels that a network does not need. Here they are cut out of a copy, and the
logits are compared with those of the silenced model. If the copy does not run, or computes other
logits, independent parts of the channels are tried one by one. Neurons that cannot be removed stay
silenced, and the report gives the reason.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..core.copies import clone, frozen_copy
from ..core.drift import allowed_drift, logit_drift
from ..core.originals import refuse_originals
from ..core.outputs import give_logits_alone_, take_images_by_name_
from ..core.scores import Selection
from ..core.sites import Neuron
from ..errors import DataError
from ..utils.randomness import usual_passes
from ..utils.short_repr import ShortRepr
from .heads import NOT_SILENT, remove_heads
from .liveness import Removable, find_coupled, find_removable, merge, split
from .probing import OutOfTime, ProbedNetwork, is_dense
from .recipe import Recipe
from .recipes import compose, recipe_of

_TRIAL_IMAGES = 4  # on which each cut is tried; the result is compared on all images

_TIMINGS = 5  # of a batch

_MAX_TIMING = 1.0  # seconds after which a batch is not timed again

COUPLED = "read together with channels that stay (a residual sum, a norm over channels, attention)"


@dataclass(frozen=True)
class Size:
    """Size and speed of a model.

    Attributes:
        parameters: Number of parameters.
        macs: Multiply-accumulate operations for one image.
        latency: Seconds for one batch, the median of several runs.
    """

    parameters: int
    macs: int
    latency: float

    @classmethod
    def of(cls, model: nn.Module, example: Tensor) -> Size:
        """Measure a model in eval mode on a batch of images (N, C, H, W); slow ones fewer times."""
        with usual_passes(), torch.no_grad():
            with FlopCounterMode(display=False) as flops:
                model(example[:1])
            seconds: list[float] = []
            while len(seconds) < _TIMINGS and sum(seconds) < _MAX_TIMING:
                _wait(example)
                start = time.perf_counter()
                model(example)
                _wait(example)
                seconds.append(time.perf_counter() - start)
        count = sum(parameter.numel() for parameter in model.parameters())
        return cls(count, flops.get_total_flops() // 2, statistics.median(seconds))


@dataclass(frozen=True, eq=False, repr=False)
class RemovalReport(ShortRepr):
    """What was removed, what only stays silenced and why, and what was gained.

    Attributes:
        removed: Neurons that were removed.
        silenced: Neurons that only stay silenced -> reason.
        channels: Number of output channels that were removed, including those that only removed
            neurons need.
        recipe: What was cut from each tensor.
        drift: Largest difference of logits to the silenced model (`core.drift.logit_drift`).
        before: Size of the silenced model.
        after: Size of the smaller model.
        seconds: Wall time.
    """

    removed: tuple[Neuron, ...]
    silenced: dict[Neuron, str]
    channels: int
    recipe: Recipe
    drift: float
    before: Size
    after: Size
    seconds: float

    def __str__(self) -> str:
        """Neurons, sizes and reasons, a line each."""
        old, new = self.before, self.after
        selected = len(self.removed) + len(self.silenced)
        lines = [
            f"{len(self.removed)} of {selected} neurons removed (drift {self.drift:.1e}), "
            f"{len(self.silenced)} only silenced",
            f"parameters {old.parameters:,} -> {new.parameters:,} "
            f"({new.parameters / old.parameters - 1:+.1%}), "
            f"MACs {old.macs:,} -> {new.macs:,} ({new.macs / old.macs - 1:+.1%})",
        ]
        reasons = list(self.silenced.values())
        lines += [
            f"{reasons.count(reason)} silenced: {reason}" for reason in dict.fromkeys(reasons)
        ]
        return "\n".join(lines)


@usual_passes()
def compact(
    model: nn.Module,
    selection: Selection,
    example: Tensor,
    *,
    seconds: float = 300.0,
    groups: bool = False,
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

    Raises:
        DataError: fewer than two images.
        UnsupportedModelError: the model is wrapped, cannot be copied, or its copy runs layers of
            the model itself.
    """
    start = time.monotonic()
    if example.ndim != 4 or len(example) < 2:
        raise DataError(f"expected two images (N, C, H, W) or more, got {tuple(example.shape)}")
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
        try:
            network = ProbedNetwork(probed, example[:2].float(), seconds)
            removable, why = _decide(comparison.smaller(), network, others, groups)
            problem = comparison.problem(removable, any_drift=groups)
        except OutOfTime as error:
            problem = str(error)
        except Exception as error:  # a network may raise anything on noise or NaN
            problem = f"the network cannot be analysed ({_first_line(error)})"
        if problem:
            removable, why = Removable.none(), dict.fromkeys(others.neurons, problem)
        reasons |= why
    recipe = recipe_of(names, removable)
    drift = comparison.drift(recipe)
    recipe = compose(heads, recipe)
    smaller = recipe.apply_(clone(model))
    before, after = (Size.of(frozen_copy(each), example) for each in (model, smaller))
    return smaller, RemovalReport(
        removed=tuple(neuron for neuron in selection.neurons if neuron not in reasons),
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


def _decide(
    comparison: _Comparison, network: ProbedNetwork, selection: Selection, groups: bool
) -> tuple[Removable, dict[Neuron, str]]:
    """The channels to remove, and the reasons why other selected neurons stay."""
    candidates, must_stay = find_removable(network)
    removable, failures = _working_part(comparison, network, candidates)
    if groups:
        removable = _with_groups(comparison, network, selection, removable)
    stay = {reason: Removable(marks, {}, {}, {}) for reason, marks in must_stay.items()}
    return removable, _reasons(network.model, selection, removable, {**failures, **stay})


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
        if not removable.outputs:
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
) -> tuple[Removable, dict[str, Removable]]:
    """As many of the channels as can be removed, and reason -> channels that cannot."""
    if not comparison.problem(candidates):
        return candidates, {}
    working = Removable.none()
    failures: dict[str, Removable] = {}
    pending = [split(network, candidates)]
    while pending:
        parts = pending.pop()
        try:
            network.check_time()
        except OutOfTime as error:  # the parts that work can be removed all the same
            failures[str(error)] = merge(itertools.chain(parts, *pending))
            break
        larger = merge([working, *parts])
        problem = comparison.problem(larger)
        if not problem:
            working = larger
        elif len(parts) == 1:
            failures[problem] = merge([failures.get(problem, parts[0]), *parts])
        else:
            half = len(parts) // 2
            pending += [parts[half:], parts[:half]]
    return working, failures


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


def _reasons(
    model: nn.Module, selection: Selection, removed: Removable, causes: dict[str, Removable]
) -> dict[Neuron, str]:
    """Reasons why selected neurons were not removed; `causes` has the known ones."""

    def has(channels: Removable, module: nn.Module, channel: int) -> bool:
        _, after = channels.between.get(module, (None, None))
        marks = channels.outputs.get(module) if is_dense(module) else after
        return marks is not None and bool(marks[channel])

    def silent(neuron: Neuron) -> bool:
        weight = model.get_submodule(neuron.site).weight
        assert isinstance(weight, Tensor)
        return not weight[neuron.channel].any()

    reasons = {}
    producers = {site.name: model.get_submodule(site.producer) for site in selection.sites}
    for neuron in selection.neurons:
        output = producers[neuron.site], neuron.channel
        if not has(removed, *output):
            known = [reason for reason, channels in causes.items() if has(channels, *output)]
            reasons[neuron] = (known[0] if known else COUPLED) if silent(neuron) else NOT_SILENT
    return reasons


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:100] if text else ''}"


def _detached(example: Tensor) -> Tensor:
    """The images without gradient, as if made outside of inference mode."""
    with torch.inference_mode(False):
        return example.detach().clone() if example.is_inference() else example.detach()


def _wait(example: Tensor) -> None:
    """Wait until the device has finished."""
    if example.is_cuda:
        torch.cuda.synchronize(example.device)
