"""Recover triggers of the labels that are easiest to reach, whatever they are.

Nothing is decided by them: a network that is trained to ignore them loses short cuts, whether they
are a backdoor's or its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..core.data import CleanData
from ..core.prepared import Prepared
from ..core.recovered import RecoveredTrigger
from ..errors import DataError
from .inversion import Inversion
from .perturbation import RecoveredPerturbation, UniversalPerturbation


@dataclass(frozen=True, kw_only=True)
class EasiestLabels:
    """How they are chosen and recovered. Ours; what the searches are is told in their classes.

    Attributes:
        labels: Number of labels that are kept.
        tried: Largest number of labels that are tried; drawn at random where there are more.
        glance: The search that tells which labels are easiest.
        perturbations: The search for perturbations of the labels that are kept.
        patches: The search for patches of the same labels; shorter than where one is to be shown.
    """

    labels: int = 2
    tried: int = 16
    glance: UniversalPerturbation = UniversalPerturbation(steps=20)
    perturbations: UniversalPerturbation = UniversalPerturbation()
    patches: Inversion = Inversion(steps=100, batch_size=16)

    def __post_init__(self) -> None:
        if not 1 <= self.labels <= self.tried:
            raise DataError(f"expected 1 <= labels <= tried, got {self.labels} and {self.tried}")

    def recover(
        self, model: nn.Module, clean: CleanData, *, seed: int = 0
    ) -> tuple[RecoveredPerturbation | RecoveredTrigger, ...]:
        """A perturbation and a patch for each label whose quick perturbation succeeds most.

        Args:
            model: a classifier; it is left as it was.
            clean: clean images, normalised as the model expects. Labels are not looked at.
            seed: of the labels that are tried, and of the searches.

        Raises:
            DataError, UnsupportedModelError, ScoringError: see `Inversion.recover`.
        """
        prepared = Prepared.of(model, clean, labels="ignored")
        model, clean = prepared.model, prepared.clean
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(prepared.classes, generator=generator, device="cpu")
        found = self.glance.recover(model, clean, order[: self.tried].tolist(), seed=seed)
        easiest = sorted(found, key=lambda one: -one.success)[: self.labels]
        labels = [one.target for one in easiest]
        return (
            *self.perturbations.recover(model, clean, labels, seed=seed),
            *self.patches.recover(model, clean, labels, seed=seed),
        )
