"""The whole job in one call: score, select, silence, remove, measure."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from .criteria import Criterion, create_criterion
from .data import CleanData, like
from .errors import DataError, UnsupportedModelError
from .evaluation import Rate, predict
from .guard import private_copy, private_randomness
from .masking import MaskedModel, Silencing, silence_
from .norms import recalibrate_norms_
from .recipe import Recipe
from .removal import TOLERANCE, RemovalReport, compact
from .scores import ChannelScores, Selection
from .selection import HeldOut, Selector, create_selector, even_parts, paired_drop
from .sites import find_sites

Removal = Literal["exact", "group", "none"]

_PROBE = 16  # images on which the smaller model is held against the silenced one


@dataclass(frozen=True)
class PairedAccuracy:
    """Clean accuracy before and after on the same images, which nothing before had seen."""

    before: Rate
    after: Rate
    drop: float  # share of the images; negative = gain
    interval: tuple[float, float]  # of the drop, 95 %

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.before.value:.1%} -> {self.after.value:.1%} on {self.before.count} images, "
            f"drop {100 * self.drop:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
        )


@dataclass(frozen=True, eq=False)
class Purified:
    """What `purify` gives back."""

    model: nn.Module
    scores: ChannelScores
    selection: Selection
    accuracy: PairedAccuracy | None  # None where the clean images have no labels
    silencing: Silencing
    removal: RemovalReport | None  # None where nothing was to be taken out of the tensors
    seed: int
    seconds: dict[str, float] = field(default_factory=dict)  # wall time of each stage

    @property
    def recipe(self) -> Recipe:
        """How the original architecture becomes that of `model`; empty if it is the same."""
        return Recipe() if self.removal is None else self.removal.recipe

    def summary(self) -> str:
        """A few lines for people: what was done, what it cost, what it does not say."""
        total = len(self.scores.flat)
        share = len(self.selection) / total
        lines = [
            f"criterion  {self.scores.criterion}",
            f"neurons    {len(self.selection)} of {total} silenced ({share:.2%}), meaning "
            f"'{self.silencing}', in {len(self.selection.by_site())} of "
            f"{len(self.scores.sites)} layers",
            f"because    {self.selection.reason}",
            *self._removal(),
            f"accuracy   {self.accuracy or 'not measured: the clean images have no labels'}",
            f"seconds    {sum(self.seconds.values()):.1f} ("
            + ", ".join(f"{stage} {taken:.1f}" for stage, taken in self.seconds.items())
            + ")",
            "limits     silencing lowers the success of backdoors that use these neurons; it is "
            "no proof that none is left",
        ]
        return "\n".join(lines)

    def _removal(self) -> list[str]:
        if self.removal is None:
            return ["removal    none: the model has its original shape"]
        first, *rest = str(self.removal).splitlines()
        return [f"removal    {first}", *(f"           {line}" for line in rest)]


def purify(
    model: nn.Module,
    clean_loader: CleanData | Iterable[Any],
    method: str | Criterion = "rnp",
    *,
    selector: str | Selector = "accuracy",
    silencing: Silencing = "zero",
    removal: Removal = "exact",
    recalibrate_norms: bool = False,
    shares: tuple[float, float, float] = (0.6, 0.25, 0.15),
    seed: int = 0,
    progress: bool = True,
    **hyperparameters: Any,
) -> Purified:
    """Silence the neurons of an image classifier that look like a backdoor's.

    No triggered image is needed, and none can be given.

    Args:
        model: (N, C, H, W) -> (N, classes); left exactly as it was.
        clean_loader: a few hundred clean images, normalised as the model expects, with labels
            unless criterion and selector need none. Augmentation is better switched off.
        method: name of a criterion (`list_criteria()`), or one already made.
        selector: how much goes; name of a selector that needs no settings, or one already made.
        silencing: "zero" switches weight and bias of a neuron off, which is what removing it
            would do; "constant" keeps the bias (see `masking`).
        removal: "exact" takes silent neurons out of the tensors where that changes nothing, so
            the model gets smaller; "group" also takes out what these neurons are added to, whole
            coupled groups, which costs more than was measured when selecting; "none" leaves the
            model in its shape.
        recalibrate_norms: estimate BatchNorm statistics anew on the scoring images after
            silencing. It often gives accuracy back, and the backdoor with it (docs/ranking.md).
        shares: of the clean images for scoring, selecting, and certifying the accuracy.
        seed: same seed, same machine, same result.
        progress: bars on a terminal.
        **hyperparameters: of the criterion, when `method` is a name.

    Raises:
        UnknownNameError: method, selector or hyper-parameter; before any work is done.
        DataError, UnsupportedModelError, ScoringError: see there. Nothing half done is returned.
    """
    criterion, chooser = _criterion(method, hyperparameters), _selector(selector)
    if silencing not in ("zero", "constant"):
        raise DataError(f"expected silencing 'zero' or 'constant', got {silencing!r}")
    if removal not in ("exact", "group", "none"):
        raise DataError(f"expected removal 'exact', 'group' or 'none', got {removal!r}")
    clock = _Clock()
    with private_randomness(seed):
        clean = CleanData.collect(clean_loader)
        own = private_copy(model)
        clean.check_against(own)
        if criterion.needs_labels:
            clean.targets  # noqa: B018 - raises where there are none
        scoring, selecting, certifying = clean.split(*shares, seed=seed)
        sites = find_sites(own, scoring.images[:2].to(**like(own)))
        clock.lap("checks")
        scores = criterion(own, scoring, sites=sites, seed=seed, progress=progress)
        clock.lap("scoring")
        held_out = None
        if clean.labels is not None:
            held_out = HeldOut(
                own,
                sites,
                selecting,
                silencing=silencing,
                recalibrate=scoring if recalibrate_norms else None,
                scored=scoring,
                progress=progress,
            )
        selection = chooser(scores, held_out)
        clock.lap("selecting")
        product = copy.deepcopy(model)
        silence_(product, selection, silencing=silencing)
        _check_same(product, own, selection, certifying, silencing)
        if recalibrate_norms and len(selection):
            where = like(product)
            recalibrate_norms_(product, [x.to(**where) for x in even_parts(scoring.images)])
        report = None
        if removal != "none" and len(selection):
            probe = scoring.images[:_PROBE].to(**like(own))
            product, report = compact(product, selection, probe, groups=removal == "group")
            clock.lap("removing")
        accuracy = _paired(own, product, certifying)
        clock.lap("certifying")
    return Purified(product, scores, selection, accuracy, silencing, report, seed, clock.laps)


def _criterion(method: str | Criterion, hyperparameters: dict[str, Any]) -> Criterion:
    if isinstance(method, Criterion):
        if hyperparameters:
            names = ", ".join(hyperparameters)
            raise DataError(f"{names}: give hyper-parameters to the criterion you made, or a name")
        return method
    return create_criterion(method, **hyperparameters)


def _selector(selector: str | Selector) -> Selector:
    return selector if isinstance(selector, Selector) else create_selector(selector)


def _check_same(
    product: nn.Module,
    own: nn.Module,
    selection: Selection,
    clean: CleanData,
    silencing: Silencing,
) -> None:
    """The silenced product must compute what the masks computed, or it is not given out."""
    masked = MaskedModel(own, selection.sites, silencing=silencing)
    masked.masks.requires_grad_(False).copy_(selection.keep())
    images = clean.images[:64].to(**like(own))
    training = {module: module.training for module in product.modules()}
    with torch.no_grad():
        wanted, got = masked(images), product.eval()(images)
    for module, mode in training.items():
        module.training = mode
    drift = float((wanted - got).abs().max() / wanted.abs().max().clamp_min(1e-12))
    if not drift <= (TOLERANCE if wanted.dtype == torch.float32 else 1e-2):
        raise UnsupportedModelError(
            f"the silenced weights do not compute what the masks do (relative drift {drift:.1e}); "
            "weights that are shared between layers, or computed from others, can cause this"
        )


def _paired(before: nn.Module, after: nn.Module, clean: CleanData) -> PairedAccuracy | None:
    if clean.labels is None:
        return None
    hits = [predict(model, clean.images) == clean.labels for model in (before, after)]
    drop, error = paired_drop(*hits)
    old, new = (Rate(int(right.sum()), len(right)) for right in hits)
    return PairedAccuracy(old, new, drop, (drop - 1.96 * error, drop + 1.96 * error))


class _Clock:
    """Wall seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage] = now - self._last
        self._last = now
