"""`purify`: score, select, silence, repair, remove and measure, in one call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .core.checks import check_label_order, check_scoring_part, counting_what_was_given
from .core.compute import Compute
from .core.copies import clone, eval_mode, refuse_computed_weights
from .core.data import CleanData
from .core.drift import allowed_drift, logit_drift
from .core.held_out import HeldOut
from .core.masks import MaskedModel, Silencing, silence_
from .core.measures import PairedAccuracy, ProxySuccess, Removal, Repair
from .core.predictions import predict_labels
from .core.prepared import Labels, Prepared
from .core.scores import ChannelScores, Selection
from .core.sites import Neuron, Site
from .core.unscored import unscored
from .criteria.base import Criterion, create_criterion
from .errors import DataError, UnsupportedModelError
from .removal.compaction import RemovalReport, compact
from .reports.purified import Purified
from .reports.record import Given
from .selectors.base import Selector, create_selector
from .training.fine_tuning import check_trainable
from .training.repair import repaired, triggers_of
from .utils.progress import Clock, progress_bar
from .utils.randomness import checked_seed, private_randomness
from .utils.tensors import placement

_PROBE = 16  # images on which the smaller model is held against the silenced one


def purify(
    model: nn.Module,
    clean_loader: CleanData | Iterable[Any],
    method: str | Criterion = "rnp",
    *,
    selector: str | Selector = "accuracy",
    silencing: Silencing | None = None,
    removal: Removal = "exact",
    repair: Repair = "none",
    shares: tuple[float, float, float] = (0.6, 0.25, 0.15),
    seed: int = 0,
    progress: bool = True,
    compute: Compute = Compute(),
    **hyperparameters: Any,
) -> Purified:
    """Silence the neurons of an image classifier that look like a backdoor's.

    No triggered image is needed, and none can be given.

    Args:
        model: (N, C, H, W) -> (N, classes); left exactly as it was.
        clean_loader: a few hundred clean images, normalised as the model expects, without
            augmentation, with labels unless criterion and selector need none.
        method: name of a criterion (`list_criteria()`), or one already made.
        selector: how much goes; name of a selector that needs no settings, or one already made.
        silencing: "zero" switches a neuron's weight and bias off, as removing it would;
            "constant" keeps the bias. None: as the criterion means it (`Criterion.silencing`).
        removal: "exact" takes silent neurons out of the tensors where that changes nothing;
            "group" also takes out what they are added to, which costs more accuracy than was
            measured; "none" leaves the model in its shape.
        repair: "unlearn" trains the silenced model to forget recovered triggers (see
            `training.unlearn_triggers`); it needs labels, and a criterion or selector that
            recovers triggers. A repair that costs accuracy on the selecting images beyond chance
            is rejected (`Purified.repair_rejected` says why).
        shares: of the clean images, for scoring, selecting and measuring. Equal images come into
            the same part.
        seed: same seed, same machine, same number of threads, same result.
        progress: show progress bars on a terminal.
        compute: how the criterion's passes are run.
        **hyperparameters: of the criterion, when `method` is a name.

    Raises:
        UnknownNameError: method, selector or hyper-parameter; before any work is done.
        DataError: images or options that cannot be used; labels in another order of classes.
        UnsupportedModelError, ScoringError: see there. Nothing half done is returned.
    """
    criterion, chooser = _criterion(method, hyperparameters), _selector(selector)
    silencing = criterion.silencing if silencing is None else silencing
    check_repair(repair, criterion, chooser)
    options = _Options(criterion, chooser, silencing, removal, repair, shares, compute, progress)
    return _run(model, clean_loader, options, checked_seed(seed))


@dataclass(frozen=True)
class _Options:
    """What `purify` was asked for."""

    criterion: Criterion
    selector: Selector
    silencing: Silencing
    removal: Removal
    repair: Repair
    shares: tuple[float, float, float]
    compute: Compute
    progress: bool

    def __post_init__(self) -> None:
        if self.silencing not in ("zero", "constant"):
            raise DataError(f"expected silencing 'zero' or 'constant', got {self.silencing!r}")
        if self.removal not in ("exact", "group", "none"):
            raise DataError(f"expected removal 'exact', 'group' or 'none', got {self.removal!r}")
        if len(self.shares) != 3:
            raise DataError(
                f"expected shares for scoring, selecting and measuring, got {self.shares}"
            )

    @property
    def needs_labels(self) -> bool:
        return self.criterion.needs_labels or self.selector.needs_labels or self.repair != "none"


def _run(
    model: nn.Module, clean_loader: CleanData | Iterable[Any], options: _Options, seed: int
) -> Purified:
    clock = Clock()
    with private_randomness(seed):
        prepared = _prepare(model, clean_loader, options)
        frozen = prepared.model
        parts = prepared.clean.split(*options.shares, seed=seed)
        check_scoring_part(parts, prepared.classes)
        scoring, selecting, measuring = parts
        probe = scoring.images[:_PROBE].to(**placement(frozen))
        given = _given(
            model, prepared, (len(scoring), len(selecting), len(measuring)), len(probe), options
        )
        clock.lap("checks")
        scores = _scored(prepared, parts, options, seed)
        clock.lap("scoring")
        held_out = HeldOut(
            frozen,
            prepared.sites,
            selecting,
            silencing=options.silencing,
            scored=scoring,
            progress=options.progress,
        )
        with counting_what_was_given(parts):
            selection = options.selector(scores, held_out)
        clock.lap("selecting")
        product, rejected = _silenced(model, frozen, selection, measuring, options.silencing), ""
        if options.repair != "none" and len(selection):
            product, rejected = _repaired(product, scores, selection, held_out, seed)
            if not rejected:
                selection = options.selector.review(selection, product, held_out)
            clock.lap("repairing")
        product, report = _removed(product, selection, probe, options)
        if report is not None:
            clock.lap("removing")
        accuracy = PairedAccuracy.of(frozen, product, measuring)
        proxies = ProxySuccess.of(scores, selection, frozen, product, measuring)
        clock.lap("certifying")
    return Purified(
        product,
        scores,
        selection,
        accuracy,
        options.silencing,
        report,
        seed,
        given,
        proxies,
        clock.laps,
        repair_rejected=rejected,
    )


def _prepare(
    model: nn.Module, clean_loader: CleanData | Iterable[Any], options: _Options
) -> Prepared:
    """The model and images, checked as far as these options need it."""
    labels: Labels = "needed" if options.needs_labels else "used"
    prepared = Prepared.of(model, clean_loader, labels=labels)
    prepared.check_runs(gradients=False)
    if options.repair != "none":
        check_trainable(prepared.model)
    clean = prepared.clean
    if clean.labels is not None:
        check_label_order(clean.labels, predict_labels(prepared.model, clean.images))
    refuse_computed_weights(prepared.model, [site.name for site in prepared.sites])
    some = clean.take(torch.arange(min(_PROBE, len(clean))))
    _silenced(model, prepared.model, _spread(prepared.sites), some, options.silencing)
    return prepared


def _spread(sites: tuple[Site, ...]) -> Selection:
    """One channel of each site, of sites as wide as each other different ones.

    Silenced on trial before scoring: of layers that share their weights each would then silence
    another channel than its mask.
    """
    seen: Counter[int] = Counter()
    neurons = []
    for site in sites:
        if site.channels > 1:
            neurons.append(Neuron(site.name, seen[site.channels] % site.channels))
        seen[site.channels] += 1
    return Selection(sites, tuple(neurons))


def _given(
    model: nn.Module,
    prepared: Prepared,
    parts: tuple[int, int, int],
    probe: int,
    options: _Options,
) -> Given:
    """What is on record of the input."""
    return Given.of(
        model,
        prepared.clean,
        classes=prepared.classes,
        parts=parts,
        probe=probe,
        unscored=unscored(prepared.model, prepared.probe, prepared.sites),
        criterion=options.criterion,
        selector=options.selector,
        removal=options.removal,
        repair=options.repair,
        shares=options.shares,
        compute=options.compute,
    )


def _scored(
    prepared: Prepared, parts: list[CleanData], options: _Options, seed: int
) -> ChannelScores:
    """The criterion's scores, from the first part."""
    with counting_what_was_given(parts):
        return options.criterion(
            prepared.model,
            parts[0],
            sites=prepared.sites,
            seed=seed,
            progress=options.progress,
            compute=options.compute,
        )


