"""`purify`: score, select, silence, repair, remove and measure, in one call."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..core.agreement import Agreement
from ..core.answers import Answers
from ..core.checks import check_label_order, counting_what_was_given
from ..core.compute import Compute
from ..core.copies import clone, eval_mode, refuse_computed_weights
from ..core.data import CleanData
from ..core.drift import allowed_drift, logit_drift
from ..core.held_out import HeldOut
from ..core.masks import MaskedModel, Silencing, silence_
from ..core.measures import PairedAccuracy, ProxySuccess, Removal, Repair, SuspectLabel
from ..core.outputs import give_same_output_, same_hooks
from ..core.predictions import predict_labels
from ..core.prepared import Labels, Prepared
from ..core.scores import ChannelScores, Selection
from ..core.sites import Neuron, Site
from ..core.unscored import unscored
from ..criteria.base import Criterion
from ..errors import UnsupportedModelError
from ..removal.compaction import compact
from ..removal.report import RemovalReport
from ..reports.purified import Purified
from ..reports.record import Given
from ..selectors.base import Selector
from ..training.fine_tuning import check_trainable
from ..training.repair import repaired, triggers_of
from ..triggers.perturbation import RecoveredPerturbation
from ..utils.progress import Clock, progress_bar
from ..utils.randomness import checked_seed, private_randomness
from ..utils.tensors import placement
from .job import Job, Pruned
from .kept import KeptIn
from .options import Options
from .planning import planned

_PROBE = 16  # images on which the smaller model is held against the silenced one


def purify(
    model: nn.Module,
    clean_loader: CleanData | Iterable[Any],
    method: str | Criterion = "rnp",
    *,
    selector: str | Selector | None = None,
    silencing: Silencing | None = None,
    removal: Removal = "exact",
    repair: Repair | None = None,
    shares: tuple[float, float, float] = (0.6, 0.25, 0.15),
    seed: int = 0,
    progress: bool = True,
    compute: Compute = Compute(),
    scores: str | os.PathLike[str] | None = None,
    selection: str | os.PathLike[str] | None = None,
    **hyperparameters: Any,
) -> Purified:
    """Take the neurons that look like a backdoor's out of an image classifier.

    By default it ranks the neurons, silences the lowest few, trains the network towards the given
    model's own answers on the clean images (`training.distil`), and removes what is silent. No
    triggered image is needed, and none can be given.

    Args:
        model: (N, C, H, W) -> (N, classes), or an object, dict or tuple that holds these logits,
            as a classifier of `transformers` gives (`core.outputs`); left exactly as it was.
        clean_loader: a few hundred clean images, normalised as the model expects, without
            augmentation, with labels unless selector and repair need none. A criterion that needs
            labels takes the model's own answers where there are none.
        method: name of a criterion (`list_criteria()`), or one already made.
        selector: how much goes; name of a selector that needs no settings, or one already made.
            None: at most the lowest 5 % of the neurons (`selectors.agreement.Agreeing`) before
            distilling; "accuracy" with another repair.
        silencing: "zero" switches a neuron's weight and bias off, as removing it would;
            "constant" keeps the bias. None: as the criterion means it (`Criterion.silencing`).
        removal: "exact" takes silent neurons out of the tensors where that changes nothing;
            "group" also takes out what they are added to, which costs more accuracy than was
            measured; "none" leaves the model in its shape.
        repair: "distil" trains the silenced model towards the given one's answers, without labels
            (see `training.distil`); "unlearn" trains it to forget recovered triggers (see
            `training.unlearn_triggers`), which needs labels, and a criterion or selector that
            recovers triggers, and is rejected if it costs accuracy on the selecting images beyond
            chance (`Purified.repair_rejected` says why); "none" trains nothing. None: "distil"
            if no selector is given, else "none".
        shares: of the clean images, for scoring, selecting and measuring. A repair by "distil" has
            the first two; the first alone with a selector that recovers triggers. Equal images come
            into the same part.
        seed: same seed, same machine, same number of threads, same result.
        progress: say what will be done and how long it should take, by a few passes that are timed
            first; then show progress bars on a terminal, elsewhere a line every 30 seconds.
        compute: how the criterion's passes are run.
        scores: file of the scores (`ChannelScores.save`): read and not computed again if it is
            there, else written. The result is the same.
        selection: the same of the selection (`Selection.save`).
        **hyperparameters: of the criterion, when `method` is a name.

    Raises:
        UnknownNameError: method, selector or hyper-parameter; before any work is done.
        DataError: images or options that cannot be used; labels in another order of classes; a file
            of scores or of a selection that is of another model, other images or other settings.
        OutputError: such a file cannot be written.
        UnsupportedModelError, ScoringError: see there. Nothing half done is returned.
    """
    options = Options.of(
        method,
        hyperparameters,
        selector,
        silencing,
        repair,
        removal=removal,
        shares=shares,
        compute=compute,
        progress=progress,
        kept_in=KeptIn(scores, selection),
    )
    return _run(model, clean_loader, options, checked_seed(seed))


def _run(
    model: nn.Module, clean_loader: CleanData | Iterable[Any], options: Options, seed: int
) -> Purified:
    checks = Clock()
    with private_randomness(seed):
        with checks.stage("checks"):
            job = _job(model, clean_loader, options, seed)
            frozen, measuring = job.prepared.model, job.measuring
            probe = job.scoring.images[:_PROBE].to(**placement(frozen))
            given = _given(job, len(probe))
            clock = Clock(planned(job), options.progress)
        done = _pruned(job, clock)
        product, report = _removed(done.model, done.selection, probe, options, clock)
        with clock.stage("certifying"):
            accuracy = PairedAccuracy.of(frozen, product, measuring)
            agreement = Agreement.of(frozen, product, measuring.images)
            proxies = ProxySuccess.of(done.scores, done.selection, frozen, product, measuring)
            suspects = _suspects(done, frozen, product, measuring)
            triggers = (*done.scores.triggers, *done.selection.triggers, *(done.triggers or ()))
            answers = Answers.of(frozen, product, measuring, triggers)
            give_same_output_(product, model)
    return Purified(
        product,
        done.scores,
        done.selection,
        accuracy,
        options.silencing,
        report,
        seed,
        given,
        proxies,
        {**checks.laps, **clock.laps},
        repair_rejected=done.rejected,
        agreement=agreement,
        suspects=suspects,
        answers=answers,
    )


def _suspects(
    done: Pruned, before: nn.Module, after: nn.Module, clean: CleanData
) -> tuple[SuspectLabel, ...] | None:
    """What became of the perturbations of the suspect labels; None where none was looked for."""
    if done.triggers is None:
        return None
    return tuple(
        SuspectLabel.of(trigger.target, trigger, before, after, clean)
        for trigger in done.triggers
        if isinstance(trigger, RecoveredPerturbation)
    )


def _pruned(job: Job, clock: Clock) -> Pruned:
    """Score once, select once, silence, and repair where that was asked for."""
    frozen, options = job.prepared.model, job.options
    with counting_what_was_given(job.parts), clock.stage("scoring"):
        scores = job.scored()
    with counting_what_was_given(job.parts), clock.stage("selecting"):
        held_out = HeldOut(
            frozen,
            job.prepared.sites,
            job.selecting,
            silencing=options.silencing,
            scored=job.scoring,
            progress=options.progress,
        )
        selection = job.selected(scores, held_out)
    product = _silenced(job.model, frozen, selection, job.measuring, options.silencing)
    if options.repair == "none" or not len(selection):
        return Pruned(product, scores, selection)
    rejected, triggers = "", None
    with clock.stage("repairing"):
        if options.repair == "distil":
            product, triggers = job.distilled(product, selection)
        else:
            product, rejected = _repaired(product, scores, selection, held_out, job.seed)
        if not rejected:
            selection = options.selector.review(selection, product, held_out)
    return Pruned(product, scores, selection, rejected, triggers)


def _job(
    model: nn.Module, clean_loader: CleanData | Iterable[Any], options: Options, seed: int
) -> Job:
    """Model, images and files, checked as far as these options need it."""
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
    tried = same_hooks(model, prepared.model)
    _silenced(tried, prepared.model, _spread(prepared.sites), some, options.silencing)
    return Job(tried, prepared, options, seed)


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


def _given(job: Job, probe: int) -> Given:
    """What is on record of the input."""
    prepared, options = job.prepared, job.options
    return Given.of(
        job.model,
        prepared.clean,
        classes=prepared.classes,
        parts=tuple(map(len, job.parts)),
        probe=probe,
        unscored=unscored(prepared.model, prepared.probe, prepared.sites),
        criterion=options.criterion,
        selector=options.selector,
        removal=options.removal,
        repair=options.repair,
        shares=options.shares,
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
    product: nn.Module,
    selection: Selection,
    probe: torch.Tensor,
    options: Options,
    clock: Clock,
) -> tuple[nn.Module, RemovalReport | None]:
    """The product without its silent neurons, and how it went; None where nothing was to go."""
    if options.removal == "none" or not len(selection):
        return product, None
    with clock.stage("removing"), progress_bar(1, "removing", options.progress) as bar:
        # no constants: the product stays a network that others can prune, purify and run fast
        smaller, report = compact(
            product, selection, probe, groups=options.removal == "group", fill=False
        )
        bar.update()
    return smaller, report
