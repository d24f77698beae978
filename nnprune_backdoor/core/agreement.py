"""How alike two networks answer: what a repair is judged by, without labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.statistics import Rate
from .copies import eval_mode
from .predictions import predict_logits


@dataclass(frozen=True)
class Agreement:
    """How a student answers beside its teacher, on the same images.

    Attributes:
        same: Share of the images that get the teacher's label.
        divergence: Kullback-Leibler divergence of the student's probabilities from the teacher's,
            in nats, mean over the images; 0 where both answer alike.
    """

    same: Rate
    divergence: float

    @classmethod
    def of(cls, teacher: nn.Module, student: nn.Module, images: Tensor) -> Self:
        """Of two networks with the same classes on images (N, C, H, W), both in eval mode.

        Their modes come back.
        """
        with eval_mode(teacher), eval_mode(student):
            logits = [predict_logits(model, images) for model in (teacher, student)]
        wanted, given = (F.log_softmax(found, 1) for found in logits)
        same = int((wanted.argmax(1) == given.argmax(1)).sum())
        divergence = F.kl_div(given, wanted, reduction="batchmean", log_target=True).item()
        return cls(Rate(same, len(images)), max(0.0, divergence))

    def __str__(self) -> str:
        return f"{self.same.value:.1%} of {self.same.count} images get the given model's label"
