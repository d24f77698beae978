"""Repair: unlearn what a recovered trigger still does to a network whose neurons were silenced.

The second mitigation of Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks
in Neural Networks", IEEE S&P 2019: training on images, some of them stamped with the recovered
trigger, all with their own labels. What it gives here: docs/repair.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.copies import clone, frozen_copy
from ..core.data import CleanData
from ..core.masks import Silencing, silence_
from ..core.measures import PairedAccuracy
from ..core.recovered import RecoveredTrigger
from ..core.scores import ChannelScores, Selection
from ..errors import DataError, ScoringError
from ..triggers.inversion import Inversion
from ..utils.randomness import checked_seed, private_randomness
from ..utils.tensors import at_least_float32, placement
from .fine_tuning import check_fits, check_trainable, fine_tune

# ours, see docs/repair.md; Neural Cleanse trains one epoch on a tenth of the training images
REPAIR: dict[str, Any] = {
    "epochs": 20,
    "lr": 3e-4,
    "optimiser": "adamw",
    "largest_gradient": 1.0,
    "statistics": "running",
}

SEARCH = Inversion()


def unlearn_triggers(
    model: nn.Module,
    clean: CleanData | Iterable[Any],
    triggers: Sequence[RecoveredTrigger],
    *,
    selection: Selection | None = None,
    silencing: Silencing = "zero",
    search: Inversion | None = SEARCH,
    stamped: float = 0.2,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """`fine_tune` so that recovered triggers do nothing, and little else changes.

    Short, a fifth of each batch stamped with the given triggers or with one that is recovered
    in the silenced network, where those that were recovered before may do nothing while the
    attacker's works by other neurons. BatchNorm's statistics stay as they are, since
    estimating them anew brings backdoors back (docs/ranking.md). AdamW with gradients of limited
    norm, since SGD at a rate that is gentle to a ResNet ruined ConvNeXts. What came out, and how
    the settings were found: docs/repair.md.

    Args:
        triggers: all of one label.
        search: how one more is recovered for that label in the silenced network, on the same
            images; None: none is, as in Neural Cleanse.
        stamped: share of each batch that one of the triggers is stamped on (as Neural Cleanse).

    Raises:
        DataError, UnsupportedModelError, ScoringError: as `fine_tune`; also without a trigger.
    """
    if not 0 <= stamped <= 1:  # before the search, which takes a while
        raise DataError(f"expected stamped in [0, 1], got {stamped:g}")
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
        check_trainable(given)  # before the search, too
        data = CleanData.collect(clean)
    data.targets  # noqa: B018 - raises where there are none
    more: Sequence[RecoveredTrigger] = ()
    if search is not None:
        silenced = frozen_copy(given).float()
        if selection is not None:
            check_fits(silenced, selection)
            silence_(silenced, selection, silencing=silencing)
        # with other beginnings than the criterion's, which has this seed
        label = triggers[0].target
        more = search.recover(silenced, data, [label], seed=seed + 5, progress=progress)
    tuned = fine_tune(
        clone(given).to(_precision(given)),  # small steps are lost in half precision
        data,
        **REPAIR,
        selection=selection,
        silencing=silencing,
        triggers=(*triggers, *more),
        stamped=stamped,
        seed=seed,
        progress=progress,
    )
    for own, theirs in zip(_state(tuned), _state(given), strict=True):
        own.data = own.data.to(theirs.dtype)
    return tuned


def _state(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _precision(model: nn.Module) -> torch.dtype:
    """Single, or that of the model if it is higher."""
    return at_least_float32(torch.empty(0, dtype=placement(model)["dtype"])).dtype


def repaired(
    silenced: nn.Module,
    scoring: CleanData,
    selecting: CleanData,
    triggers: tuple[RecoveredTrigger, ...],
    **settings: Any,
) -> tuple[nn.Module, str]:
    """The silenced model after a repair, or unchanged, and then why.

    Trained on one part of the labelled images and judged on the other: undone if the 95 % interval
    of the paired drop lies above zero. `settings` are those of `unlearn_triggers`, and so are the
    errors.
    """
    trained = unlearn_triggers(silenced, scoring, triggers, **settings)
    cost = PairedAccuracy.of(silenced, trained, selecting)
    if cost is not None and cost.interval[0] > 0:
        return silenced, f"it would have cost accuracy, {cost}"
    return trained, ""


def triggers_of(scores: ChannelScores, selection: Selection) -> tuple[RecoveredTrigger, ...]:
    """The recovered triggers, of the selector's label where it and the criterion disagree."""
    found = (*selection.triggers, *scores.triggers)
    return tuple(trigger for trigger in found if trigger.target == found[0].target)
