"""Chance: the baseline that every criterion must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import nn

from ..core.data import CleanData
from ..core.scores import ChannelScores
from ..core.sites import Site
from .base import Criterion, register_criterion


@register_criterion("random")
@dataclass(frozen=True, kw_only=True)
class Random(Criterion):
    """Independent uniform numbers in [0, 1): another seed, another ranking."""

    reference: ClassVar[str] = "no method: random scores (baseline)"
    needs_labels: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False
    cost: ClassVar[str] = "nothing"

    @classmethod
    def paper(cls) -> Self:
        """No paper, no settings."""
        return cls()

    def score(
        self,
        model: nn.Module,
        clean: CleanData,
        sites: tuple[Site, ...],
        generator: torch.Generator,
        progress: bool,
    ) -> ChannelScores:
        """Draw."""
        flat = torch.rand(sum(site.channels for site in sites), generator=generator)
        return ChannelScores(sites, flat, repr(self))
