"""Purify backdoored image classifiers by pruning, with clean images alone."""

from .auto import Auto
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
from .diagnosis import Diagnosis
from .errors import (
    DataError,
    PurifyError,
    ScoringError,
    UnknownNameError,
    UnsupportedModelError,
)
from .evidence import Evidence
from .exposure import Exposed, Unlearning, expose
from .finetuning import fine_tune
from .inversion import Inversion, PixelRange, RecoveredTrigger, TargetEvidence
from .masking import MaskedModel, silence_
from .norms import recalibrate_norms_
from .purify import PairedAccuracy, Purified, purify
from .recipe import Cut, Recipe
from .removal import RemovalPlan, RemovalReport, compact, plan_removal
from .restoration import Restoration, Restored
from .scanning import Scan, scan
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
from .universal import RecoveredPerturbation, UniversalPerturbation

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
    "Auto",
    "BelowThreshold",
    "ChannelScores",
    "CleanData",
    "Criterion",
    "Cut",
    "DataError",
    "Diagnosis",
    "Evidence",
    "Exposed",
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
    "RecoveredPerturbation",
    "RecoveredTrigger",
    "RemovalPlan",
    "RemovalReport",
    "Restoration",
    "Restored",
    "Scan",
    "ScoringError",
    "Selection",
    "Selector",
    "Site",
    "TargetEvidence",
    "TriggerGone",
    "UniversalPerturbation",
    "UnknownNameError",
    "Unlearning",
    "UnsupportedModelError",
    "compact",
    "create_criterion",
    "create_selector",
    "expose",
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
    "scan",
    "silence_",
]
