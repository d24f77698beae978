"""Take silent neurons out of the tensors where that changes nothing."""

from .compaction import RemovalPlan, RemovalReport, compact, plan_removal
from .recipe import Cut, Recipe

__all__ = [
    "Cut",
    "Recipe",
    "RemovalPlan",
    "RemovalReport",
    "compact",
    "plan_removal",
]
