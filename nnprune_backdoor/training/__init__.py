"""Train a network after its neurons were silenced: distilling, fine-tuning, repair."""

from .distillation import Distillation, distil
from .fine_tuning import FineTuning, fine_tune
from .repair import TriggerUnlearning, unlearn_triggers

__all__ = [
    "Distillation",
    "FineTuning",
    "TriggerUnlearning",
    "distil",
    "fine_tune",
    "unlearn_triggers",
]
