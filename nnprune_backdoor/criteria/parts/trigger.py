"""What criteria share that look at the model through a recovered trigger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core.data import CleanData
from ...core.passes import Task, Work
from ...core.recovered import PixelRange, RecoveredTrigger
from ...errors import DataError, ScoringError
from ...triggers.inversion import Inversion, TargetEvidence
from ...utils.randomness import as_integer
from ...utils.settings import check_settings
from ..base import Criterion


@dataclass(frozen=True, kw_only=True)
class TriggerCriterion(Criterion):
    """A criterion that first finds the target and recovers its trigger, from clean images alone.

    Attributes:
        target: The attacker's label; None: the label of the smallest trigger.
        mean: Of the normalisation, one a channel; None: the valid range of pixels is the one seen
            in the clean images.
        std: Of the normalisation, as `mean`.
        search_steps: Inversion steps for each label, to find the target.
        search_batch: Images a step in that search.
        steps: Inversion steps for the target.
        batch_size: Images a step of the inversion.
        min_success: Minimum success rate of a recovered trigger on held-out images; triggers below
            it are ignored.
    """

    target: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    search_steps: int = 150
    search_batch: int = 16
    steps: int = 200
    batch_size: int = 32
    min_success: float = 0.75

    def __post_init__(self) -> None:
        check_settings(self, positive=("search_batch", "batch_size"))
        if (self.mean is None) != (self.std is None):
            raise DataError("expected both mean and std of the normalisation, or neither")

    @property
    def recovers_triggers(self) -> bool:
        return True

    @property
    def pixels(self) -> PixelRange | None:
        """Values of valid pixels, if the normalisation was given."""
        if self.mean is None or self.std is None:
            return None
        return PixelRange.normalised(self.mean, self.std)

    def recovery(self, task: Task) -> Work:
        """What finding the target and recovering its trigger sends through the network."""
        inversion = Inversion(steps=self.steps, batch_size=self.batch_size)
        search = Inversion(steps=self.search_steps, batch_size=self.search_batch)
        labels = task.classes if self.target is None else 0
        return (*search.passes(task, labels), *inversion.passes(task, 1))

    def recover(
        self, model: nn.Module, clean: CleanData, generator: torch.Generator, progress: bool
    ) -> tuple[RecoveredTrigger, dict[str, Any]]:
        """The target's trigger, and how it was found.

        Raises:
            ScoringError: no trigger works on `min_success` of the held-out images.
        """
        seeds = torch.randint(2**31, (2,), generator=generator).tolist()
        target = None if self.target is None else as_integer(self.target, "target")
        details: dict[str, Any] = {}
        if target is None:
            target, details = self.find_target(model, clean, seeds[0], progress)
        trigger = self.invert(model, clean, target, seeds[1], progress)
        if trigger.success < self.min_success or trigger.tested == 0:
            raise ScoringError(
                f"the trigger recovered for label {target} sends {trigger.success:.0%} of "
                f"{trigger.tested} held-out images there, min_success is {self.min_success:.0%}; "
                "give more steps or images of other classes"
            )
        details["target"] = target
        details["trigger"] = {
            "success": trigger.success,
            "tested": trigger.tested,
            "norm": trigger.norm,
            "steps": trigger.steps,
        }
        return trigger, details

    def find_target(
        self, model: nn.Module, clean: CleanData, seed: int, progress: bool
    ) -> tuple[int, dict[str, Any]]:
        """The label of the smallest trigger that works, and the evidence on all labels.

        Raises:
            ScoringError: no label has one.
        """
        return self.believed(self.search(model, clean, None, seed, progress))

    def search(
        self,
        model: nn.Module,
        clean: CleanData,
        labels: Sequence[int] | None,
        seed: int,
        progress: bool,
    ) -> TargetEvidence:
        """Short inversions of these labels; None: of every one."""
        inversion = Inversion(steps=self.search_steps, batch_size=self.search_batch)
        found = inversion.recover(
            model, clean, labels, pixels=self.pixels, seed=seed, progress=progress
        )
        return TargetEvidence.of(found, self.min_success)

    def believed(self, evidence: TargetEvidence) -> tuple[int, dict[str, Any]]:
        """The target that the evidence points to, and the evidence as plain data.

        Raises:
            ScoringError: no trigger works.
        """
        success = [trigger.success for trigger in evidence.triggers]
        if evidence.target is None:
            best = max(evidence.triggers, key=lambda trigger: trigger.success)
            raise ScoringError(
                f"no label has a trigger that works: the best one (label {best.target}) sends "
                f"{best.success:.0%} of {best.tested} held-out images there, min_success is "
                f"{self.min_success:.0%}; give more search_steps or images, or name the target"
            )
        sizes, anomaly = list(evidence.sizes), list(evidence.anomaly)
        found = {"sizes": sizes, "success": success, "anomaly": anomaly}
        return evidence.target, {"search": found}

    def invert(
        self, model: nn.Module, clean: CleanData, target: int, seed: int, progress: bool
    ) -> RecoveredTrigger:
        """The smallest trigger for `target` that works, or the most successful one."""
        inversion = Inversion(steps=self.steps, batch_size=self.batch_size)
        (trigger,) = inversion.recover(
            model, clean, [target], pixels=self.pixels, seed=seed, progress=progress
        )
        return trigger
