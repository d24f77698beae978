"""BatchNorm statistics based Pruning (BNP).

Zheng, Tang, Li and Liu, "Pre-activation Distributions Expose Backdoor Neurons", NeurIPS 2022.
BatchNorm keeps the mean and variance of what the network was trained on, poisoned images included;
clean images have other ones where a neuron reacts to the trigger. Take both as Gaussians, and for
each channel the divergence KL(clean || running). A channel is pruned if its divergence exceeds the
mean of its layer by u standard deviations; u = 3.

Public reimplementations differ: one compares with the statistics of a poisoned batch, which no
defender has. (The paper's second method, EP, needs poisoned training images as well.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..core.data import CleanData
from ..core.norms import keeps_statistics
from ..core.passes import Task, Work
from ..core.scores import ChannelScores
from ..core.sites import Site
from .base import Criterion, register_criterion
from .parts.layers import standardised, watch


@register_criterion("bnp")
@dataclass(frozen=True, kw_only=True)
class BNP(Criterion):
    """Minus the divergence in standard deviations from its layer's mean: low = backdoor.

    The published rule for u = 3 is thus `BelowThreshold(-3)`, with `silencing="constant"`. Sites
    without BatchNorm say nothing and get 0, the score of an average neuron; BatchNorm that is not
    fed by a layer directly is no site. A model without any is refused.
    """

    reference: ClassVar[str] = "Zheng et al., Pre-activation Distributions, NeurIPS 2022 (baseline)"
    needs_labels: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    needs_batchnorm: ClassVar[bool] = True
    cost: ClassVar[str] = "one pass over the images"

    @classmethod
    def paper(cls) -> Self:
        """The score has no settings; select by `BelowThreshold(-3)`.

        The authors' code looks at one batch; here all clean images given count.
        """
        return cls()

    def passes(self, task: Task) -> Work:
        return (task.forward(task.images),)

    def score(
        self,
        model: nn.Module,
        clean: CleanData,
        sites: tuple[Site, ...],
        generator: torch.Generator,
        progress: bool,
    ) -> ChannelScores:
        """Watch what BatchNorm reads on all clean images, the network in eval mode."""
        with_statistics = tuple(s for s in sites if keeps_statistics(model.get_submodule(s.name)))
        found = divergences(model, clean, with_statistics)
        scores = [
            -standardised(found[site]) if site in found else torch.zeros(site.channels)
            for site in sites
        ]
        return ChannelScores(sites, torch.cat(scores).float(), repr(self))


def divergences(model: nn.Module, clean: CleanData, sites: tuple[Site, ...]) -> dict[Site, Tensor]:
    """KL(clean || running) (channels,), float64, of what each BatchNorm site reads."""
    # sum, sum of squares, and of how many
    sums = {site: torch.zeros(3, site.channels, dtype=torch.float64) for site in sites}

    def see(site: Site, x: Tensor) -> None:
        parts = (x, x.square(), torch.ones_like(x))
        sums[site] += torch.stack([part.sum(1) for part in parts]).cpu()

    watch(model, sites, clean.images, see, side="input")
    found = {}
    for site, (total, squares, count) in sums.items():
        norm: Any = model.get_submodule(site.name)
        mean = total / count
        variance = (squares - total * mean).clamp_min(0) / (count - 1).clamp_min(1)
        running = norm.running_mean.double().cpu(), norm.running_var.double().cpu() + norm.eps
        found[site] = gaussian_kl(mean, variance + norm.eps, *running)
    return found


def gaussian_kl(mean: Tensor, variance: Tensor, other: Tensor, its_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(other, its_variance)), elementwise, in nats.

    Variances must be positive; `divergences` adds the layer's eps to both, so that a channel that
    never moved diverges by nothing and not by infinity.
    """
    ratio = variance / its_variance
    return (ratio - ratio.log() + (mean - other).square() / its_variance - 1) / 2