def _silenced(
    model: nn.Module,
    frozen: nn.Module,
    selection: Selection,
    clean: CleanData,
    silencing: Silencing,
) -> nn.Module:
    """A copy of the model with the selected neurons silent.

    Args:
        frozen: the private copy on which masks were tried.

    Raises:
        UnsupportedModelError: it does not compute what the masks computed.
    """
    product = clone(model)
    silence_(product, selection, silencing=silencing)
    masked = MaskedModel(frozen, selection.sites, silencing=silencing)
    masked.masks.requires_grad_(False).copy_(selection.keep())
    images = clean.images[:64].to(**placement(frozen))
    with torch.no_grad(), eval_mode(product):
        wanted, got = masked(images), product(images)
    drift = logit_drift(wanted, got)
    if not drift <= allowed_drift(wanted.dtype):
        raise UnsupportedModelError(
            f"the silenced weights do not compute what the masks do (relative drift {drift:.1e}); "
            "weights that are shared between layers, or computed from others, can cause this: give "
            "each layer plain weights of its own"
        )
    return product


def _repaired(
    product: nn.Module, scores: ChannelScores, selection: Selection, held_out: HeldOut, seed: int
) -> tuple[nn.Module, str]:
    """The product after unlearning recovered triggers, or as it was, and then why."""
    assert held_out.scored is not None
    return repaired(
        product,
        held_out.scored,
        held_out.clean,
        triggers_of(scores, selection),
        selection=selection,
        silencing=held_out.silencing,
        seed=seed,
        progress=held_out.progress,
    )


