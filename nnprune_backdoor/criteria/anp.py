"""Adversarial Neuron Pruning (ANP).

Wu and Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021,
https://arxiv.org/abs/2110.14430. Backdoor neurons are the ones through which small, adversarial
changes of weights flip clean images to the target; masks learn to close them.

`ANP.paper()` is the published recipe with its noise kept within its bound, `ANP.authors_code()`
the released code. The default differs in one way, for the reasons and with the numbers in
docs/results/ranking.md: the masks' `Response` to the noise replaces 2000 steps of mask training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..core.data import CleanData
from ..core.masks import MaskedModel, Silencing
from ..core.passes import Task, Work
from ..core.scores import ChannelScores
from ..core.sites import Site
from ..utils.tensors import placement
from .base import Criterion, register_criterion
from .parts.mask_training import MaskTraining
from .parts.noise import adversarial_noise
from .parts.response import Response, loss_gradient


@register_criterion("anp")
@dataclass(frozen=True, kw_only=True)
class ANP(Criterion):
    """Scores a neuron by how far its mask closes under the worst noise on all neurons at once.

    Low scores mark backdoor neurons.

    Attributes:
        ranking: The masks' response to the noise, or masks trained under it (published: 2000
            steps).
        alpha: Weight of the clean loss; 1 - alpha is that of the loss under noise. Published: 0.2.
            The response resists by its stiffness instead, so the default is 0.
        noise_budget: Epsilon, the largest relative change of a weight or bias.
        noise_steps: S, ascent steps of epsilon / S after the random start.
        project_noise: Keep the noise within [-epsilon, epsilon]; the authors' code reaches
            2 epsilon.
        mask_silencing: What a mask multiplies: "constant" gamma alone (published), "zero" beta too.
    """

    reference: ClassVar[str] = "Wu and Wang, Adversarial Neuron Pruning, NeurIPS 2021"
    needs_labels: ClassVar[bool] = True
    cost: ClassVar[str] = "a few dozen passes over the images, forward and backward"

    ranking: Response | MaskTraining = Response(rounds=12, statistics="batch")
    alpha: float = 0.0
    noise_budget: float = 0.4
    noise_steps: int = 1
    project_noise: bool = True
    mask_silencing: Silencing = "constant"

    @classmethod
    def paper(cls) -> Self:
        """The paper's setting: 2000 mask updates under noise that stays within its bound."""
        return cls(ranking=MaskTraining(steps=2000), alpha=0.2)

    @classmethod
    def authors_code(cls) -> Self:
        """The released code: as the paper, but the noise may leave its bound after the step.

        Without its random crops and mirror images, as in `paper`.
        """
        return cls(ranking=MaskTraining(steps=2000), alpha=0.2, project_noise=False)

    @property
    def silencing(self) -> Silencing:
        return self.mask_silencing if isinstance(self.ranking, MaskTraining) else "zero"

    def passes(self, task: Task) -> Work:
        noise = self.noise_steps + 1 if self.noise_budget > 0 else 1
        return self.ranking.passes(task, noise + (self.alpha > 0))

    def score(
        self,
        model: nn.Module,
        clean: CleanData,
        sites: tuple[Site, ...],
        generator: torch.Generator,
        progress: bool,
    ) -> ChannelScores:
        """Close the masks that noise opens the target through."""
        masked = MaskedModel(model, sites, silencing=self.mask_silencing)
        details: dict[str, Any] = {}
        if isinstance(self.ranking, MaskTraining):
            flat, steps = self.train(self.ranking, masked, clean, generator, progress)
            details["mask_steps"] = steps
        else:
            flat = self.respond(self.ranking, masked, clean, generator, progress)
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
        """min over m of alpha L(m w, b) + (1 - alpha) max over noise L((m + delta) w, (1 + xi) b).

        Returns the masks (number of neurons,) and the number of steps.
        """
        masked.use_statistics_(training.statistics, clean.examples())
        return training.train(
            masked.masks,
            lambda: clean.batches(training.batch_size, generator, replacement=True),
            lambda batch: self.gradient(masked, batch, generator),
            title="adversarial pruning",
            progress=progress,
        )

    def respond(
        self,
        ranking: Response,
        masked: MaskedModel,
        clean: CleanData,
        generator: torch.Generator,
        progress: bool,
    ) -> Tensor:
        """The first step of the same against the clean stiffness, (number of neurons,)."""
        stiffness = ranking.stiffness(masked.model, clean, masked.sites, generator)
        masked.use_statistics_(ranking.statistics, clean.examples())

        def pull() -> Tensor:
            return ranking.mean(
                masked, clean, generator, lambda batch: self.gradient(masked, batch, generator)
            )

        return ranking.scores(masked, pull, stiffness, progress)

    def gradient(self, masked: MaskedModel, batch: CleanData, generator: torch.Generator) -> Tensor:
        """Of the objective in the masks, (number of neurons,), under fresh noise.

        The noise is a constant of the outer problem. Each term is back-propagated by itself, which
        halves the memory and gives the same gradient.
        """
        total = torch.zeros_like(masked.masks)
        # without noise, mask training has the clean loss alone; a response has nothing else
        if self.noise_budget > 0 or isinstance(self.ranking, Response):
            noise = self.noise(masked, batch, generator)
            total += loss_gradient(masked, batch, 1 - self.alpha, **noise)
        if self.alpha > 0:
            total += loss_gradient(masked, batch, self.alpha)
        return total

    def noise(
        self, masked: MaskedModel, batch: CleanData, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """delta (on weights) and xi (on biases) that raise the loss on this batch."""
        place = placement(masked.model)
        images, labels = batch.images.to(**place), batch.targets.to(place["device"])
        return adversarial_noise(
            masked,
            images,
            labels,
            generator,
            budget=self.noise_budget,
            steps=self.noise_steps,
            project=self.project_noise,
        )
