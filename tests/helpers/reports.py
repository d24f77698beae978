"""Purifications made up of a planned ranking, a planned choice and planned evidence."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import nn

from nnprune_backdoor import CleanData, Criterion, Purified, Selector, purify
from nnprune_backdoor.core.held_out import HeldOut
from nnprune_backdoor.core.recovered import RecoveredTrigger
from nnprune_backdoor.core.scores import ChannelScores, Point, Selection, lowest
from nnprune_backdoor.core.sites import Site
from nnprune_backdoor.evidence import Suspicion
from nnprune_backdoor.reports.sections import spans


def corner(target: int = 0, channels: int = 3) -> RecoveredTrigger:
    """A bright patch of 3 x 3 in the corner."""
    mask = torch.zeros(1, 32, 32)
    mask[:, :3, :3] = 1
    return RecoveredTrigger(target, mask, torch.full((channels, 32, 32), 2.0), 0.9, 12, 100)


@dataclass(frozen=True, kw_only=True)
class Planned(Criterion):
    """Any order, one trigger, and details that JSON does not hold by itself."""

    reference: ClassVar[str] = "nobody, nowhere"
    needs_labels: ClassVar[bool] = False
    strength: float = math.inf
    stamp: Any = spans

    @classmethod
    def paper(cls) -> Self:
        return cls()

    def score(
        self,
        model: nn.Module,
        clean: CleanData,
        sites: tuple[Site, ...],
        generator: torch.Generator,
        progress: bool,
    ) -> ChannelScores:
        flat = torch.rand(sum(site.channels for site in sites), generator=generator)
        details = {"loss": math.nan, "counts": torch.tensor([1, 2]), 7: (None, True)}
        trigger = corner(channels=clean.images.shape[1])
        return ChannelScores(sites, flat, "planned", details, (trigger,))


CURVE = (Point(0, 0.0, 0.99), Point(3, -0.01, 0.5), Point(9, 0.015, 0.04), Point(20, 0.2, 0.0))


@dataclass(frozen=True)
class Tried(Selector):
    """Nine neurons, with a curve and a trigger to show for it."""

    def __call__(self, scores: ChannelScores, held_out: HeldOut | None = None) -> Selection:
        chosen = lowest(scores, 9, "because <nine> | is enough", target=1)
        return replace(chosen, curve=CURVE, triggers=(corner(1),))


def run(model: nn.Module, clean: Any, selector: Selector, **settings: Any) -> Purified:
    return purify(model, clean, Planned(), selector=selector, progress=False, **settings)


def looked(purified: Purified, alarm: bool, after: dict[str, Any] | None) -> Purified:
    """As the selector `auto` leaves it."""
    first = Suspicion.of(1, universal=0.95, size=0.05, restored=0.75 if alarm else 0.0)
    diagnosis = {
        "alarm": alarm, "target": 1 if alarm else None, "classes": 10, "images": 300, "seed": 0,
        "probability": first.probability, "cannot_tell": None, "perturbations": [{}] * 10,
        "triggers": [{}] * 5, "restoration": None, "seconds": {},
        "suspicions": [first.to_dict()],
    }  # fmt: skip
    details = {"diagnosis": diagnosis, "remaining": [] if after is None else [after]}
    return replace(purified, selection=replace(purified.selection, details=details))


AFTER = {"neurons": 9, "alarm": False, "success": 0.0, "restoration": 0.125, "probability": 0.25}
