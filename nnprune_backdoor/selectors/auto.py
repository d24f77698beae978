"""How much to prune without a triggered image: nothing without evidence, else until it has gone.

Ours. `scan` says whether there is evidence of a backdoor and for which label; the ranking's least
amount within the accuracy budget is taken at which triggers recovered before fail *and* one
recovered anew, on the silenced network, gives no evidence any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

from ..core.copies import clone, frozen_copy
from ..core.data import CleanData
from ..core.held_out import HeldOut
from ..core.masks import silence_
from ..core.passes import Task, Work
from ..core.recovered import RecoveredTrigger
from ..core.scores import ChannelScores, Point, Selection, lowest
from ..errors import DataError
from ..evidence.diagnosis import Diagnosis
from ..evidence.probability import ALARM, Outcome, Suspicion
from ..evidence.scanning import Scan
from .base import Selector, register_selector
from .trigger import TriggerGone

_LEFT = {
    Outcome.EVIDENCE: "remains",
    Outcome.NONE: "is gone",
    Outcome.UNKNOWN: "is undecided",
}


@register_selector("auto")
@dataclass(frozen=True)
class Auto(Selector):
    """The least at which a backdoor is no longer probable.

    Evidence is sought on the images that the criterion saw, if `purify` passes them on, with other
    beginnings than the criterion's; accuracy and the triggers' success are measured on held-out
    ones. Without an alarm nothing is selected: that excludes no backdoor which leaves no evidence
    of these kinds, and a false alarm prunes a benign network (rates: docs/results/diagnosis.md).
    If no amount within the budget brings the evidence down, the one with the least is taken, and
    the reason says so. The criterion's ranking is taken as it is.

    The details hold the evidence before (`diagnosis`) and after (`remaining`, at each amount that
    was looked at; `repaired`, where a repair followed), the `curve`, and the `plateau`: from the
    amount taken to the largest one within the budget at which the triggers still fail. A wide
    plateau means that the amount matters little.

    Attributes:
        max_drop: Largest loss of accuracy on held-out clean images, by the estimate.
        gone: How amounts are tried, and when a trigger counts as failing.
        evidence: The scan.
        looks: Number of amounts at which a trigger is recovered anew.
        seed: Of the scan and of triggers recovered anew.
    """

    needs_labels: ClassVar[bool] = True
    recovers_triggers: ClassVar[bool] = True

    max_drop: float = 0.02
    gone: TriggerGone = field(default=TriggerGone())
    evidence: Scan = field(default=Scan())
    looks: int = 4
    seed: int = 1

    def __post_init__(self) -> None:
        if self.looks < 1:
            raise DataError(f"expected at least one look, got {self.looks}")
        object.__setattr__(self, "gone", replace(self.gone, max_drop=self.max_drop))

    def passes(self, task: Task) -> Work:
        """Where there is an alarm, and the first amount that is looked at will do."""
        seen = task.part(task.scored or task.images)
        scan = [passes for stage in self.evidence.passes(seen).values() for passes in stage]
        again = self.gone.inversion.passes(seen, 1) * (self.gone.triggers - 1)
        look = self.evidence.passes_of_remaining(seen)
        return (*scan, *again, *self.gone.traced(task), *look)

    def __call__(self, scores: ChannelScores, held_out: HeldOut | None = None) -> Selection:
        if held_out is None:
            raise DataError("Auto needs labelled held-out clean images")
        held_out.clean.targets  # noqa: B018 - raises where there are none
        images = self._images(held_out)
        diagnosis = self.evidence(
            held_out.model,
            images,
            silencing=held_out.silencing,
            seed=self.seed,
            progress=held_out.progress,
        )
        found = self._triggers(diagnosis, held_out, images)
        if not found:
            reason = (
                f"{diagnosis.verdict}, and no trigger was recovered for this label, so nothing goes"
                if diagnosis.alarm
                else f"{diagnosis.verdict}, so nothing goes; a backdoor that leaves no such "
                "evidence is not excluded"
            )
            return lowest(scores, 0, reason, diagnosis=diagnosis.to_dict())
        return self._decide(scores, held_out, images, diagnosis, found)

    def review(self, selection: Selection, repaired: nn.Module, held_out: HeldOut) -> Selection:
        """Seeks the evidence once more, in the repaired network: what is written has to show it."""
        target = selection.details.get("target")
        if target is None:
            return selection
        frozen, clean = frozen_copy(repaired), held_out.clean  # in eval mode, whatever theirs is
        compared = selection.details["compared"]
        left = self._remaining(frozen, held_out, self._images(held_out), target, compared)
        success = max(trigger.tested_on(frozen, clean).success for trigger in selection.triggers)
        look = _look(len(selection), success, left)
        after = _LEFT[Outcome.of(look["probability"])]
        reason = (
            f"by silencing alone {selection.reason}; after the repair, on the images that it was "
            f"trained on, evidence of these kinds {after}, and recovered triggers succeed on "
            f"{success:.0%} of held-out images"
        )
        return replace(selection, reason=reason, details={**selection.details, "repaired": look})

    def _images(self, held_out: HeldOut) -> CleanData:
        """Those that the criterion saw, where they were passed on."""
        return CleanData((held_out.scored or held_out.clean).images)

    def _triggers(
        self, diagnosis: Diagnosis, held_out: HeldOut, images: CleanData
    ) -> list[RecoveredTrigger]:
        """The suspected label's, from independent beginnings; none without an alarm."""
        first = diagnosis.trigger
        if first is None or not diagnosis.alarm:
            return []
        again = [
            self.gone.inversion.recover(
                held_out.model, images, [first.target], seed=seed, progress=held_out.progress
            )[0]
            for seed in range(self.seed + 1, self.seed + self.gone.triggers)
        ]
        return [first, *(t for t in again if t.success >= self.gone.min_success)]

    def _decide(
        self,
        scores: ChannelScores,
        held_out: HeldOut,
        images: CleanData,
        diagnosis: Diagnosis,
        found: Sequence[RecoveredTrigger],
    ) -> Selection:
        assert diagnosis.target is not None
        curve = self.gone.trace(scores, held_out, found, through=True)
        allowed = self.gone.within_budget(curve)
        fail = [point for point in allowed if (point.success or 0.0) <= self.gone.max_success]
        # without an amount at which the triggers fail: the one at which they succeed least
        points = _spread(fail, self.looks) or [min(allowed, key=lambda point: point.success or 0.0)]
        looked: list[dict[str, Any]] = []
        suspected = {item.label for item in diagnosis.suspicions}
        sizes = self.evidence.sizes(diagnosis.triggers)
        compared = {label: size for label, size in sizes.items() if label not in suspected}
        for point in points:
            silenced = clone(held_out.model)
            silence_(silenced, lowest(scores, point.neurons), silencing=held_out.silencing)
            left = self._remaining(silenced, held_out, images, diagnosis.target, compared)
            looked.append(_look(point.neurons, point.success, left))
            if not looked[-1]["alarm"]:
                break
        best = min(looked, key=lambda look: (look["alarm"], look["probability"]))
        count = best["neurons"]
        reason = f"{diagnosis.verdict} {self._outcome(best)}"
        last = max((point.neurons for point in fail), default=count)
        selection = lowest(
            scores,
            count,
            reason,
            diagnosis=diagnosis.to_dict(),
            target=diagnosis.target,
            compared=compared,
            plateau=[count, last] if fail else None,
            remaining=looked,
        )
        return replace(selection, curve=tuple(curve), triggers=tuple(found))

    def _outcome(self, look: Mapping[str, Any]) -> str:
        """What a look found, in words; it remains where the look raised the alarm, as `alarm`."""
        left = _LEFT[Outcome.of(look["probability"])]
        if not look["alarm"] and look["success"] <= self.gone.max_success:
            return f"{left}, and its recovered triggers fail"
        found = f"recovered triggers succeed on {look['success']:.0%} of held-out images"
        if not look["alarm"]:
            return (
                f"{left}, but {found}: no amount tried within {self.max_drop:.1%} of clean "
                "accuracy makes them fail"
            )
        found += f", a backdoor is still probable by {look['probability']:.2f}"
        return (
            f"{left} ({found}): no amount tried within {self.max_drop:.1%} of clean accuracy "
            "removes it"
        )

    def _remaining(
        self,
        model: nn.Module,
        held_out: HeldOut,
        images: CleanData,
        target: int,
        compared: Mapping[int, float],
    ) -> Suspicion:
        """Evidence for the target with a trigger that knows what was done to the model."""
        return self.evidence.remaining(
            model,
            images,
            target,
            compared=compared,
            silencing=held_out.silencing,
            seed=self.seed + 1,
            progress=held_out.progress,
        )


def _look(neurons: int, success: float | None, left: Suspicion) -> dict[str, Any]:
    """What was found at an amount, as plain data."""
    found: dict[str, Any] = {"neurons": neurons, "success": success}
    found |= {"alarm": left.probability >= ALARM, "probability": left.probability}
    return found | {item.kind: item.value for item in left.evidence}


def _spread(points: Sequence[Point], count: int) -> list[Point]:
    """At most so many of the points: the first, the last, and some between."""
    if len(points) <= count:
        return list(points)
    places = [round(i * (len(points) - 1) / max(1, count - 1)) for i in range(count)]
    return [points[place] for place in places]
