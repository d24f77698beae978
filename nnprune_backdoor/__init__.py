"""Purify backdoored image classifiers by pruning, with clean images alone."""

from .criteria import (
    ANP,
    CNP,
    RNP,
    TAC,
    Criterion,
    create_criterion,
    list_criteria,
    register_criterion,
)
from .data import CleanData
from .errors import (
    DataError,
    PurifyError,
    ScoringError,
    UnknownNameError,
    UnsupportedModelError,
)
from .inversion import Inversion, PixelRange, RecoveredTrigger, TargetEvidence
from .masking import MaskedModel, silence_
from .norms import recalibrate_norms_
from .purify import PairedAccuracy, Purified, purify
from .recipe import Cut, Recipe
from .removal import RemovalReport, compact
from .scores import ChannelScores, Neuron, Selection, Site
from .selection import (
    AccuracyBudget,
    BelowThreshold,
    LowestCount,
    LowestFraction,
    Outlier,
    Selector,
    create_selector,
    list_selectors,
    register_selector,
)
from .sites import find_sites

__version__ = "0.1.0"

__all__ = [
    "ANP",
    "CNP",
    "RNP",
    "TAC",
    "AccuracyBudget",
    "BelowThreshold",
    "ChannelScores",
    "CleanData",
    "Criterion",
    "Cut",
    "DataError",
    "Inversion",
    "LowestCount",
    "LowestFraction",
    "MaskedModel",
    "Neuron",
    "Outlier",
    "PairedAccuracy",
    "PixelRange",
    "Purified",
    "PurifyError",
    "Recipe",
    "RecoveredTrigger",
    "RemovalReport",
    "ScoringError",
    "Selection",
    "Selector",
    "Site",
    "TargetEvidence",
    "UnknownNameError",
    "UnsupportedModelError",
    "compact",
    "create_criterion",
    "create_selector",
    "find_sites",
    "list_criteria",
    "list_selectors",
    "purify",
    "recalibrate_norms_",
    "register_criterion",
    "register_selector",
    "silence_",
]
