"""Selectors: how many neurons of a ranking go. They see clean images only."""

from .accuracy import AccuracyBudget
from .amounts import BelowThreshold, LowestCount, LowestFraction, Outlier
from .auto import Auto
from .base import Selector, create_selector, list_selectors, register_selector
from .trigger import TriggerGone

__all__ = [
    "AccuracyBudget",
    "Auto",
    "BelowThreshold",
    "LowestCount",
    "LowestFraction",
    "Outlier",
    "Selector",
    "TriggerGone",
    "create_selector",
    "list_selectors",
    "register_selector",
]
