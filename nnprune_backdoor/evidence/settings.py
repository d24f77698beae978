"""Settings of a scan, and what it sends through a network by them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..core.passes import Task, Work
from ..criteria.parts.unlearning import Unlearning
from ..triggers.inversion import Inversion
from ..triggers.perturbation import UniversalPerturbation
from .exposure import UNLEARNING
from .restoration import Restoration


@dataclass(frozen=True, kw_only=True)
class ScanSettings:
    """Settings of a scan.

    The reference distribution of benign networks was measured with these defaults on 300 images of
    32 x 32 pixels. On images of more than 64 x 64 pixels universal perturbations and relative sizes
    are reported and raise no alarm; relative sizes also need a trigger for every label, and at
    least ten labels.

    Attributes:
        search: How a trigger is recovered for each label.
        universal: How a universal perturbation is recovered for each label.
        starts: Independent searches for universal perturbations, whose mean success counts.
        again_from: Success of the first search from which a label is searched again.
        min_success: Minimum success rate of a recovered trigger on held-out images; triggers below
            it are ignored.
        many: Number of classes beyond which triggers are sought for `candidates` labels only.
        candidates: Number of labels with the best universal perturbations that are then searched.
        screened: Number of classes beyond which universal perturbations are sought only for as
            many labels, the best of a quick search.
        screen: That quick search.
        screen_images: Images for it.
        unlearning: How the model is exposed; None: the default of `expose`.
    """

    search: Inversion = Inversion(steps=150, batch_size=16)
    universal: UniversalPerturbation = UniversalPerturbation()
    starts: int = 3
    again_from: float = 0.5
    min_success: float = 0.75
    many: int = 20
    candidates: int = 10
    screened: int = 40
    screen: UniversalPerturbation = UniversalPerturbation(steps=20, batch_size=4, held_out=0.5)
    screen_images: int = 40
    unlearning: Unlearning | None = None

    def passes(self, task: Task, labels: int | None = None) -> dict[str, Work]:
        """What each stage sends through the network, where half of the labels are searched again.

        Args:
            labels: how many were asked for; None: every one.
        """
        unlearning = self.unlearning or UNLEARNING
        stages: dict[str, Work] = {
            "exposure": (*unlearning.passes(task), task.forward(3 * task.images))
        }
        likely = task.classes if labels is None else labels
        if labels is None and task.classes > self.screened:
            quick = task.part(min(self.screen_images, task.images))
            stages["screening"] = self.screen.passes(quick, likely)
            likely = self.screened
        again = min(self.candidates, math.ceil(likely / 2))
        more = self.universal.passes(task, again) * (self.starts - 1)
        stages["universal"] = (*self.universal.passes(task, likely), *more)
        if labels is None and task.classes > self.many:
            likely = min(likely, self.candidates)
        stages["triggers"] = self.search.passes(task, likely)
        stages["restoration"] = Restoration.passes(task, likely)
        return stages

    def passes_of_remaining(self, task: Task) -> Work:
        """What `Scan.remaining` sends through the network, where the label is still suspect."""
        universal = self.universal.passes(task, 1) * self.starts
        return (*self.search.passes(task, 1), *Restoration.passes(task, 1), *universal)
