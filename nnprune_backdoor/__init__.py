"""Purify backdoored image classifiers by pruning, with clean images alone."""

from .criteria import (
    ANP,
    BNP,
    CLP,
    CNP,
    FP,
    MNP,
    RNP,
    TAC,
    Criterion,
    Magnitude,
    MagnitudeSaliency,
    Random,
    create_criterion,
    list_criteria,
    magnitude_saliency_correlation,
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
from .finetuning import fine_tune
from .inversion import Inversion, PixelRange, RecoveredTrigger, TargetEvidence
from .masking import MaskedModel, silence_
from .norms import recalibrate_norms_
from .purify import PairedAccuracy, Purified, purify
from .recipe import Cut, Recipe
from .removal import RemovalPlan, RemovalReport, compact, plan_removal
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
from .trigger_selection import TriggerGone

__version__ = "0.1.0"

__all__ = [
    "ANP",
    "BNP",
    "CLP",
    "CNP",
    "FP",
    "MNP",
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
    "Magnitude",
    "MagnitudeSaliency",
    "MaskedModel",
    "Neuron",
    "Outlier",
    "PairedAccuracy",
    "PixelRange",
    "Purified",
    "PurifyError",
    "Random",
    "Recipe",
    "RecoveredTrigger",
    "RemovalPlan",
    "RemovalReport",
    "ScoringError",
    "Selection",
    "Selector",
    "Site",
    "TargetEvidence",
    "TriggerGone",
    "UnknownNameError",
    "UnsupportedModelError",
    "compact",
    "create_criterion",
    "create_selector",
    "find_sites",
    "fine_tune",
    "list_criteria",
    "list_selectors",
    "magnitude_saliency_correlation",
    "plan_removal",
    "purify",
    "recalibrate_norms_",
    "register_criterion",
    "register_selector",
    "silence_",
]
