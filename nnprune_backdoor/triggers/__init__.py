"""Recover triggers from clean images: patches (`Inversion`) and additive perturbations."""

from .easiest import EasiestLabels
from .inversion import Inversion, TargetEvidence
from .perturbation import RecoveredPerturbation, UniversalPerturbation

__all__ = [
    "EasiestLabels",
    "Inversion",
    "RecoveredPerturbation",
    "TargetEvidence",
    "UniversalPerturbation",
]
