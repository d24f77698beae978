"""Small weights first: what compression does, and a baseline for what a criterion must beat.

Li, Kadav, Durdanovic, Samet and Graf, "Pruning Filters for Efficient ConvNets", ICLR 2017,
https://arxiv.org/abs/1608.08710, remove the filters of smallest L1 norm; later practice, and
Torch-Pruning's default, take the L2 norm and divide it by the mean of the layer. It knows nothing
of backdoors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import nn

from ..core.data import CleanData
from ..core.scores import ChannelScores
from ..core.sites import Site
from .base import Criterion, register_criterion
from .parts.layers import gammas, kernels, relative


@register_criterion("magnitude")
@dataclass(frozen=True, kw_only=True)
class Magnitude(Criterion):
    """L2 norm of a channel's kernel times |gamma|, as a multiple of its layer's mean: low = small.

    The kernel is all weights of the site's producer that feed the channel, without its bias, or
    that read the head; gamma is the norm layer's, and 1 where there is none. Running variances do
    not enter.
    """

    reference: ClassVar[str] = "Li et al., Pruning Filters, ICLR 2017, by L2 norm (baseline)"
    needs_labels: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False
    cost: ClassVar[str] = "the weights alone, seconds"

    @classmethod
    def paper(cls) -> Self:
        """No settings. The paper takes the L1 norm, and each layer by itself."""
        return cls()

    def score(
        self,
        model: nn.Module,
        clean: CleanData,
        sites: tuple[Site, ...],
        generator: torch.Generator,
        progress: bool,
    ) -> ChannelScores:
        """Read the weights."""
        scores = [
            relative(kernels(model, site).flatten(1).norm(dim=1) * gammas(model, site)).cpu()
            for site in sites
        ]
        return ChannelScores(sites, torch.cat(scores).float(), repr(self))
