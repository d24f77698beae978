"""Purify backdoored image classifiers by pruning, with clean images alone."""

from .architecture import load_model
from .auto import Auto
from .checkpoint import Weights, load_weights
from .compute import Compute
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
    Random,
    create_criterion,
    list_criteria,
    register_criterion,
)
from .data import CleanData
from .diagnosis import Diagnosis
from .errors import (
    CheckpointError,
    DataError,
    PurifyError,
    ScoringError,
    UnknownNameError,
    UnsupportedModelError,
)
from .evidence import Evidence
from .exposure import Exposed, Unlearning, expose
from .finetuning import fine_tune
from .images import FolderImages, read_images
from .inversion import Inversion, PixelRange, RecoveredTrigger, TargetEvidence
from .masking import MaskedModel, silence_
from .preprocessing import Preprocessing
from .purify import Purified, purify
from .recipe import Cut, Recipe
from .record import Given, PairedAccuracy, ProxySuccess
from .record_file import read_record, read_report
from .relearning import Relearned, relearn
from .removal import RemovalPlan, RemovalReport, compact, plan_removal
from .repair import unlearn_triggers
from .report import Report
from .restoration import Restoration, Restored
from .saving import load_purified, save_purified
from .scan_pages import scan_to_html, scan_to_markdown
from .scanning import Scan, scan
from .scores import ChannelScores, Neuron, Point, Selection, Site
from .selection import (
    AccuracyBudget,
    BelowThreshold,
    HeldOut,
    LowestCount,
    LowestFraction,
    Outlier,
    Selector,
    amounts_to_try,
    create_selector,
    list_selectors,
    paired_drop,
    prefix,
    register_selector,
)
from .sites import find_sites
from .trigger_selection import TriggerGone
from .universal import RecoveredPerturbation, UniversalPerturbation
from .version import __version__

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
    "CheckpointError",
    "CleanData",
    "Compute",
    "Criterion",
    "Cut",
    "DataError",
    "Diagnosis",
    "Evidence",
    "Exposed",
    "FolderImages",
    "Given",
    "HeldOut",
    "Inversion",
    "LowestCount",
    "LowestFraction",
    "Magnitude",
    "MaskedModel",
    "Neuron",
    "Outlier",
    "PairedAccuracy",
    "PixelRange",
    "Point",
    "Preprocessing",
    "ProxySuccess",
    "Purified",
    "PurifyError",
    "Random",
    "Recipe",
    "RecoveredPerturbation",
    "RecoveredTrigger",
    "Relearned",
    "RemovalPlan",
    "RemovalReport",
    "Report",
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
    "Weights",
    "__version__",
    "amounts_to_try",
    "compact",
    "create_criterion",
    "create_selector",
    "expose",
    "find_sites",
    "fine_tune",
    "list_criteria",
    "list_selectors",
    "load_model",
    "load_purified",
    "load_weights",
    "paired_drop",
    "plan_removal",
    "prefix",
    "purify",
    "read_images",
    "read_record",
    "read_report",
    "register_criterion",
    "register_selector",
    "relearn",
    "save_purified",
    "scan",
    "scan_to_html",
    "scan_to_markdown",
    "silence_",
    "unlearn_triggers",
]
