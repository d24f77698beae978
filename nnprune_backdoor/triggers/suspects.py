"""Recover triggers of the labels to which a small perturbation sends almost every image.

In docs/results/distilling.md the target of every backdoor is such a label, and so are some labels
of benign networks. No verdict rests on it: a network that is trained to ignore such triggers loses
a short cut, be it a backdoor's or its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..core.data import CleanData
from ..core.passes import Task, Work
from ..core.prepared import Prepared
from ..core.recovered import PixelRange, RecoveredTrigger
from ..errors import DataError
from .individual import IndividualPerturbations
from .inversion import Inversion
from .perturbation import RecoveredPerturbation, UniversalPerturbation

# of the labels that are compared: images moved to each, other labels, and radii that are tried
_MOVED, _COMPARED, _HALVINGS = 128, 8, 4
_RARE = 0.25  # a label that fewer images reach does not stand out
SuspectTrigger = RecoveredPerturbation | RecoveredTrigger


@dataclass(frozen=True, kw_only=True)
class SuspectLabels:
    """How they are told and their triggers recovered. Ours; the searches are told in their classes.

    Attributes:
        labels: Largest number of labels that are suspected.
        tried: Largest number of labels that are tried; drawn at random where there are more.
        suspicious: Success of a perturbation from which on its label is suspected.
        working: Success from which on a suspected label's perturbation still works.
        glance: The search that tells which labels are easiest.
        perturbations: The search for perturbations of the easiest labels.
        patches: The search for patches of the suspected labels; shorter than where one is to be
            shown.
        outlying: A suspected label stands out if single images are moved to it this many times as
            often as to any label that is not suspected.
        single: How they are moved for that.
    """

    labels: int = 2
    tried: int = 16
    suspicious: float = 0.9
    working: float = 0.5
    glance: UniversalPerturbation = UniversalPerturbation(steps=20)
    perturbations: UniversalPerturbation = UniversalPerturbation()
    patches: Inversion = Inversion(steps=100, batch_size=16)
    outlying: float = 1.25
    single: IndividualPerturbations = IndividualPerturbations(rms=2 / 255)

    def __post_init__(self) -> None:
        if not 1 <= self.labels <= self.tried:
            raise DataError(f"expected 1 <= labels <= tried, got {self.labels} and {self.tried}")
        if not 0 <= self.working <= self.suspicious <= 1:
            raise DataError(
                "expected 0 <= working <= suspicious <= 1, "
                f"got {self.working:g} and {self.suspicious:g}"
            )
        if self.outlying < 1:
            raise DataError(f"expected outlying of at least 1, got {self.outlying:g}")

    def passes(self, task: Task) -> Work:
        """What `suspect` sends through the network, where one label turns out to be suspect."""
        tried = min(self.tried, task.classes)
        easiest = min(self.labels, tried)
        return (
            *self.glance.passes(task, tried),
            *self.perturbations.passes(task, easiest),
            *self.patches.passes(task, 1),
        )

    def passes_again(self, task: Task) -> Work:
        """What `still_working` does of that label."""
        return (*self.perturbations.passes(task, 1), *self.patches.passes(task, 1))

    def passes_of_standing_out(self, task: Task) -> Work:
        """What `standing_out` does for that label, where the first radius tells."""
        labels = 1 + min(_COMPARED, task.classes - 1)
        some = min(_MOVED, task.images)
        moved = labels * some * (1 - 1 / task.classes)
        return (*self.single.passes(task, some, moved), task.forward(labels * some + moved))

    def suspect(
        self, model: nn.Module, clean: CleanData, *, seed: int = 0
    ) -> tuple[SuspectTrigger, ...]:
        """A perturbation and a patch for each label that is suspected; empty where none is.

        Args:
            model: a classifier; it is left as it was.
            clean: clean images, normalised as the model expects. Labels are not looked at.
            seed: of the labels that are tried, and of the searches.

        Raises:
            DataError, UnsupportedModelError, ScoringError: see `Inversion.recover`.
        """
        prepared = Prepared.of(model, clean, labels="ignored")
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(prepared.classes, generator=generator, device="cpu")
        tried = order[: self.tried].tolist()
        found = self.glance.recover(prepared.model, prepared.clean, tried, seed=seed)
        easiest = sorted(found, key=lambda one: -one.success)[: self.labels]
        labels = [one.target for one in easiest]
        return self._above(self.suspicious, prepared.model, prepared.clean, labels, seed)

    def still_working(
        self, model: nn.Module, clean: CleanData, labels: Iterable[int], *, seed: int = 0
    ) -> tuple[SuspectTrigger, ...]:
        """The same for those of these labels that a perturbation still reaches.

        Args:
            model, clean, seed: as for `suspect`.
            labels: classes of the model.

        Raises:
            DataError, UnsupportedModelError, ScoringError: see `Inversion.recover`.
        """
        return self._above(self.working, model, clean, list(labels), seed)

    def standing_out(
        self, model: nn.Module, clean: CleanData, labels: Iterable[int], *, seed: int = 0
    ) -> tuple[int, ...]:
        """Those of these labels to which the model lets single images go most easily.

        So it is with triggers that cover the image, those that differ from image to image among
        them; hardly with patches. Empty where every class is among the labels.

        Args:
            model, clean, seed: as for `suspect`.
            labels: classes of the model.

        Raises:
            DataError, UnsupportedModelError: see `Prepared.of`.
        """
        prepared = Prepared.of(model, clean, labels="ignored").moved()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(prepared.classes, generator=generator, device="cpu").tolist()
        asked = sorted(set(labels))
        others = [label for label in order if label not in asked][:_COMPARED]
        if not asked or not others:
            return ()
        drawn = torch.randperm(len(prepared.clean), generator=generator, device="cpu")
        some = prepared.clean.images[drawn[:_MOVED]]  # in their order the first may be of one class
        pixels = PixelRange.seen_in(prepared.clean.images)
        single = self.single
        for _ in range(_HALVINGS):
            reached = single.reach(prepared.model, some, (*asked, *others), pixels, seed=seed)
            most = max(reached[label] for label in others)
            if most <= 0.5:
                break
            single = replace(single, rms=single.rms / 2)  # so wide a ball would tell nothing
        least = max(self.outlying * most, _RARE)
        return tuple(label for label in asked if reached[label] >= least)

    def _above(
        self, least: float, model: nn.Module, clean: CleanData, labels: list[int], seed: int
    ) -> tuple[SuspectTrigger, ...]:
        found = self.perturbations.recover(model, clean, labels, seed=seed)
        kept = [one for one in found if one.success >= least]
        if not kept:
            return ()
        return (*kept, *self.patches.recover(model, clean, [one.target for one in kept], seed=seed))
