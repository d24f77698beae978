"""Criteria that were tried and are not in the library: docs/results/newer_criteria.md.

NWC: Lin, Liu, Wei, Li and Xiong, "Unveiling and Mitigating Backdoor Vulnerabilities based on
Unlearning Weight Changes and Backdoor Activeness" (TSBD), NeurIPS 2024,
https://arxiv.org/abs/2405.20291. Unlearn the clean task by gradient ascent. The neurons whose
weights change most while clean images are unlearned also change most while triggered ones are:
those are the backdoor's. The authors set the largest 70 % of such neurons' weights to zero and
fine-tune; here the neuron is silenced as a whole.

IMS: Dunnett, Arablouei, Miller, Dedeoglu and Jurdak, "Backdoor Mitigation via Invertible Pruning
Masks", 2025, https://arxiv.org/abs/2509.15497. One mask is to remove the backdoor, its inverse to
keep nothing but the backdoor; neurons that both tasks need are selected and stay under both. The
inner problem finds, for every clean image, a perturbation that works under the inverse mask; the
outer one moves mask and selection until such perturbations no longer work under the mask. No label
is used. A reconstruction from the abstract: neither the formulas nor code of the authors were at
hand, and weights, steps and radius are ours.

Importing this module registers both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnprune_backdoor import CleanData, Criterion, register_criterion
from nnprune_backdoor.core.masks import MaskedModel
from nnprune_backdoor.core.norms import Statistics
from nnprune_backdoor.core.predictions import predict_labels
from nnprune_backdoor.core.scores import ChannelScores
from nnprune_backdoor.core.sites import Site
from nnprune_backdoor.criteria import Unlearning
from nnprune_backdoor.criteria.parts.layers import kernels
from nnprune_backdoor.utils.progress import progress_bar
from nnprune_backdoor.utils.tensors import at_least_float32, placement


@register_criterion("nwc")
@dataclass(frozen=True, kw_only=True)
class NWC(Criterion):
    """Scores a neuron by how little its weights change while the clean task is unlearned.

    Scores are <= 0. Low scores mark backdoor neurons.

    Attributes:
        unlearning: How the clean task is unlearned.
    """

    reference: ClassVar[str] = "Lin et al., Unlearning Weight Changes (TSBD), NeurIPS 2024"
    needs_labels: ClassVar[bool] = True
    cost: ClassVar[str] = "about ten thousand images, forward and backward"

    unlearning: Unlearning = Unlearning()

    @classmethod
    def paper(cls) -> Self:
        """The authors' published code, whose stop is the accuracy of guessing among ten classes.

        It looks at accuracy with BatchNorm's running statistics after each epoch; here it is that
        of the epoch itself.
        """
        unlearning = Unlearning(
            lr=1e-4,
            weight_decay=0.0,
            epochs=1000,
            stop=0.1,
            check="epoch",
            clip=None,
            batch_size=256,
        )
        return cls(unlearning=unlearning)

    def score(
        self,
        model: nn.Module,
        clean: CleanData,
        sites: tuple[Site, ...],
        generator: torch.Generator,
        progress: bool,
    ) -> ChannelScores:
        """Unlearn, then compare the weights."""
        unlearned, details = self.unlearning.unlearn(model, clean, generator, progress)
        changes = torch.cat([weight_change(model, unlearned, site) for site in sites])
        return ChannelScores(sites, -changes.float().cpu(), repr(self), details)


def weight_change(before: nn.Module, after: nn.Module, site: Site) -> Tensor:
    """Sum of the absolute changes of each neuron's weights, (channels,), float64."""
    return (kernels(after, site) - kernels(before, site)).abs().flatten(1).sum(1)


