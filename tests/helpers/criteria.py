"""Criteria for tests."""

from __future__ import annotations

import torch

from nnprune_backdoor import Criterion
from nnprune_backdoor.core.scores import ChannelScores


class Arbitrary(Criterion):
    """Any order, without a look at model or data."""

    reference = "none"
    needs_labels = False

    @classmethod
    def paper(cls) -> Arbitrary:
        return cls()

    def score(self, model, clean, sites, generator, progress):  # type: ignore[no-untyped-def]
        total = sum(site.channels for site in sites)
        return ChannelScores(sites, torch.rand(total, generator=generator), "arbitrary")