def _removed(
    product: nn.Module, selection: Selection, probe: torch.Tensor, options: _Options
) -> tuple[nn.Module, RemovalReport | None]:
    """The product without its silent neurons, and how it went; None where nothing was to go."""
    if options.removal == "none" or not len(selection):
        return product, None
    with progress_bar(1, "removing", options.progress) as bar:
        smaller, report = compact(product, selection, probe, groups=options.removal == "group")
        bar.update()
    return smaller, report


def check_repair(repair: Repair, criterion: Criterion, selector: Selector) -> None:
    """Raise DataError unless there is such a repair and something recovers a trigger for it."""
    if repair not in ("none", "unlearn"):
        raise DataError(f"expected repair 'none' or 'unlearn', got {repair!r}")
    if repair == "unlearn" and not (criterion.recovers_triggers or selector.recovers_triggers):
        raise DataError(
            "repair='unlearn' needs a recovered trigger; take a criterion that recovers one "
            "('tac', 'cnp') or a selector that does ('trigger', 'auto')"
        )


def _criterion(method: str | Criterion, hyperparameters: dict[str, Any]) -> Criterion:
    if isinstance(method, type):
        raise DataError(f"expected a criterion, got a class; make it: {method.__name__}()")
    if isinstance(method, Criterion):
        if hyperparameters:
            names = ", ".join(hyperparameters)
            raise DataError(f"{names}: give hyper-parameters to the criterion you made, or a name")
        return method
    return create_criterion(method, **hyperparameters)


def _selector(selector: str | Selector) -> Selector:
    if isinstance(selector, type):
        raise DataError(
            f"expected a selector or its name, got a class; make it: {selector.__name__}(...)"
        )
    return selector if isinstance(selector, Selector) else create_selector(selector)
