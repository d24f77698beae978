"""Recover triggers from clean images: patches (`Inversion`) and additive perturbations."""

from .inversion import Inversion, TargetEvidence
from .perturbation import RecoveredPerturbation, UniversalPerturbation

__all__ = [
    "Inversion",
    "RecoveredPerturbation",
    "TargetEvidence",
    "UniversalPerturbation",
]
