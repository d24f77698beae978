"""Take silent neurons out of the tensors where that changes nothing.

Which channels the network would not miss is found by `liveness`, on any architecture; here they
are cut out of a copy, and the smaller model is held against the silenced one. If it does not run,
or does not compute the same, the parts that can be told apart are tried one by one. What cannot go
stays silenced, and the report says why.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..core.copies import clone, frozen_copy
from ..core.scores import Selection
from ..core.sites import Neuron
from ..errors import DataError
from ..utils.randomness import usual_passes
from .liveness import Lane, coupled, merge, split, unneeded
from .probing import Network, OutOfTime, is_dense
from .recipe import Recipe
from .recipes import recipe_of

TOLERANCE = 1e-4  # largest difference of logits, relative to their scale, that counts as equal


_TRIAL = 4  # images on which each cut is tried; the result is held against all

_PATIENCE = 1.0  # seconds after which a latency is not measured again


_LOOSE = 1e-2  # what half precision's rounding makes of equal logits, at most


STAYS = "read together with channels that stay (a residual sum, a norm over channels, attention)"

AWAKE = "it is not silent in the model; run silence_ on it before"


def allowed_drift(dtype: torch.dtype, tolerance: float = TOLERANCE) -> float:
    """`tolerance`, or for logits in half precision a hundredth at least."""
    return max(tolerance, _LOOSE) if dtype in (torch.float16, torch.bfloat16) else tolerance


@dataclass(frozen=True)
class Size:
    """How large a model is, and how fast on one batch."""

    parameters: int
    macs: int  # multiply-accumulates of one image
    latency: float  # seconds of one batch, median

    @classmethod
    def of(cls, model: nn.Module, example: Tensor, repeats: int = 5) -> Size:
        """Measure a model in eval mode on images (N, C, H, W); a slow one fewer times."""
        with usual_passes(), torch.no_grad():
            with FlopCounterMode(display=False) as flops:
                model(example[:1])
            seconds: list[float] = []
            while len(seconds) < repeats and sum(seconds) < _PATIENCE:
                _wait(example)
                start = time.perf_counter()
                model(example)
                _wait(example)
                seconds.append(time.perf_counter() - start)
        count = sum(parameter.numel() for parameter in model.parameters())
        return cls(count, flops.get_total_flops() // 2, statistics.median(seconds))


@dataclass(frozen=True, eq=False)
class RemovalPlan:
    """What can be taken out, what can only stay silenced, and why."""

    removed: tuple[Neuron, ...]
    silenced: dict[Neuron, str]  # reason
    channels: int  # output channels that go, those which serve removed neurons only included
    recipe: Recipe
    drift: float  # largest difference to the silenced model's logits, relative to their scale


@dataclass(frozen=True, eq=False)
class RemovalReport(RemovalPlan):
    """What was taken out, what only stays silenced, why, and what was gained."""

    before: Size
    after: Size
    seconds: float

    def __str__(self) -> str:
        """A few lines for people."""
        old, new = self.before, self.after
        asked = len(self.removed) + len(self.silenced)
        lines = [
            f"{len(self.removed)} of {asked} neurons removed (drift {self.drift:.1e}), "
            f"{len(self.silenced)} only silenced",
            f"parameters {old.parameters:,} -> {new.parameters:,} "
            f"({new.parameters / old.parameters - 1:+.1%}), "
            f"MACs {old.macs:,} -> {new.macs:,} ({new.macs / old.macs - 1:+.1%})",
        ]
        reasons = list(self.silenced.values())
        lines += [f"{reasons.count(why)} silenced: {why}" for why in dict.fromkeys(reasons)]
        return "\n".join(lines)


@usual_passes()
def compact(
    model: nn.Module,
    selection: Selection,
    example: Tensor,
    *,
    tolerance: float = TOLERANCE,
    seconds: float = 300.0,
    groups: bool = False,
) -> tuple[nn.Module, RemovalReport]:
    """A smaller copy of a silenced model that computes the same.

    Args and errors: as of `plan_removal`, which decides; neurons that cannot be removed are silent
    in the copy.
    """
    start = time.monotonic()
    example = _plain(example)
    plan = plan_removal(
        model,
        selection,
        example,
        tolerance=tolerance,
        seconds=seconds,
        groups=groups,
    )
    smaller = plan.recipe.apply_(clone(model))
    before, after = (Size.of(frozen_copy(some), example) for some in (model, smaller))
    taken = time.monotonic() - start
    return smaller, RemovalReport(**vars(plan), before=before, after=after, seconds=taken)


@usual_passes()
def plan_removal(
    model: nn.Module,
    selection: Selection,
    example: Tensor,
    *,
    tolerance: float = TOLERANCE,
    seconds: float = 300.0,
    groups: bool = False,
) -> RemovalPlan:
    """What `compact` would do, tried on copies.

    Args:
        model: its selected neurons are silent (`silence_`); left as it is.
        selection: these neurons.
        example: images (N, C, H, W), N >= 2, to run and compare on; eight or more are better.
        tolerance: of the difference of logits, relative to their scale; for half precision a
            hundredth is allowed.
        seconds: time limit. What is not settled by then stays silenced.
        groups: afterwards remove neurons that are added to others together with those others, the
            whole coupled group. This changes what the model computes; `drift` says by how much.

    Raises:
        DataError: fewer than two images.
        UnsupportedModelError: the model is wrapped or cannot be copied.
    """
    if example.ndim != 4 or len(example) < 2:
        raise DataError(f"expected two images (N, C, H, W) or more, got {tuple(example.shape)}")
    example = _plain(example)
    own = frozen_copy(model)
    loose = copy.deepcopy(own).float()  # noise of any scale goes through single precision
    names = {module: name for name, module in loose.named_modules()}
    allowed = allowed_drift(example.dtype, tolerance)
    bench = _Bench(own, names, example, allowed)
    nothing = Lane({}, {}, {}, {})
    lane, reasons = nothing, dict[Neuron, str]()
    if len(selection):
        try:
            few = len(example) <= _TRIAL
            trial = bench if few else _Bench(own, names, example[:_TRIAL], allowed)
            network = Network(loose, example[:2].float(), seconds)
            lane, reasons = _decide(trial, network, selection, groups)
            complaint = bench.complaint(lane, any_drift=groups)
        except OutOfTime as late:
            complaint = str(late)
        except Exception as error:  # a network may object to noise, to NaN, to being cut loose
            complaint = f"the network cannot be analysed ({_short(error)})"
        if complaint:
            lane, reasons = nothing, dict.fromkeys(selection.neurons, complaint)
    recipe = recipe_of(names, lane)
    return RemovalPlan(
        removed=tuple(neuron for neuron in selection.neurons if neuron not in reasons),
        silenced=reasons,
        channels=sum(int(marks.sum()) for marks in lane.outputs.values()),
        recipe=recipe,
        drift=bench.drift(recipe),
    )


def _decide(
    bench: _Bench, network: Network, selection: Selection, groups: bool
) -> tuple[Lane, dict[Neuron, str]]:
    """What goes, and why the rest of the selection does not."""
    whole, kept = unneeded(network)
    lane, failures = _settle(bench, network, whole)
    if groups:
        lane = _with_groups(bench, network, selection, lane)
    causes = {**failures, **{why: Lane(marks, {}, {}, {}) for why, marks in kept.items()}}
    return lane, _reasons(network.model, selection, lane, causes)


@dataclass
class _Bench:
    """Where cuts are tried."""

    model: nn.Module  # silenced, in eval mode
    names: dict[nn.Module, str]  # of the layers that lanes speak of
    example: Tensor
    tolerance: float

    def __post_init__(self) -> None:
        with torch.no_grad():
            self._wanted = self.model(self.example)
        self._latest = Recipe(), 0.0

    def drift(self, recipe: Recipe) -> float:
        """Largest difference of logits, relative to their scale, that a cut makes."""
        if recipe != self._latest[0]:
            self._latest = recipe, self._measure(recipe)
        return self._latest[1]

    def _measure(self, recipe: Recipe) -> float:
        smaller = recipe.apply_(copy.deepcopy(self.model))
        with torch.no_grad():
            got = smaller(self.example)
        if got.shape != self._wanted.shape:
            raise ValueError(f"logits of shape {tuple(got.shape)}")
        scale = self._wanted.abs().max().clamp_min(1e-12)
        return float((got - self._wanted).abs().max() / scale)

    def complaint(self, lane: Lane, *, any_drift: bool = False) -> str:
        """Why this cut is not to be made; empty if it is fine."""
        if not lane.outputs:
            return ""
        try:
            drift = self.drift(recipe_of(self.names, lane))
        except Exception as error:  # whatever a network does with shapes it does not expect
            return f"the network does not run without it ({_short(error)})"
        if not drift <= (float("inf") if any_drift else self.tolerance):
            return f"without it the logits change by {drift:.1e}"
        return ""


def _settle(bench: _Bench, network: Network, whole: Lane) -> tuple[Lane, dict[str, Lane]]:
    """As much of a lane as can be cut, and why the rest cannot."""
    if not bench.complaint(whole):
        return whole, {}
    done = Lane({}, {}, {}, {})
    failures: dict[str, Lane] = {}
    todo = [split(network, whole)]
    while todo:
        parts = todo.pop()
        try:
            network.check_time()
        except OutOfTime as late:  # what was settled is right all the same
            failures[str(late)] = merge(itertools.chain(parts, *todo))
            break
        tried = merge([done, *parts])
        complaint = bench.complaint(tried)
        if not complaint:
            done = tried
        elif len(parts) == 1:
            failures[complaint] = merge([failures.get(complaint, parts[0]), *parts])
        else:
            half = len(parts) // 2
            todo += [parts[half:], parts[:half]]
    return done, failures


def _with_groups(bench: _Bench, network: Network, selection: Selection, done: Lane) -> Lane:
    """`done` and the coupled groups of what is left, layer by layer."""
    for site, channels in selection.by_site().items():
        producer = next(s.producer for s in selection.sites if s.name == site)
        module = network.model.get_submodule(producer)
        if module not in network.dense:
            continue
        left = torch.zeros_like(done.outputs.get(module, network.channels(module)))
        left[channels] = True
        left &= ~done.outputs.get(module, torch.zeros_like(left))
        if not left.any():
            continue
        none = {m: done.outputs.get(m, network.channels(m)) for m in network.dense}
        try:
            group = coupled(network, {**none, module: none[module] | left})
        except OutOfTime:
            break
        if group is not None:
            tried = merge([done, group])
            if not bench.complaint(tried, any_drift=True):
                done = tried
    return done


def _reasons(
    model: nn.Module, selection: Selection, done: Lane, causes: dict[str, Lane]
) -> dict[Neuron, str]:
    """Why each selected neuron that was not removed was not; `causes` hold some, by reason."""

    def has(lane: Lane, module: nn.Module, channel: int) -> bool:
        _, passed = lane.along.get(module, (None, None))
        marks = lane.outputs.get(module) if is_dense(module) else passed
        return marks is not None and bool(marks[channel])

    def silent(neuron: Neuron) -> bool:
        weight = model.get_submodule(neuron.site).weight
        assert isinstance(weight, Tensor)
        return not weight[neuron.channel].any()

    reasons = {}
    producers = {site.name: model.get_submodule(site.producer) for site in selection.sites}
    for neuron in selection.neurons:
        place = producers[neuron.site], neuron.channel
        if not has(done, *place):
            found = [why for why, lane in causes.items() if has(lane, *place)]
            reasons[neuron] = (found[0] if found else STAYS) if silent(neuron) else AWAKE
    return reasons


def _short(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:100] if text else ''}"


def _plain(example: Tensor) -> Tensor:
    """Images without history, made outside of inference mode."""
    with torch.inference_mode(False):
        return example.detach().clone() if example.is_inference() else example.detach()


def _wait(example: Tensor) -> None:
    """Until the device has done what it was asked for."""
    if example.is_cuda:
        torch.cuda.synchronize(example.device)
