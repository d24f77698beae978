"""Purify backdoored image classifiers by pruning, with clean images alone."""

from .architecture import load_model
from .checkpoint import Weights, load_weights
from .criteria import (
    ANP,
    CNP,
    MNP,
    RNP,
    TAC,
    Criterion,
    MagnitudeSaliency,
    create_criterion,
    list_criteria,
    magnitude_saliency_correlation,
    register_criterion,
)
from .data import CleanData
from .errors import (
    CheckpointError,
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
from .record_file import read_record
from .removal import RemovalPlan, RemovalReport, compact, plan_removal
from .saving import load_purified, save_purified
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
    "CNP",
    "MNP",
    "RNP",
    "TAC",
    "AccuracyBudget",
    "BelowThreshold",
    "ChannelScores",
    "CheckpointError",
    "CleanData",
    "Criterion",
    "Cut",
    "DataError",
    "Inversion",
    "LowestCount",
    "LowestFraction",
    "MagnitudeSaliency",
    "MaskedModel",
    "Neuron",
    "Outlier",
    "PairedAccuracy",
    "PixelRange",
    "Purified",
    "PurifyError",
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
    "Weights",
    "compact",
    "create_criterion",
    "create_selector",
    "find_sites",
    "list_criteria",
    "list_selectors",
    "load_model",
    "load_purified",
    "load_weights",
    "magnitude_saliency_correlation",
    "plan_removal",
    "purify",
    "read_record",
    "recalibrate_norms_",
    "register_criterion",
    "register_selector",
    "save_purified",
    "silence_",
]