@register_criterion("ims")
@dataclass(frozen=True, kw_only=True)
class IMS(Criterion):
    """Scores a neuron by how far the mask that removes the backdoor leaves it open.

    Scores lie in [0, 1]. Low scores mark neurons that are open under the inverse mask alone: the
    backdoor's.

    Attributes:
        steps: Updates of mask and selection.
        lr: Their learning rate, of Adam.
        radius: Largest root mean square of a perturbation, in the unit of the normalised images.
        inner_steps: Gradient steps that find a perturbation.
        sparsity: Weight of the share of neurons that the mask closes.
        bound: The loss of perturbed images under the inverse mask counts up to here.
        batch_size: Images a step.
        statistics: BatchNorm statistics under the masks.
    """

    reference: ClassVar[str] = "Dunnett et al., Invertible Pruning Masks, 2025"
    needs_labels: ClassVar[bool] = False
    cost: ClassVar[str] = "about a hundred thousand images, forward and backward"

    steps: int = 150
    lr: float = 0.02
    radius: float = 0.15
    inner_steps: int = 3
    sparsity: float = 0.1
    bound: float = 5.0
    batch_size: int = 64
    statistics: Statistics = "running"

    def score(
        self,
        model: nn.Module,
        clean: CleanData,
        sites: tuple[Site, ...],
        generator: torch.Generator,
        progress: bool,
    ) -> ChannelScores:
        """Alternate between perturbations and gates."""
        predicted = CleanData(clean.images, predict_labels(model, clean.images))
        kept = MaskedModel(model, sites, silencing="zero")
        inverse = MaskedModel(model, sites, silencing="zero")
        for masked in (kept, inverse):
            masked.use_statistics_(self.statistics, clean.examples())
        optimiser = torch.optim.Adam([kept.masks, inverse.masks], lr=self.lr)
        done = 0
        with progress_bar(self.steps, "inverting masks", progress) as bar:
            while done < self.steps:
                for batch in predicted.batches(self.batch_size, generator):
                    self._update(kept, inverse, batch, optimiser, generator)
                    done += 1
                    bar.update()
                    if done == self.steps:
                        break
        shares = {
            "closed": float((kept.masks < 0.5).float().mean()),
            "selected": float((kept.masks + inverse.masks > 1.5).float().mean()),
        }
        return ChannelScores(sites, kept.masks.detach().float().cpu(), repr(self), shares)

    def _update(
        self,
        kept: MaskedModel,
        inverse: MaskedModel,
        batch: CleanData,
        optimiser: torch.optim.Optimizer,
        generator: torch.Generator,
    ) -> None:
        place = placement(kept.model)
        images, labels = batch.images.to(**place), batch.targets.to(place["device"])
        perturbed = self._perturbed(inverse, images, labels, generator)
        right = _loss(kept, images, labels) + _loss(kept, perturbed, labels)
        fooled = _loss(inverse, perturbed, labels).clamp_max(self.bound)
        closed = (1 - kept.masks).mean()
        wanted = right - fooled + self.sparsity * closed
        gradients = torch.autograd.grad(wanted, [kept.masks, inverse.masks])
        kept.masks.grad, inverse.masks.grad = gradients
        optimiser.step()
        project_(kept.masks, inverse.masks)

    def _perturbed(
        self, inverse: MaskedModel, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Each image with the perturbation that raises its loss most under the inverse mask."""
        start = torch.randn(images.shape, generator=generator).to(images)
        change = _of_rms(start, self.radius / 10)
        with inverse.frozen_masks():
            for _ in range(self.inner_steps):
                change.requires_grad_(True)
                (gradient,) = torch.autograd.grad(_loss(inverse, images + change, labels), change)
                moved = change.detach() + _of_rms(gradient, 2 * self.radius / self.inner_steps)
                change = _of_rms(moved, self.radius)
        return images + change.detach()


def _loss(masked: MaskedModel, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(at_least_float32(masked(images)), labels)


def _of_rms(change: Tensor, rms: float) -> Tensor:
    """The change (N, C, H, W), scaled to this root mean square for each image."""
    size = change.square().mean((1, 2, 3), keepdim=True).sqrt()
    return change * (rms / size.clamp_min(torch.finfo(size.dtype).tiny))


@torch.no_grad()
def project_(mask: Tensor, inverse: Tensor) -> None:
    """Move both gates (number of neurons,) into [0, 1], so that no neuron is shut under both.

    With a selection s and a mask a they are 1 - (1 - s)(1 - a) and 1 - (1 - s)a: where s is 0 the
    one is the other's inverse, where it is 1 both are open.
    """
    missing = (1 - mask - inverse).clamp_min(0) / 2
    mask.add_(missing).clamp_(0, 1)
    inverse.add_(missing).clamp_(0, 1)
    inverse.copy_(torch.maximum(inverse, 1 - mask))
