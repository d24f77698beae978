"""Recover triggers of the labels to which a small perturbation sends almost every image.

In docs/results/distilling.md the target of nearly every backdoor is such a label, and so are some
labels of benign networks. The targets of clean-label attacks are not. They are suspected for
another reason: moved one by one, hardly any image reaches them, but one larger perturbation sends
almost all images there. No verdict rests on either reason. A network that is trained to ignore such
triggers loses a short cut, be it a backdoor's or its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import nn

from ..core.data import CleanData
from ..core.passes import Task, Work
from ..core.prepared import Prepared
from ..core.recovered import PixelRange, RecoveredTrigger
from ..errors import DataError
from .blend import UniversalBlend
from .individual import IndividualPerturbations
from .inversion import Inversion
from .perturbation import RecoveredPerturbation, UniversalPerturbation

_MOVED = 128  # images that are moved by themselves to each label
_HALVINGS = 4  # of all radii, at most
SuspectTrigger = RecoveredPerturbation | RecoveredTrigger


@dataclass(frozen=True, kw_only=True)
class SuspectLabels:
    """How they are told and their triggers recovered. Ours; the searches are told in their classes.

    Attributes:
        labels: Largest number of labels that are suspected.
        tried: Largest number of labels that are tried; drawn at random where there are more.
        suspicious: Success of a perturbation from which on its label is suspected.
        working: Success from which on a suspected label's perturbation still works.
        glance: The search that tells which labels are easiest; with half its radius, too.
        perturbations: The search for perturbations of the easiest labels.
        patches: The search for patches of the suspected labels; shorter than where one is to be
            shown.
        blends: The search for pictures that show through, of the suspected labels.
        single: How single images are moved, to tell which labels are far from them.
        sensitive: If this share of the images or more can be moved to the median label, one by one,
            all radii are halved.
        far: A label is far if a smaller share of the images can be moved to it, one by one.
        larger: The search for perturbations of labels that are far.
        outlying: A suspected label stands out if it is not far and images can be moved to it, one
            by one, this many times as often as to any label that is not suspected.
    """

    labels: int = 2
    tried: int = 16
    suspicious: float = 0.9
    working: float = 0.5
    glance: UniversalPerturbation = UniversalPerturbation(steps=20)
    perturbations: UniversalPerturbation = UniversalPerturbation()
    patches: Inversion = Inversion(steps=100, batch_size=16)
    blends: UniversalBlend = UniversalBlend()
    single: IndividualPerturbations = IndividualPerturbations(rms=2 / 255)
    sensitive: float = 0.25
    far: float = 0.1
    larger: UniversalPerturbation = UniversalPerturbation(rms=12 / 255, steps=40)
    outlying: float = 1.25

    def __post_init__(self) -> None:
        if not 1 <= self.labels <= self.tried:
            raise DataError(f"expected 1 <= labels <= tried, got {self.labels} and {self.tried}")
        if not 0 <= self.working <= self.suspicious <= 1:
            raise DataError(
                "expected 0 <= working <= suspicious <= 1, "
                f"got {self.working:g} and {self.suspicious:g}"
            )
        if not 0 <= self.far <= 1 or not 0 < self.sensitive <= 1:
            raise DataError(
                "expected far in [0, 1] and sensitive in (0, 1], "
                f"got {self.far:g} and {self.sensitive:g}"
            )
        if self.outlying < 1:
            raise DataError(f"expected outlying of at least 1, got {self.outlying:g}")

    def passes(self, task: Task) -> Work:
        """What `scale` and `suspect` send through it: one label is suspect, half of them far."""
        tried = min(self.tried, task.classes)
        easiest = min(self.labels, tried)
        moved = tried * min(_MOVED, task.images)
        return (
            *self.glance.passes(task, tried) * 2,
            *self.perturbations.passes(task, easiest),
            *self.single.passes(task, min(_MOVED, task.images), 2 * moved),
            *self.larger.passes(task, tried // 2),
            *self.patches.passes(task, 1),
            *self.blends.passes(task, 1),
        )

    def passes_again(self, task: Task) -> Work:
        """What `still_working` and `standing_out` do of that label, where a blend works alone."""
        some = min(_MOVED, task.images)
        moved = min(self.tried, task.classes) * some
        return (
            *self.perturbations.passes(task, 1),
            *self.blends.passes(task, 1),
            *self.single.passes(task, some, moved),
        )

    def scaled(self, factor: float) -> Self:
        """The same with all radii, and the opacity of blends, multiplied by a factor."""
        searches = {name: getattr(self, name) for name in ("glance", "perturbations", "larger")}
        return replace(
            self,
            single=replace(self.single, rms=factor * self.single.rms),
            blends=replace(self.blends, opacity=factor * self.blends.opacity),
            **{name: replace(one, rms=factor * one.rms) for name, one in searches.items()},
        )

    def scale(self, model: nn.Module, clean: CleanData, *, seed: int = 0) -> float:
        """The factor for all radii that suits the network: 1, 1/2, 1/4, 1/8 or 1/16.

        Where most labels are reached by many single images, a perturbation of that size is not
        small for the network, and training against it costs accuracy.

        Args:
            model, clean, seed: as for `suspect`.

        Raises:
            DataError, UnsupportedModelError: see `Prepared.of`.
        """
        prepared = Prepared.of(model, clean, labels="ignored").moved()
        labels = self._tried(prepared.classes, seed)
        factor = 1.0
        for _ in range(_HALVINGS):
            reached = self.scaled(factor)._reached(prepared, labels, seed)
            if statistics.median(reached.values()) < self.sensitive:
                break
            factor /= 2
        return factor

    def suspect(
        self, model: nn.Module, clean: CleanData, *, seed: int = 0
    ) -> tuple[SuspectTrigger, ...]:
        """A perturbation, a patch and a blend for each suspected label; empty where none is.

        Args:
            model: a classifier; it is left as it was.
            clean: clean images, normalised as the model expects. Labels are not looked at.
            seed: of the labels that are tried, and of the searches.

        Raises:
            DataError, UnsupportedModelError, ScoringError: see `Inversion.recover`.
        """
        prepared = Prepared.of(model, clean, labels="ignored").moved()
        model, clean = prepared.model, prepared.clean
        tried = self._tried(prepared.classes, seed)
        easiest = self._easiest(model, clean, tried, seed)
        near = self.perturbations.recover(model, clean, easiest, seed=seed)
        kept = self._working(near, self.suspicious)
        rest = sorted({*tried} - {one.target for one in kept})
        reached = self._reached(prepared, rest, seed)
        far = [label for label in rest if reached[label] < self.far]
        if far:
            larger = self.larger.recover(model, clean, far, seed=seed)
            kept += self._working(larger, self.suspicious)[: self.labels]
        return self._with_others(kept, [one.target for one in kept], model, clean, seed)

    def far_among(self, triggers: Iterable[SuspectTrigger]) -> tuple[int, ...]:
        """The labels that are far from single images, among those of what `suspect` returned."""
        # only the search for far labels may give larger ones; a hundredth for rounding
        most = 1.01 * self.perturbations.rms
        found = (one for one in triggers if isinstance(one, RecoveredPerturbation))
        return tuple(sorted({one.target for one in found if one.rms > most}))

    def still_working(
        self, model: nn.Module, clean: CleanData, labels: Iterable[int], *, seed: int = 0
    ) -> tuple[SuspectTrigger, ...]:
        """The same for those of these labels that a perturbation, or a blend, still reaches.

        Args:
            model, clean, seed: as for `suspect`.
            labels: classes of the model.

        Raises:
            DataError, UnsupportedModelError, ScoringError: see `Inversion.recover`.
        """
        asked = sorted(set(labels))
        found = self.perturbations.recover(model, clean, asked, seed=seed)
        kept = self._working(found, self.working)
        return self._with_others(kept, asked, model, clean, seed)

    def _tried(self, classes: int, seed: int) -> list[int]:
        order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed), device="cpu")
        tried: list[int] = order[: self.tried].tolist()
        return tried

    def _reached(self, prepared: Prepared, labels: list[int], seed: int) -> dict[int, float]:
        """Label -> the share of some images that go there, each moved by itself."""
        clean = prepared.clean
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(clean), generator=generator, device="cpu")
        some = clean.images[drawn[:_MOVED]]  # in their order the first may be of one class
        pixels = PixelRange.seen_in(clean.images)
        return self.single.reach(prepared.model, some, labels, pixels, seed=seed)

    def _easiest(
        self, model: nn.Module, clean: CleanData, tried: list[int], seed: int
    ) -> list[int]:
        """Half the radius is looked at too: with the whole one, every label may be easy."""
        success = dict.fromkeys(tried, 0.0)
        for search in (self.glance, replace(self.glance, rms=self.glance.rms / 2)):
            for one in search.recover(model, clean, tried, seed=seed):
                success[one.target] += one.success
        return sorted(tried, key=lambda label: -success[label])[: self.labels]

    def standing_out(
        self, model: nn.Module, clean: CleanData, labels: Iterable[int], *, seed: int = 0
    ) -> tuple[int, ...]:
        """Those of these labels to which the model lets single images go most easily.

        After training against triggers that are the same for all images, a label that still stands
        out may have a trigger that differs from image to image, or one that is larger. Empty where
        every class is among the labels.

        Args:
            model, clean, seed: as for `suspect`.
            labels: classes of the model.

        Raises:
            DataError, UnsupportedModelError: see `Prepared.of`.
        """
        prepared = Prepared.of(model, clean, labels="ignored").moved()
        asked = sorted(set(labels))
        others = [label for label in self._tried(prepared.classes, seed) if label not in asked]
        if not asked or not others:
            return ()
        reached = self._reached(prepared, [*asked, *others], seed)
        least = max(self.outlying * max(reached[label] for label in others), self.far)
        return tuple(label for label in asked if reached[label] >= least)

    def _working(
        self, found: Iterable[RecoveredPerturbation], least: float
    ) -> list[RecoveredPerturbation]:
        """Those that succeed so often, the best ones first."""
        best = sorted(found, key=lambda one: -one.success)
        return [one for one in best if one.success >= least]

    def _with_others(
        self,
        kept: list[RecoveredPerturbation],
        labels: list[int],
        model: nn.Module,
        clean: CleanData,
        seed: int,
    ) -> tuple[SuspectTrigger, ...]:
        """With a patch for each that is kept, and the blends of these labels that work."""
        patches: tuple[RecoveredTrigger, ...] = ()
        if kept:
            targets = [one.target for one in kept]
            patches = self.patches.recover(model, clean, targets, seed=seed)
        blends: tuple[RecoveredTrigger, ...] = ()
        if labels:
            blends = self.blends.recover(model, clean, labels, seed=seed)
        return (*kept, *patches, *(one for one in blends if one.success >= self.working))
