"""Recover triggers from clean images: patches, additive perturbations, and blends."""

from .blend import UniversalBlend
from .individual import IndividualPerturbations
from .inversion import Inversion, TargetEvidence
from .perturbation import RecoveredPerturbation, UniversalPerturbation
from .suspects import SuspectLabels

__all__ = [
    "IndividualPerturbations",
    "Inversion",
    "RecoveredPerturbation",
    "SuspectLabels",
    "TargetEvidence",
    "UniversalBlend",
    "UniversalPerturbation",
]
