"""Channel Lipschitzness based Pruning (CLP).

Zheng, Tang, Li and Liu, "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022,
https://arxiv.org/abs/2208.03111. A channel that a small trigger can move must be steep. The
paper bounds its Lipschitz constant without an image: by the spectral norm of its kernel, reshaped
to (inputs, kernel positions), times |gamma| / sqrt(variance + eps) of the BatchNorm that follows.
A channel is pruned if its bound exceeds the mean of its layer by u standard deviations; u = 3.

Which norm follows which layer is seen in a forward pass, not guessed from the order in which they
were registered. A linear layer's channel has the norm of its row. Without a norm layer the factor
is 1; with Group- or InstanceNorm it is |gamma|, since what that divides by depends on the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..core.data import CleanData
from ..core.norms import keeps_statistics
from ..core.scores import ChannelScores
from ..core.sites import Site
from .base import Criterion, register_criterion
from .parts.layers import gammas, kernels, standardised


@register_criterion("clp")
@dataclass(frozen=True, kw_only=True)
class CLP(Criterion):
    """Minus the bound in standard deviations from its layer's mean: low = steep.

    The published rule for u = 3 is thus `BelowThreshold(-3)`, with `silencing="zero"` (the default
    of `purify`). `Outlier(3)` is its robust relative: median and MAD of all layers together, so it
    takes more where few wide layers with outliers of their own are all there is. Layers of ten
    channels or fewer have no outlier at u = 3 (see `standardised`).
    """

    reference: ClassVar[str] = "Zheng et al., Channel Lipschitzness, ECCV 2022 (baseline)"
    needs_labels: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False
    cost: ClassVar[str] = "the weights alone, seconds"

    @classmethod
    def paper(cls) -> Self:
        """The score has no settings; select by `BelowThreshold(-3)`.

        The authors' code leaves eps out and pairs a BatchNorm with the convolution registered
        before it, which is another one wherever the two orders differ.
        """
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
        scores = [-standardised(lipschitz_bounds(model, site)).cpu() for site in sites]
        return ChannelScores(sites, torch.cat(scores).float(), repr(self))


@torch.no_grad()
def lipschitz_bounds(model: nn.Module, site: Site) -> Tensor:
    """The paper's bound (channels,), float64, of each channel's Lipschitz constant.

    Of the site's own layer and norm, not of the whole network up to there.
    """
    spectral: Tensor = torch.linalg.matrix_norm(kernels(model, site), ord=2)
    steepness = spectral * gammas(model, site)
    norm: Any = model.get_submodule(site.name)
    if keeps_statistics(norm):
        steepness = steepness / (norm.running_var.double() + norm.eps).sqrt()
    return steepness
