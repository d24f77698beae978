"""How much to prune: until a trigger that was recovered from clean images no longer works.

Clean accuracy alone says how much may go, not how much must. A trigger recovered by inversion
sends clean images to its target while the backdoor is there; along the ranking its success falls
with the attack's own (docs/results/inversion.md has both for two networks). So the smallest amount
at which it fails is taken, if accuracy allows. Success of a recovered trigger is a *proxy*: no
triggered image is involved, and another trigger may still work.

Ours; the idea is common (Neural Cleanse, S&P 2019, and CNP, TIP 2025, watch a recovered trigger).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import nn

from ..core.copies import frozen_copy
from ..core.data import CleanData
from ..core.held_out import HeldOut
from ..core.passes import Task, Work
from ..core.predictions import predict_labels
from ..core.recovered import RecoveredTrigger
from ..core.scores import ChannelScores, Point, Selection, lowest
from ..errors import DataError
from ..triggers.inversion import Inversion, TargetEvidence
from ..utils.progress import progress_bar
from ..utils.statistics import isotonic, paired_drop
from .accuracy import amounts_to_try
from .base import Selector, register_selector


@register_selector("trigger")
@dataclass(frozen=True)
class TriggerGone(Selector):
    """The fewest neurons that make recovered triggers fail, within `max_drop` of accuracy.

    Triggers are recovered anew, for the label that the criterion found or else for that of the
    smallest trigger, with other beginnings than the criterion's: its ranking was made against its
    own. If no label has a trigger that works, nothing is selected, which excludes no backdoor of
    another kind. If none of the amounts within the budget makes the triggers fail, the one at
    which they succeed least is taken, and the reason says so.

    The triggers are fitted to the same held-out images on which they are then counted, which the
    criterion has not seen: if anything they succeed more often there than elsewhere.

    Attributes:
        max_success: Largest success rate of each recovered trigger on held-out clean images.
        max_drop: Largest loss of accuracy on held-out clean images, by the estimate.
        triggers: Number of independent recoveries.
        min_success: Minimum success rate of a recovered trigger before pruning; triggers below it
            are ignored.
        max_fraction: Largest share of all neurons that is tried.
        points: Number of amounts tried, dense at the small end.
        seed: Of the first recovery.
        search: How a trigger is recovered for every label, to find the target.
        inversion: How the target's triggers are recovered.
    """

    needs_labels: ClassVar[bool] = True
    recovers_triggers: ClassVar[bool] = True

    max_success: float = 0.05
    max_drop: float = 0.02
    triggers: int = 2
    min_success: float = 0.75
    max_fraction: float = 0.2
    points: int = 40
    seed: int = 1
    search: Inversion = field(default=Inversion(steps=150, batch_size=16))
    inversion: Inversion = field(default=Inversion())

    def __post_init__(self) -> None:
        if not 0 <= self.max_success < self.min_success <= 1 or not 0 <= self.max_drop < 1:
            raise DataError(
                "expected 0 <= max_success < min_success <= 1 and max_drop in [0, 1), got "
                f"{self.max_success}, {self.min_success} and {self.max_drop}"
            )
        if self.triggers < 1 or not 0 < self.max_fraction <= 1 or self.points < 2:
            raise DataError("expected a trigger or more, max_fraction in (0, 1], 2 points or more")

    def passes(self, task: Task) -> Work:
        search = () if task.target_known else self.search.passes(task, task.classes)
        return (*search, *self.inversion.passes(task, 1) * self.triggers, *self.traced(task))

    def traced(self, task: Task) -> Work:
        """What `trace` sends through the network, where it tries all amounts."""
        amounts = 1 + len(amounts_to_try(task.neurons, self.max_fraction, self.points))
        return (task.forward(amounts * (1 + self.triggers) * task.images),)

    def __call__(self, scores: ChannelScores, held_out: HeldOut | None = None) -> Selection:
        if held_out is None:
            raise DataError("TriggerGone needs labelled held-out clean images")
        found = self._recover(scores, held_out)
        if not found:
            label = scores.details.get("target")
            whose = "for any label" if label is None else f"for label {label}"
            reason = (
                f"no trigger recovered anew {whose} works on {self.min_success:.0%} of held-out "
                "images, so there is none to remove"
            )
            return lowest(scores, 0, reason)
        curve = self.trace(scores, held_out, found)
        return self._decide(scores, curve, found)

    def review(self, selection: Selection, repaired: nn.Module, held_out: HeldOut) -> Selection:
        """What the recovered triggers do in the repaired model, added to the reason."""
        if not selection.triggers:
            return selection
        frozen, clean = frozen_copy(repaired), held_out.clean  # in eval mode, whatever theirs is
        left = max(trigger.tested_on(frozen, clean).success for trigger in selection.triggers)
        reason = f"by silencing alone {selection.reason}; after the repair on {left:.0%}"
        return replace(selection, reason=reason)

    def trace(
        self,
        scores: ChannelScores,
        held_out: HeldOut,
        found: Sequence[RecoveredTrigger],
        *,
        through: bool = False,
    ) -> list[Point]:
        """Amount by amount: neurons, drop of accuracy, success of the best of these triggers.

        It ends where the triggers fail, or with `through` where the budget is overspent by far.
        """
        target = found[0].target
        elsewhere = predict_labels(held_out.model, held_out.clean.images) != target
        others = held_out.clean.images[elsewhere]
        stamped = [trigger(others) for trigger in found]
        before = held_out.correct(lowest(scores, 0))
        curve: list[Point] = []
        amounts = [0, *amounts_to_try(len(scores.flat), self.max_fraction, self.points)]
        with progress_bar(len(amounts), "selecting", held_out.progress) as bar:
            for amount in amounts:
                chosen = lowest(scores, amount)
                drop, error = paired_drop(before, held_out.correct(chosen))
                hits = [held_out.predict(chosen, images) == target for images in stamped]
                success = max(hit.float().mean().item() for hit in hits)
                curve.append(Point(len(chosen), drop, success))
                bar.update()
                gone = success <= self.max_success and not through
                if gone or drop > self.max_drop + max(0.05, 4 * error):
                    break
        return curve

    def _recover(self, scores: ChannelScores, held_out: HeldOut) -> list[RecoveredTrigger]:
        """Triggers of the target that work; none if no label has one."""
        images = CleanData(held_out.clean.images)
        target = scores.details.get("target")
        if target is None:
            labels = self.search.recover(
                held_out.model, images, seed=self.seed, progress=held_out.progress
            )
            target = TargetEvidence.of(labels, self.min_success).target
        if target is None:
            return []
        found = [
            self.inversion.recover(
                held_out.model, images, [target], seed=seed, progress=held_out.progress
            )[0]
            for seed in range(self.seed, self.seed + self.triggers)
        ]
        return [trigger for trigger in found if trigger.success >= self.min_success]

    def within_budget(self, curve: Sequence[Point]) -> Sequence[Point]:
        """The points of a trace that accuracy allows; at least that of nothing silenced."""
        smooth = isotonic(point.drop for point in curve)
        return [
            point for point, drop in zip(curve, smooth, strict=True) if drop <= self.max_drop
        ] or curve[:1]

    def _decide(
        self, scores: ChannelScores, curve: Sequence[Point], found: Sequence[RecoveredTrigger]
    ) -> Selection:
        best = min(
            self.within_budget(curve),
            key=lambda point: max(point.success or 0.0, self.max_success),  # any less is as good
        )
        what, left = f"recovered triggers of label {found[0].target}", best.success or 0.0
        if left <= self.max_success:
            reason = f"{what} succeed on <= {self.max_success:.0%} of held-out images"
        else:
            reason = (
                f"{what} still succeed on {left:.0%} of held-out images; no amount "
                f"up to {self.max_fraction:.0%} of the neurons does better within "
                f"{self.max_drop:.1%} of clean accuracy"
            )
        chosen = lowest(scores, best.neurons, reason, target=found[0].target)
        return replace(chosen, curve=tuple(curve), triggers=tuple(found))
