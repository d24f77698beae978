"""Reconstructive Neuron Pruning (RNP).

Li, Lyu, Ma, Koren, Lyu, Li and Jiang, "Reconstructive Neuron Pruning for Backdoor Defense",
ICML 2023, https://arxiv.org/abs/2305.14876. Unlearn the clean task by gradient ascent until
accuracy has collapsed but the backdoor has not; then ask which neurons must be masked for the
clean task to come back. Those were the backdoor's.

`RNP.paper()` is the authors' published code. The defaults differ, for the reasons and with the
numbers in docs/results/ranking.md: unlearning takes ten times smaller steps, of bounded gradient,
and checks after each of them whether to stop; and recovery is a `Response`, not mask training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ..core.data import CleanData
from ..core.masks import MaskedModel, Silencing
from ..core.passes import Task, Work
from ..core.scores import ChannelScores
from ..core.sites import Site
from .base import Criterion, register_criterion
from .parts.mask_training import MaskTraining
from .parts.response import Response, loss_gradient
from .parts.unlearning import Unlearning

LOSS_WEIGHT = 0.2  # alpha in the authors' code; it only scales the masks' steps


@register_criterion("rnp")
@dataclass(frozen=True, kw_only=True)
class RNP(Criterion):
    """Scores a neuron by how much the clean task needs it masked to come back after unlearning.

    Low scores mark backdoor neurons.

    Attributes:
        unlearning: How the clean task is unlearned.
        ranking: How the clean task is recovered: by the masks' response, or by training masks
            (published: 20 epochs).
        mask_silencing: What a mask multiplies: "constant" gamma alone (published), "zero" beta too.
    """

    reference: ClassVar[str] = "Li et al., Reconstructive Neuron Pruning, ICML 2023"
    needs_labels: ClassVar[bool] = True
    cost: ClassVar[str] = "about ten thousand images, forward and backward"

    unlearning: Unlearning = Unlearning()
    ranking: Response | MaskTraining = Response()
    mask_silencing: Silencing = "constant"

    @classmethod
    def paper(cls) -> Self:
        """The authors' published code: 21 epochs of unlearning at most, 20 of mask training.

        Without their random crops and mirror images. An epoch is one pass over the images that
        this criterion is given: `purify` gives it 60 % of them, so that fewer steps are made than
        with all.
        """
        return cls(unlearning=Unlearning.published(), ranking=MaskTraining(epochs=20))

    @property
    def silencing(self) -> Silencing:
        return self.mask_silencing if isinstance(self.ranking, MaskTraining) else "zero"

    def passes(self, task: Task) -> Work:
        return (*self.unlearning.passes(task), *self.ranking.passes(task))

    def score(
        self,
        model: nn.Module,
        clean: CleanData,
        sites: tuple[Site, ...],
        generator: torch.Generator,
        progress: bool,
    ) -> ChannelScores:
        """Unlearn, then recover."""
        unlearned, details = self.unlearning.unlearn(model, clean, generator, progress)
        masked = MaskedModel(unlearned, sites, silencing=self.mask_silencing)
        if isinstance(self.ranking, MaskTraining):
            flat, steps = self.train(self.ranking, masked, clean, generator, progress)
            details["mask_steps"] = steps
        else:
            stiffness = self.ranking.stiffness(model, clean, sites, generator)
            flat = self.respond(
                self.ranking, masked, stiffness, clean, generator, progress=progress
            )
            details["ranks_only"] = True
        return ChannelScores(sites, flat, repr(self), details)

    def train(
        self,
        training: MaskTraining,
        masked: MaskedModel,
        clean: CleanData,
        generator: torch.Generator,
        progress: bool,
    ) -> tuple[Tensor, int]:
        """min over m of the clean loss of the unlearned model under masks m.

        Returns:
            the masks, (number of neurons,), and the number of steps.
        """
        masked.use_statistics_(training.statistics, clean.examples())
        return training.train(
            masked.masks,
            lambda: clean.batches(training.batch_size, generator),
            lambda batch: loss_gradient(masked, batch, LOSS_WEIGHT),
            title="recovering",
            progress=progress,
        )

    def respond(
        self,
        ranking: Response,
        masked: MaskedModel,
        stiffness: Tensor,
        clean: CleanData,
        generator: torch.Generator,
        *,
        progress: bool,
    ) -> Tensor:
        """How far each mask gives way to the unlearned model's wish to recover."""
        masked.use_statistics_(ranking.statistics, clean.examples())
        return ranking.scores(
            masked, lambda: ranking.mean(masked, clean, generator), stiffness, progress
        )
