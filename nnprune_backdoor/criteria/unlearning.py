"""What criteria share that unlearn the clean task first (`exposure.py`)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from ..exposure import Unlearning
from .base import Criterion


@dataclass(frozen=True, kw_only=True)
class UnlearningCriterion(Unlearning, Criterion):
    """A criterion whose fields named `unlearn_...` say how the clean task is unlearned."""

    @property
    @abstractmethod
    def weight_decay(self) -> float:
        """Of all weights while unlearning."""
