"""Trigger-activated change (TAC) under a recovered trigger.

Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE
S&P 2019, recover a trigger from clean images and prune the neurons that it moves; Zheng, Tang, Li
and Liu, "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022, call that movement
TAC and measure it at every channel. Recover the smallest trigger (`triggers.Inversion`), stamp it
on clean images, and ask which neurons it works through.

`TAC.paper()` asks by how much each neuron moves. The default asks, in one gradient, which neurons
must be silent for stamped images to get their own labels back, and weighs that against what the
neuron is worth to clean images (`Response`), again after each few neurons;
docs/results/inversion.md has both in numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ..core.data import CleanData
from ..core.masks import MaskedModel
from ..core.passes import Passes, Task, Work
from ..core.predictions import predict_labels
from ..core.recovered import RecoveredTrigger
from ..core.scores import ChannelScores
from ..core.sites import Site
from .base import register_criterion
from .parts.layers import watch
from .parts.response import Response
from .parts.trigger import TriggerCriterion


@dataclass(frozen=True)
class ActivationChange:
    """Rank by how far the trigger moves each neuron, in units of its clean spread."""


@register_criterion("tac")
@dataclass(frozen=True, kw_only=True)
class TAC(TriggerCriterion):
    """Scores a neuron by how much a recovered trigger works through it.

    Low scores mark backdoor neurons. Scores by activation change lie in (0, 1], 1 meaning that the
    trigger does not move the neuron. Wherever the methods speak of labels, the model's own
    predictions serve.

    Attributes:
        ranking: The masks' response to the wish that stamped images get their own labels back, or
            by how much the trigger moves each neuron (published).
    """

    reference: ClassVar[str] = "Wang et al., Neural Cleanse, IEEE S&P 2019; Zheng et al., ECCV 2022"
    needs_labels: ClassVar[bool] = False
    cost: ClassVar[str] = "2,400 images forward and backward for every class, 6,400 for the target"

    ranking: Response | ActivationChange = Response(stages=20)

    @classmethod
    def paper(cls) -> Self:
        """Neural Cleanse's rule, carried from the last layer to all sites, as CLP's authors do.

        For Neural Cleanse itself give the last site alone as `sites`.
        """
        return cls(ranking=ActivationChange(), steps=1000)

    def passes(self, task: Task) -> Work:
        if isinstance(self.ranking, ActivationChange):
            ranking: Work = (Passes("forward", _FEW, 2 * task.images),)
        else:
            stiffness, pulls = self.ranking.passes(task)
            elsewhere = task.images * (1 - 1 / task.classes)  # images of the target are left out
            ranking = (
                stiffness,
                replace(pulls, images=self.ranking.stages * self.ranking.rounds * elsewhere),
            )
        return (task.forward(task.images), *self.recovery(task), *ranking)

    def score(
        self,
        model: nn.Module,
        clean: CleanData,
        sites: tuple[Site, ...],
        generator: torch.Generator,
        progress: bool,
    ) -> ChannelScores:
        """Find the target, recover its trigger, rank by what the trigger needs or moves."""
        predicted = CleanData(clean.images, predict_labels(model, clean.images))
        trigger, details = self.recover(model, predicted, generator, progress)
        elsewhere = predicted.take((predicted.targets != trigger.target).nonzero().flatten())
        if isinstance(self.ranking, ActivationChange):
            flat = 1 / (1 + activation_change(model, elsewhere, trigger, sites))
        else:
            ranking = self.ranking
            stamped = CleanData(trigger(elsewhere.images), elsewhere.labels)
            masked = MaskedModel(model, sites, silencing="zero")
            stiffness = ranking.stiffness(model, predicted, sites, generator)
            masked.use_statistics_(ranking.statistics, clean.examples())
            flat = ranking.scores(
                masked, lambda: ranking.mean(masked, stamped, generator), stiffness, progress
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


_FEW = 32  # images a pass that keeps the outputs of all sites
