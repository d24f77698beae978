"""Remove silent neurons from the tensors where that changes nothing."""

from .compaction import RemovalReport, compact
from .recipe import Cut, Recipe

__all__ = [
    "Cut",
    "Recipe",
    "RemovalReport",
    "compact",
]
