"""Repair: unlearn what a recovered trigger still does to a network whose neurons were silenced.

The second mitigation of Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks
in Neural Networks", IEEE S&P 2019: training on images, some of them stamped with the recovered
trigger, all with their own labels. What it gives here: docs/results/repair.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from ..core.copies import clone, frozen_copy
from ..core.data import CleanData
from ..core.masks import Silencing, silence_
from ..core.measures import PairedAccuracy
from ..core.norms import Statistics
from ..core.passes import Task, Work
from ..core.recovered import RecoveredTrigger
from ..core.scores import ChannelScores, Selection
from ..errors import DataError, ScoringError
from ..triggers.inversion import Inversion
from ..utils.randomness import checked_seed, private_randomness
from .fine_tuning import (
    FineTuning,
    check_fits,
    check_trainable,
    fine_tune,
    restore_precision_,
    training_precision,
)


@dataclass(frozen=True, kw_only=True)
class TriggerUnlearning(FineTuning):
    """How recovered triggers are unlearned. The settings are ours, see docs/results/repair.md.

    Neural Cleanse trains one epoch on a tenth of the training images. BatchNorm's statistics stay
    as they are, since estimating them anew brings backdoors back (docs/results/ranking.md). AdamW
    with gradients of limited norm, since SGD at a rate that is gentle to a ResNet ruined ConvNeXts.

    Attributes:
        search: How one more trigger is recovered in the silenced network, on the same images, where
            those that were recovered before may do nothing while the attacker's works by other
            neurons; None for none, as in Neural Cleanse.
    """

    epochs: int = 20
    lr: float = 3e-4
    optimiser: Literal["sgd", "adamw"] = "adamw"
    largest_gradient: float | None = 1.0
    statistics: Statistics = "running"
    search: Inversion | None = Inversion()

    def passes(self, task: Task) -> Work:
        search = () if self.search is None else self.search.passes(task, 1)
        return (*super().passes(task), *search)


REPAIR = TriggerUnlearning()


def unlearn_triggers(
    model: nn.Module,
    clean: CleanData | Iterable[Any],
    triggers: Sequence[RecoveredTrigger],
    settings: TriggerUnlearning | None = None,
    *,
    selection: Selection | None = None,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """`fine_tune` so that recovered triggers do nothing, and little else changes.

    A fifth of each batch is stamped with one of the given triggers, or with one that is recovered
    in the silenced network. What came out: docs/results/repair.md.

    Args:
        triggers: all of one label.
        settings: how they are unlearned.
        selection: neurons to silence, and to keep silent.

    Raises:
        DataError, UnsupportedModelError, ScoringError: as `fine_tune`; also without a trigger.
    """
    settings = REPAIR if settings is None else settings
    if not triggers:
        raise ScoringError("no trigger was recovered, so there is none to unlearn")
    labels = sorted({trigger.target for trigger in triggers})
    if len(labels) > 1:
        raise DataError(
            f"expected triggers of one label, got labels {labels}; repair one at a time"
        )
    seed = checked_seed(seed)
    with private_randomness(seed):  # a loader may shuffle
        given = clone(model)
        check_trainable(given)  # before the search, which takes a while
        data = CleanData.collect(clean)
    data.targets  # noqa: B018 - raises where there are none
    more: Sequence[RecoveredTrigger] = ()
    if settings.search is not None:
        silenced = frozen_copy(given).float()
        if selection is not None:
            check_fits(silenced, selection)
            silence_(silenced, selection, silencing=settings.silencing)
        # with other beginnings than the criterion's, which has this seed
        more = settings.search.recover(silenced, data, labels, seed=seed + 5, progress=progress)
    tuned = fine_tune(
        clone(given).to(training_precision(given)),
        data,
        settings,
        selection=selection,
        triggers=(*triggers, *more),
        seed=seed,
        progress=progress,
    )
    restore_precision_(tuned, given)
    return tuned


def repaired(
    silenced: nn.Module,
    scoring: CleanData,
    selecting: CleanData,
    triggers: tuple[RecoveredTrigger, ...],
    *,
    selection: Selection,
    silencing: Silencing = "zero",
    **how: Any,
) -> tuple[nn.Module, str]:
    """The silenced model after a repair, or unchanged, and then why.

    Trained on one part of the labelled images and judged on the other: rejected if the 95 %
    interval of the paired drop lies above zero.

    Args:
        **how: seed and progress, as for `unlearn_triggers`; so are the errors.
    """
    settings = replace(REPAIR, silencing=silencing)
    trained = unlearn_triggers(silenced, scoring, triggers, settings, selection=selection, **how)
    cost = PairedAccuracy.of(silenced, trained, selecting)
    if cost is not None and cost.interval[0] > 0:
        return silenced, f"it would have cost accuracy, {cost}"
    return trained, ""


def triggers_of(scores: ChannelScores, selection: Selection) -> tuple[RecoveredTrigger, ...]:
    """The recovered triggers, of the selector's label where it and the criterion disagree."""
    found = (*selection.triggers, *scores.triggers)
    return tuple(trigger for trigger in found if trigger.target == found[0].target)
