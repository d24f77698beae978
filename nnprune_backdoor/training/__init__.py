"""Train a network after its neurons were silenced: fine-tuning, repair."""

from .fine_tuning import fine_tune
from .repair import unlearn_triggers

__all__ = [
    "fine_tune",
    "unlearn_triggers",
]
