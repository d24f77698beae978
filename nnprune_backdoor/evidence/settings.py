"""Settings of a scan, and what it sends through a network by them."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.passes import Task, Work
from ..errors import DataError
from ..triggers.inversion import Inversion
from ..triggers.perturbation import UniversalPerturbation
from .restoration import Restoration


@dataclass(frozen=True, kw_only=True)
class ScanSettings:
    """Settings of a scan.

    The probability was calibrated with these defaults on 300 images of 32 x 32 pixels and ten
    classes (docs/results/diagnosis.md).

    Attributes:
        search: How a trigger is recovered for a label.
        universal: How a universal perturbation is recovered for a label.
        starts: Independent searches for the candidates' perturbations, whose mean success counts.
        min_success: Success of a recovered trigger on held-out images from which on its size
            counts; below it the label is taken to need the whole image.
        candidates: Labels whose perturbations succeed most; a trigger is recovered for each.
        compared: Other labels, from the easiest to the hardest, with whose triggers the
            candidates' are compared.
        screened: Number of classes beyond which perturbations are sought only for as many labels,
            the best of a quick search.
        screen: That quick search.
        screen_images: Images for it.
    """

    search: Inversion = Inversion(steps=150, batch_size=16)
    universal: UniversalPerturbation = UniversalPerturbation()
    starts: int = 3
    min_success: float = 0.75
    candidates: int = 2
    compared: int = 3
    screened: int = 10
    screen: UniversalPerturbation = UniversalPerturbation(steps=8, batch_size=4, held_out=0.5)
    screen_images: int = 40

    def __post_init__(self) -> None:
        if min(self.starts, self.candidates, self.compared) < 1 or self.screened < self.candidates:
            raise DataError(
                "expected starts, candidates and compared of at least 1 and screened of at least "
                f"candidates, got {self.starts}, {self.candidates}, {self.compared} and "
                f"{self.screened}"
            )

    def passes(self, task: Task, labels: int | None = None) -> dict[str, Work]:
        """What each stage sends through the network.

        Args:
            labels: how many were asked for; None: every one.
        """
        likely = task.classes if labels is None else labels
        stages: dict[str, Work] = {}
        if likely > self.screened:
            quick = task.part(min(self.screen_images, task.images))
            stages["screening"] = self.screen.passes(quick, likely)
            likely = self.screened
        candidates = min(self.candidates, likely)
        again = self.universal.passes(task, candidates) * (self.starts - 1)
        stages["universal"] = (*self.universal.passes(task, likely), *again)
        sought = min(candidates + self.compared, task.classes)
        stages["triggers"] = self.search.passes(task, sought)
        stages["restoration"] = Restoration.passes(task, candidates)
        return stages

    def passes_of_remaining(self, task: Task) -> Work:
        """What `Scan.remaining` sends through the network, where the label is still suspect."""
        universal = self.universal.passes(task, 1) * self.starts
        return (*self.search.passes(task, 1), *Restoration.passes(task, 1), *universal)
