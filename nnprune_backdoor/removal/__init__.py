"""Remove silent neurons from the tensors where that changes nothing."""

from .compaction import compact
from .recipe import Cut, Recipe
from .report import RemovalReport

__all__ = [
    "Cut",
    "Recipe",
    "RemovalReport",
    "compact",
]
