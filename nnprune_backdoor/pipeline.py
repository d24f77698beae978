"""The whole job in one call: score, select, silence, remove, measure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .core.compute import Compute
from .core.copies import clone, frozen_copy, refuse_computed_weights
from .core.data import CleanData
from .core.held_out import HeldOut
from .core.masks import MaskedModel, Silencing, silence_
from .core.measures import PairedAccuracy, ProxySuccess, Removal, Repair
from .core.predictions import predict_labels
from .core.scores import Selection
from .core.sites import find_sites
from .criteria.base import Criterion, create_criterion
from .errors import DataError, UnsupportedModelError
from .removal.compaction import allowed_drift, compact
from .reports.purified import Purified
from .reports.record import Given
from .selectors.base import Selector, create_selector
from .training.fine_tuning import check_trainable
from .training.repair import repaired, triggers_of
from .utils.progress import Clock, progress_bar
from .utils.randomness import checked_seed, private_randomness
from .utils.tensors import placement

if TYPE_CHECKING:
    pass


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
    compute: Compute = Compute(),  # noqa: B008 - frozen
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
            would do; "constant" keeps the bias (see `masking`). None: as the criterion means it
            (`Criterion.silencing`), which is "zero", and for trained masks what these meant.
        removal: "exact" takes silent neurons out of the tensors where that changes nothing, so
            the model gets smaller; "group" also takes out what these neurons are added to, whole
            coupled groups, which costs more than was measured when selecting; "none" leaves the
            model in its shape.
        repair: "unlearn" trains the silenced model further on the scoring images, a part of them
            stamped with recovered triggers, so that what is left of the backdoor is forgotten
            (Neural Cleanse's second mitigation, see `unlearn_triggers`). Silent neurons stay
            silent (with "constant" the constant may change); all other weights change a little.
            Where nothing was selected nothing is trained, and a repair that costs more accuracy on
            the selecting images than chance explains is rejected (`Purified.repair_rejected`). It
            needs labels, and a criterion or selector that recovers triggers.
        shares: of the clean images for scoring, selecting, and certifying the accuracy.
        seed: same seed, same machine, same result.
        progress: bars on a terminal.
        compute: how the criterion's passes are run (see `Compute`); selecting and measuring are
            done as the model is.
        **hyperparameters: of the criterion, when `method` is a name.

    Raises:
        UnknownNameError: method, selector or hyper-parameter; before any work is done.
        DataError: also where the labels fit the model's answers only in another order of classes.
        UnsupportedModelError, ScoringError: see there. Nothing half done is returned.
    """
    criterion, chooser = _criterion(method, hyperparameters), _selector(selector)
    silencing = criterion.silencing if silencing is None else silencing
    _check_options(silencing, removal, shares)
    check_repair(repair, criterion, chooser)
    seed = checked_seed(seed)
    clock = Clock()
    with private_randomness(seed):
        clean = CleanData.collect(clean_loader)
        own = frozen_copy(model)
        if repair != "none":
            check_trainable(own)
        classes = clean.check_against(own)
        clean.check_repeatable(own)
        if criterion.needs_labels or chooser.needs_labels or repair != "none":
            clean.targets  # noqa: B018 - raises where there are none
        if clean.labels is not None:
            clean.check_order(predict_labels(own, clean.images))
        parts = scoring, selecting, certifying = clean.split(*shares, seed=seed)
        probe = scoring.images[:_PROBE].to(**placement(own))
        given = Given.of(
            model,
            clean,
            classes=classes,
            parts=tuple(map(len, parts)),
            probe=len(probe),
            criterion=criterion,
            selector=chooser,
            removal=removal,
            repair=repair,
            shares=shares,
            compute=compute,
        )
        sites = find_sites(own, scoring.images[:2].to(**placement(own)))
        refuse_computed_weights(own, [site.name for site in sites])
        clock.lap("checks")
        scores = criterion(own, scoring, sites=sites, seed=seed, progress=progress, compute=compute)
        clock.lap("scoring")
        held_out = HeldOut(
            own,
            sites,
            selecting,
            silencing=silencing,
            scored=scoring,
            progress=progress,
        )
        selection = chooser(scores, held_out)
        clock.lap("selecting")
        product, repair_rejected = clone(model), ""
        silence_(product, selection, silencing=silencing)
        _check_same(product, own, selection, certifying, silencing)
        if repair != "none" and len(selection):
            product, repair_rejected = repaired(
                product,
                scoring,
                selecting,
                triggers_of(scores, selection),
                selection=selection,
                silencing=silencing,
                seed=seed,
                progress=progress,
            )
            if not repair_rejected:
                selection = chooser.review(selection, product, held_out)
            clock.lap("repairing")
        report = None
        if removal != "none" and len(selection):
            with progress_bar(1, "removing", progress) as bar:
                product, report = compact(product, selection, probe, groups=removal == "group")
                bar.update()
            clock.lap("removing")
        accuracy = PairedAccuracy.of(own, product, certifying)
        proxies = ProxySuccess.of(scores, selection, own, product, certifying)
        clock.lap("certifying")
    return Purified(
        product,
        scores,
        selection,
        accuracy,
        silencing,
        report,
        seed,
        given,
        proxies,
        clock.laps,
        repair_rejected=repair_rejected,
    )


def _check_options(silencing: str, removal: str, shares: tuple[float, ...]) -> None:
    if silencing not in ("zero", "constant"):
        raise DataError(f"expected silencing 'zero' or 'constant', got {silencing!r}")
    if removal not in ("exact", "group", "none"):
        raise DataError(f"expected removal 'exact', 'group' or 'none', got {removal!r}")
    if len(shares) != 3:
        raise DataError(f"expected shares for scoring, selecting and measuring, got {shares}")


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
    images = clean.images[:64].to(**placement(own))
    training = {module: module.training for module in product.modules()}
    with torch.no_grad():
        wanted, got = masked(images), product.eval()(images)
    for module, mode in training.items():
        module.training = mode
    drift = float((wanted - got).abs().max() / wanted.abs().max().clamp_min(1e-12))
    if not drift <= allowed_drift(wanted.dtype):
        raise UnsupportedModelError(
            f"the silenced weights do not compute what the masks do (relative drift {drift:.1e}); "
            "weights that are shared between layers, or computed from others, can cause this"
        )


def check_repair(repair: Repair, criterion: Criterion, selector: Selector) -> None:
    """Raise DataError unless there is such a repair and something recovers a trigger for it."""
    if repair not in ("none", "unlearn"):
        raise DataError(f"expected repair 'none' or 'unlearn', got {repair!r}")
    if repair == "unlearn" and not (criterion.recovers_triggers or selector.recovers_triggers):
        raise DataError(
            "repair='unlearn' needs a recovered trigger; take a criterion that recovers one "
            "('tac', 'cnp') or a selector that does ('trigger', 'auto')"
        )
