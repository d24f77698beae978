"""Adversarial Neuron Pruning (ANP).

Wu and Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021,
https://arxiv.org/abs/2110.14430. Backdoor neurons are the ones through which small, adversarial
changes of weights flip clean images to the target; masks learn to close them.

`ANP.paper()` is the published recipe with its noise kept within its bound, `ANP.authors_code()`
the released code. The defaults differ in one named way, for the reasons and with the numbers in
docs/ranking.md: the masks' `response` to the noise replaces 2000 steps of mask training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from ..core.data import CleanData
from ..core.masks import MaskedModel, Silencing
from ..core.norms import Statistics
from ..core.scores import ChannelScores
from ..core.sites import Site
from ..utils.progress import progress_bar
from ..utils.tensors import placement
from .base import Criterion, register_criterion
from .parts.noise import adversarial_noise
from .parts.response import loss_gradient, sensitivity, successive_scores


@register_criterion("anp")
@dataclass(frozen=True, kw_only=True)
class ANP(Criterion):
    """Masks trained under the worst noise on all neurons at once: low = backdoor.

    Scores of the trained masks lie in [0, 1]; those of the response in (0, stages + 1), the whole
    part being the stage that silenced the neuron (`response.py`).
    """

    reference: ClassVar[str] = "Wu and Wang, Adversarial Neuron Pruning, NeurIPS 2021"
    needs_labels: ClassVar[bool] = True
    cost: ClassVar[str] = "a few dozen passes over the images, forward and backward"

    noise_budget: float = 0.4  # epsilon: largest relative change of a weight or bias
    noise_steps: int = 1  # S: ascent steps of epsilon / S after the random start
    project_noise: bool = True  # into [-epsilon, epsilon]; the authors' code reaches 2 epsilon
    batch_size: int = 128
    statistics: Statistics = "batch"  # of BatchNorm under noise
    mask_means: Silencing = "constant"  # gamma only; "zero" masks beta as well

    optimise: Literal["response", "masks"] = "response"  # paper: masks
    rounds: int = 12  # response: passes over the clean images a stage, each with fresh noise
    damping: float = 0.1  # response: share of the mean clean sensitivity added to each neuron's
    probe_size: int = 20  # response: images a gradient of the clean sensitivity
    stages: int = 1  # response: neurons are silenced and the rest asked again so often
    stage_share: float = 0.0025  # response: of all neurons, silenced at a time

    steps: int = 2000  # masks: updates
    mask_lr: float = 0.2  # masks
    mask_momentum: float = 0.9  # masks
    alpha: float = 0.2  # masks: weight of the clean loss, 1 - alpha of the loss under noise

    @classmethod
    def paper(cls) -> Self:
        """The paper's setting: 2000 mask updates under noise that stays within its bound."""
        return cls(optimise="masks")

    @classmethod
    def authors_code(cls) -> Self:
        """The released code: as the paper, but the noise may leave its bound after the step.

        Less its random crops and mirror images, here as in `paper`.
        """
        return cls(optimise="masks", project_noise=False)

    @property
    def silencing(self) -> Silencing:
        return self.mask_means if self.optimise == "masks" else "zero"

    def score(
        self,
        model: nn.Module,
        clean: CleanData,
        sites: tuple[Site, ...],
        generator: torch.Generator,
        progress: bool,
    ) -> ChannelScores:
        """Masks against adversarial neuron noise; the masks are the scores."""
        masked = MaskedModel(model, sites, silencing=self.mask_means)
        details: dict[str, Any] = {}
        if self.optimise == "masks":
            flat = self.train_masks(masked, clean, generator, progress)
            details["mask_steps"] = self.steps
        else:
            flat = self.respond(masked, clean, generator, progress)
            details["ranks_only"] = True
        return ChannelScores(sites, flat, repr(self), details)

    def adversarial_noise(
        self, masked: MaskedModel, batch: CleanData, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """delta (on weights) and xi (on biases) that raise the loss on this batch; see `noise`."""
        where = placement(masked.model)
        images, labels = batch.images.to(**where), batch.targets.to(where["device"])
        return adversarial_noise(
            masked,
            images,
            labels,
            generator,
            budget=self.noise_budget,
            steps=self.noise_steps,
            project=self.project_noise,
        )

    def train_masks(
        self,
        masked: MaskedModel,
        clean: CleanData,
        generator: torch.Generator,
        progress: bool,
    ) -> Tensor:
        """min over m of alpha L(m w, b) + (1 - alpha) max over noise L((m + delta) w, (1 + xi) b).

        The noise is a constant of the outer problem. Each term is back-propagated by itself, which
        halves the memory and gives the same gradient. Returns the masks, (number of neurons,).
        """
        masked.use_statistics_(self.statistics, clean.few())
        optimiser = torch.optim.SGD([masked.masks], lr=self.mask_lr, momentum=self.mask_momentum)
        with progress_bar(self.steps, "adversarial pruning", progress) as bar:
            for batch in islice(self.draws(clean, generator), self.steps):
                gradient = torch.zeros_like(masked.masks)
                if self.noise_budget > 0:
                    noise = self.adversarial_noise(masked, batch, generator)
                    gradient += loss_gradient(masked, batch, 1 - self.alpha, **noise)
                gradient += loss_gradient(masked, batch, self.alpha)
                masked.masks.grad = gradient
                optimiser.step()
                with torch.no_grad():
                    masked.masks.clamp_(0, 1)
                bar.update()
        return masked.masks.detach().float().cpu()

    def draws(self, clean: CleanData, generator: torch.Generator) -> Iterator[CleanData]:
        """Batches without end, each image drawn by itself."""
        while True:
            yield from clean.batches(self.batch_size, generator, replacement=True)

    def respond(
        self,
        masked: MaskedModel,
        clean: CleanData,
        generator: torch.Generator,
        progress: bool,
    ) -> Tensor:
        """Mean pull of the loss under fresh adversarial noise, against the clean sensitivity."""
        stiffness = sensitivity(masked.model, clean, masked.sites, generator, self.probe_size)
        masked.use_statistics_(self.statistics, clean.few())
        return successive_scores(
            masked,
            lambda: self.pull(masked, clean, generator),
            stiffness,
            self.damping,
            stages=self.stages,
            share=self.stage_share,
            progress=progress,
        )

    def pull(self, masked: MaskedModel, clean: CleanData, generator: torch.Generator) -> Tensor:
        """Mean gradient under fresh noise at the present masks, (number of neurons,)."""
        total = torch.zeros_like(masked.masks)
        for _ in range(self.rounds):
            for batch in clean.batches(self.batch_size, generator):
                noise = self.adversarial_noise(masked, batch, generator)
                total += len(batch) * loss_gradient(masked, batch, **noise)
        return total / (self.rounds * len(clean))
