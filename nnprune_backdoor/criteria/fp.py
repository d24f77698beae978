"""Fine-Pruning (FP), the pruning half.

Liu, Dolan-Gavitt and Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural
Networks", RAID 2018, https://arxiv.org/abs/1805.12185. A neuron that serves the backdoor has
nothing to do on clean images. Record the mean activation of each channel on clean images, and prune
the most dormant ones first, for as long as clean accuracy holds; then fine-tune on the clean images
(`training.fine_tune` with the selection), because a backdoor may share neurons with the task.

The activation is the positive part of the site's output, which is what a ReLU passes on. At the end
of a residual branch the ReLU sees the branch plus the shortcut; here the branch alone counts, since
it is what is silenced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from ..core.data import CleanData
from ..core.passes import Task, Work
from ..core.scores import ChannelScores
from ..core.sites import Site
from .base import Criterion, register_criterion
from .parts.layers import relative, watch


@register_criterion("fp")
@dataclass(frozen=True, kw_only=True)
class FP(Criterion):
    """Mean activation on clean images, as a multiple of its layer's mean: low = dormant.

    The multiple, because activations of different layers have different scales, and the bare means
    would empty one layer before they touch the next. Within a layer the order is the paper's. With
    `layers="last"` the neurons of all other layers come after those of the last convolution.
    """

    reference: ClassVar[str] = "Liu et al., Fine-Pruning, RAID 2018 (baseline)"
    needs_labels: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    cost: ClassVar[str] = "one pass over the images"

    layers: Literal["last", "all"] = "last"

    @classmethod
    def paper(cls) -> Self:
        """The defaults. Select by clean accuracy (`AccuracyBudget`), then fine-tune."""
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
        """Watch the sites on all clean images."""
        scores = [relative(mean) for mean in mean_activations(model, clean, sites)]
        if self.layers == "last":
            last = last_convolution(model, sites)
            behind = 1 + scores[last].max()
            scores = [s if i == last else s + behind for i, s in enumerate(scores)]
        return ChannelScores(sites, torch.cat(scores).float(), repr(self))


def mean_activations(model: nn.Module, clean: CleanData, sites: tuple[Site, ...]) -> list[Tensor]:
    """For each site the mean over images and positions of max(0, output): (channels,), float64."""
    sums = {site: torch.zeros(site.channels, dtype=torch.float64) for site in sites}
    counts = dict.fromkeys(sites, 0)

    def see(site: Site, output: Tensor) -> None:
        sums[site] += output.relu().sum(1).cpu()
        counts[site] += output.shape[1]

    watch(model, sites, clean.images, see)
    return [sums[site] / counts[site] for site in sites]


def last_convolution(model: nn.Module, sites: tuple[Site, ...]) -> int:
    """Index of the last site to run whose channels a convolution makes; heads do not count.

    In a block with a shortcut that can be either branch. Of the last site of all, if there is none
    but the first, which embeds a transformer's patches.
    """
    convolution = nn.modules.conv._ConvNd
    made = [
        site.kind != "heads" and isinstance(model.get_submodule(site.producer), convolution)
        for site in sites
    ]
    return max((i for i, yes in enumerate(made) if yes and i > 0), default=len(sites) - 1)
