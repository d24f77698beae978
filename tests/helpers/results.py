"""Results made up of given numbers, without a search."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nnprune_backdoor import Diagnosis
from nnprune_backdoor.core.recovered import PixelRange, RecoveredTrigger
from nnprune_backdoor.evidence import Suspicion
from nnprune_backdoor.triggers import RecoveredPerturbation

PIXELS = PixelRange(torch.zeros(3, 1, 1), torch.ones(3, 1, 1))


def trigger(target: int = 1) -> RecoveredTrigger:
    """A patch of 3 x 3 in the corner."""
    mask = torch.zeros(1, 32, 32)
    mask[:, :3, :3] = 1
    return RecoveredTrigger(target, mask, torch.ones(3, 32, 32), 0.9, 12, 100)


def suspicion(
    alarm: bool, label: int = 1, *, universal: float = 0.9, size: float = 0.1
) -> Suspicion:
    """Of a label with probability .86, or .23 where there is no alarm."""
    restored = 0.9 if alarm else 0.1
    return Suspicion.of(label, universal=universal, size=size, restored=restored)


def diagnosis(alarm: bool, *, cannot_tell: str | None = None, **others: Any) -> Diagnosis:
    """With one suspicion; `others` are other fields."""
    given: dict[str, Any] = {
        "suspicions": (suspicion(alarm),),
        "triggers": (trigger(),),
        "perturbations": (RecoveredPerturbation(1, torch.full((3, 32, 32), 0.1), PIXELS, 0.9, 12),),
        "sha256": {"weights": "a" * 64, "images": "b" * 64},
        "date": "2026-01-02T03:04:05Z",
        "seconds": {"universal": 1.5},
        **others,
    }
    return Diagnosis(
        cannot_tell=cannot_tell,
        classes=10,
        images=30,
        seed=0,
        restored=None,
        model=nn.Identity(),
        example=torch.zeros(3, 32, 32),
        pixels=PIXELS,
        **given,
    )
