"""Train a network after its neurons were silenced: fine-tuning, repair."""

from .fine_tuning import FineTuning, fine_tune
from .repair import TriggerUnlearning, unlearn_triggers

__all__ = ["FineTuning", "TriggerUnlearning", "fine_tune", "unlearn_triggers"]
