"""Trigger-activated change (TAC) under a recovered trigger.

Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE
S&P 2019, recover a trigger from clean images and prune the neurons that it moves; Zheng, Tang, Li
and Liu, "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022, call that movement
TAC and measure it at every channel. Recover the smallest trigger (`inversion.py`), stamp it on
clean images, and ask which neurons it works through.

`TAC.paper()` asks by how much each neuron moves. The default asks, in one gradient, which neurons
must be silent for stamped images to get their own labels back, and weighs that against what the
neuron is worth to clean images (`response.py`); docs/inversion.md has both in numbers. It asks in
stages, again after each few neurons (docs/ranking.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from ..core.data import CleanData
from ..core.masks import MaskedModel
from ..core.predictions import predict_labels
from ..core.recovered import RecoveredTrigger
from ..core.scores import ChannelScores
from ..core.sites import Site
from .base import register_criterion
from .parts.layers import watch
from .parts.response import mean_gradient, sensitivity, successive_scores
from .parts.trigger import TriggerCriterion


@register_criterion("tac")
@dataclass(frozen=True, kw_only=True)
class TAC(TriggerCriterion):
    """Neurons through which a recovered trigger works: low = backdoor.

    Scores by "unlearn" lie in (0, stages + 1), the whole part being the stage that silenced the
    neuron (`response.py`); those by "change" in (0, 1], 1 meaning that the trigger does not move
    it. Wherever the methods speak of labels, the model's own predictions serve.
    """

    reference: ClassVar[str] = "Wang et al., Neural Cleanse, IEEE S&P 2019; Zheng et al., ECCV 2022"
    needs_labels: ClassVar[bool] = False
    cost: ClassVar[str] = "2,400 images forward and backward for every class, 6,400 for the target"

    ranking: Literal["unlearn", "change"] = "unlearn"  # paper: change

    damping: float = 0.1  # unlearn: share of the mean clean sensitivity added to each neuron's
    probe_size: int = 20  # unlearn: images a gradient of the clean sensitivity
    stages: int = 20  # unlearn: neurons are silenced and the rest asked again so often
    stage_share: float = 0.0025  # unlearn: of all neurons, silenced at a time

    @classmethod
    def paper(cls) -> Self:
        """Neural Cleanse's rule, carried from the last layer to all sites, as CLP's authors do.

        For Neural Cleanse itself give the last site alone as `sites`.
        """
        return cls(ranking="change", steps=1000)

    def score(
        self,
        model: nn.Module,
        clean: CleanData,
        sites: tuple[Site, ...],
        generator: torch.Generator,
        progress: bool,
    ) -> ChannelScores:
        """Find the target, recover its trigger, rank by what the trigger needs or moves."""
        own = CleanData(clean.images, predict_labels(model, clean.images))
        trigger, details = self.recover(model, own, generator, progress)
        elsewhere = own.take((own.targets != trigger.target).nonzero().flatten())
        if self.ranking == "change":
            flat = 1 / (1 + activation_change(model, elsewhere, trigger, sites))
        else:
            stamped = CleanData(trigger(elsewhere.images), elsewhere.labels)
            masked = MaskedModel(model, sites, silencing="zero")
            flat = successive_scores(
                masked,
                lambda: mean_gradient(masked, stamped, _BATCH, generator),
                sensitivity(model, own, sites, generator, self.probe_size),
                self.damping,
                stages=self.stages,
                share=self.stage_share,
                progress=progress,
            )
            details["ranks_only"] = True
        return ChannelScores(sites, flat, repr(self), details, (trigger,))


@torch.no_grad()
def activation_change(
    model: nn.Module, clean: CleanData, trigger: RecoveredTrigger, sites: tuple[Site, ...]
) -> Tensor:
    """How far the trigger moves each neuron (number of neurons,), in units of its clean spread.

    The root mean square, over images and positions, of the stamped less the clean output of the
    site, by the standard deviation of the clean output.
    """
    # sum and sum of squares of clean outputs, sum of squared changes, and of how many
    sums = {site.name: torch.zeros(4, site.channels, dtype=torch.float64) for site in sites}
    for images in clean.images.split(_FEW):
        before, after = _outputs(model, sites, images), _outputs(model, sites, trigger(images))
        for name, x in before.items():
            change = after[name] - x
            parts = (x, x.square(), change.square(), torch.ones_like(x))
            sums[name] += torch.stack([part.sum(1) for part in parts]).cpu()
    changes = []
    for site in sites:
        total, squares, moved, count = sums[site.name]
        spread = (squares / count - (total / count).square()).clamp_min(0).sqrt()
        changes.append((moved / count).sqrt() / (spread + 1e-6))
    return torch.cat(changes).float()


def _outputs(model: nn.Module, sites: tuple[Site, ...], images: Tensor) -> dict[str, Tensor]:
    """Site name -> its output (C, images x positions), float64: what a mask would scale."""
    found: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    watch(model, sites, images, lambda site, output: found[site.name].append(output))
    return {name: torch.cat(parts, 1) for name, parts in found.items()}


_BATCH = 128  # images a pass

_FEW = 32  # images a pass that keeps the outputs of all sites
