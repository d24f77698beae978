"""Reconstructive Neuron Pruning (RNP).

Li, Lyu, Ma, Koren, Lyu, Li and Jiang, "Reconstructive Neuron Pruning for Backdoor Defense",
ICML 2023, https://arxiv.org/abs/2305.14876. Unlearn the clean task by gradient ascent until
accuracy has collapsed, but the backdoor has not; then ask which neurons must be masked for the
clean task to come back. Those were the backdoor's.

`RNP.paper()` is the authors' published code. The defaults differ, for the reasons and with the
numbers in docs/ranking.md: unlearning takes ten times smaller steps, of bounded gradient, and looks
after each of them whether to stop; and recovery is a `response`, not a run of mask training.
Fields without a remark keep the published value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from ..core.data import CleanData
from ..core.masks import MaskedModel, Silencing
from ..core.norms import Statistics
from ..core.scores import ChannelScores
from ..core.sites import Site
from ..utils.progress import progress_bar
from .base import register_criterion
from .parts.response import loss_gradient, mean_gradient, sensitivity, successive_scores
from .parts.unlearning import UnlearningCriterion


@register_criterion("rnp")
@dataclass(frozen=True, kw_only=True)
class RNP(UnlearningCriterion):
    """Masks that bring the clean task back after it was unlearned: low = backdoor.

    Scores of the trained masks lie in [0, 1]; those of the response in (0, stages + 1), the whole
    part being the stage that silenced the neuron (`response.py`).
    """

    reference: ClassVar[str] = "Li et al., Reconstructive Neuron Pruning, ICML 2023"
    needs_labels: ClassVar[bool] = True
    cost: ClassVar[str] = "about ten thousand images, forward and backward"

    unlearn_weight_decay: float = 5e-4

    recovery: Literal["response", "masks"] = "response"  # paper: masks
    damping: float = 0.1  # response: share of the mean clean sensitivity added to each neuron's
    probe_size: int = 20  # response: images a gradient of the clean sensitivity
    stages: int = 1  # response: neurons are silenced and the rest asked again so often
    stage_share: float = 0.0025  # response: of all neurons, silenced at a time

    recover_epochs: int = 20  # masks: epochs
    recover_lr: float = 0.2  # masks: step
    recover_momentum: float = 0.9  # masks
    alpha: float = 0.2  # masks: weight of the loss; only scales the step
    recover_statistics: Statistics = "batch"  # masks: BatchNorm while recovering
    mask_means: Silencing = "constant"  # gamma only; "zero" masks beta as well

    @classmethod
    def paper(cls) -> Self:
        """The authors' published code: 21 epochs of unlearning at most, 20 of mask training.

        Less its random crops and mirror images. An epoch is what this criterion is given: `purify`
        gives it 60 % of the images, so that fewer steps are made than with all of them.
        """
        return cls(
            unlearn_lr=0.01,
            unlearn_milestones=(10, 20),
            unlearn_epochs=21,
            unlearn_check="epoch",
            unlearn_clip=None,
            recovery="masks",
        )

    @property
    def silencing(self) -> Silencing:
        return self.mask_means if self.recovery == "masks" else "zero"

    @property
    def weight_decay(self) -> float:
        """Of all weights while unlearning."""
        return self.unlearn_weight_decay

    def score(
        self,
        model: nn.Module,
        clean: CleanData,
        sites: tuple[Site, ...],
        generator: torch.Generator,
        progress: bool,
    ) -> ChannelScores:
        """Unlearn, recover; the masks are the scores."""
        unlearned, details = self.unlearn(model, clean, generator, progress)
        if self.recovery == "masks":
            flat, details["mask_steps"] = self.recover(unlearned, clean, sites, generator, progress)
        else:
            stiffness = sensitivity(model, clean, sites, generator, self.probe_size)
            masked = MaskedModel(unlearned, sites, silencing=self.mask_means)
            flat = self.respond(masked, stiffness, clean, generator, progress)
            details["ranks_only"] = True
        return ChannelScores(sites, flat, repr(self), details)

    def recover(
        self,
        unlearned: nn.Module,
        clean: CleanData,
        sites: tuple[Site, ...],
        generator: torch.Generator,
        progress: bool,
    ) -> tuple[Tensor, int]:
        """Train one mask a neuron on the unlearned model.

        Returns:
            the masks, (number of neurons,), and the number of steps.
        """
        steps = 0
        masked = MaskedModel(unlearned, sites, silencing=self.mask_means)
        masked.use_statistics_(self.recover_statistics, clean.few())
        optimiser = torch.optim.SGD(
            [masked.masks], lr=self.recover_lr, momentum=self.recover_momentum
        )
        with progress_bar(self.recover_epochs, "recovering", progress) as bar:
            for _ in range(self.recover_epochs):
                for batch in clean.batches(self.batch_size, generator):
                    masked.masks.grad = loss_gradient(masked, batch, self.alpha)
                    optimiser.step()
                    with torch.no_grad():
                        masked.masks.clamp_(0, 1)
                    steps += 1
                bar.update()
        return masked.masks.detach().float().cpu(), steps

    def respond(
        self,
        masked: MaskedModel,
        stiffness: Tensor,
        clean: CleanData,
        generator: torch.Generator,
        progress: bool,
    ) -> Tensor:
        """How far each mask gives way to the unlearned model's wish to recover."""
        return successive_scores(
            masked,
            lambda: mean_gradient(masked, clean, self.batch_size, generator),
            stiffness,
            self.damping,
            stages=self.stages,
            share=self.stage_share,
            progress=progress,
        )
