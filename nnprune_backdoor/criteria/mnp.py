"""Magnitude-based Neuron Pruning (MNP): a reconstruction.

Li, Jiang and Yi, "Magnitude-based Neuron Pruning for Backdoor Defense", 2024,
https://arxiv.org/abs/2405.17750. Backdoor neurons have large weights of which the clean task makes
little use. Three objectives bring them out: clean suppression ascends the clean loss under weight
decay, so that clean neurons shrink and the backdoor's stand out; a weight penalty on masks closes
every large neuron that the clean loss does not defend; clean preserving is that defence.

No code of the authors is public, and we had the paper's three objectives but not its numbers, nor
where each clean loss is evaluated. Everything numerical here is therefore ours, `MNP.paper()`
included, mostly taken from RNP, whose unlearning is clean suppression term by term. Do not report
what this class gives as the paper's results. docs/mnp.md has the choices and what they give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from ..core.data import CleanData
from ..core.masks import MaskedModel, Silencing
from ..core.norms import Statistics, use_statistics_
from ..core.scores import ChannelScores
from ..core.sites import Site
from ..errors import DataError, ScoringError
from ..utils.progress import progress_bar
from .base import register_criterion
from .parts.response import loss_gradient, sensitivity, successive_scores
from .parts.unlearning import UnlearningCriterion


@register_criterion("mnp")
@dataclass(frozen=True, kw_only=True)
class MNP(UnlearningCriterion):
    """Masks that a weight penalty closes and clean images keep open: low = backdoor.

    A reconstruction: see the module. Scores are the masks in (0, 1); masks at 0 score in [-1, 0),
    the first to get there lowest, then the larger neuron; masks at 1 in (1, 2], the smallest
    neuron highest. Those of the response lie in (0, stages + 1), see `response.py`.

    Where no layer is a BatchNorm, weights ascend at 0.001 and a gradient norm of 1 at most:
    without normalisation they diverge in a few steps. That magnitude says anything there is not
    known.
    """

    reference: ClassVar[str] = (
        "Li, Jiang and Yi, Magnitude-based Neuron Pruning, arXiv 2405.17750, 2024 (reconstruction)"
    )
    needs_labels: ClassVar[bool] = True
    cost: ClassVar[str] = "about ten thousand images, forward and backward"

    unlearn_stop: float | None = None  # twice the accuracy of guessing, within 0.2 and 0.5
    mu: float = 2.5e-4  # clean suppression ascends L - mu ||theta||^2

    preserve: float = 0.5  # a: weight of the original's clean loss, 1 - a of the suppressed one's
    penalty: float = 5e-3  # lambda: of the sum over neurons of mask times magnitude
    mask_means: Silencing = "constant"  # gamma only; "zero" masks beta as well

    ranking: Literal["masks", "response"] = "response"  # paper: masks
    damping: float = 0.1  # response: share of the mean clean sensitivity added to each neuron's
    probe_size: int = 20  # response: images a gradient of the clean sensitivity
    stages: int = 1  # response: neurons are silenced and the rest asked again so often
    stage_share: float = 0.0025  # response: of all neurons, silenced at a time

    steps: int = 500  # masks: updates at most
    mask_lr: float = 0.2  # masks
    mask_momentum: float = 0.9  # masks
    mask_statistics: Statistics = "batch"  # masks: of BatchNorm
    closed_below: float = 0.2  # masks: at which a neuron counts as closed
    closed_share: float = 0.1  # masks: stop once so many are, or the penalty closes them all

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.preserve <= 1:
            raise DataError(f"expected preserve in [0, 1], got {self.preserve}")
        if self.steps < 1:
            raise DataError(f"expected at least one step, got {self.steps}")

    @classmethod
    def paper(cls) -> Self:
        """The reconstruction with RNP's published unlearning; the paper's numbers are unknown."""
        return cls(
            unlearn_lr=0.01,
            unlearn_milestones=(10,),
            unlearn_epochs=20,
            unlearn_check="epoch",
            ranking="masks",
        )

    @property
    def silencing(self) -> Silencing:
        return self.mask_means if self.ranking == "masks" else "zero"

    @property
    def weight_decay(self) -> float:
        """Of all weights while unlearning: the gradient of mu ||theta||^2 is 2 mu theta."""
        return 2 * self.mu

    def score(
        self,
        model: nn.Module,
        clean: CleanData,
        sites: tuple[Site, ...],
        generator: torch.Generator,
        progress: bool,
    ) -> ChannelScores:
        """Suppress the clean task, then let penalty and clean loss settle the masks."""
        suppressed, details = self.careful(model).unlearn(model, clean, generator, progress)
        parts = self.losses(model, suppressed, sites)
        weights = magnitudes(suppressed, sites)
        if self.ranking == "masks":
            masks, closed_at, steps = self.train_masks(parts, weights, clean, generator, progress)
            flat = tie_free(masks, closed_at, weights)
            details["mask_steps"] = steps
        else:
            flat = successive_scores(
                parts[0][1],
                lambda: self.pull(parts, weights, clean, generator),
                sensitivity(model, clean, sites, generator, self.probe_size),
                self.damping,
                stages=self.stages,
                share=self.stage_share,
                progress=progress,
            )
            details["ranks_only"] = True
        return ChannelScores(sites, flat, repr(self), details)

    def losses(
        self, model: nn.Module, suppressed: nn.Module, sites: tuple[Site, ...]
    ) -> list[tuple[float, MaskedModel]]:
        """The weighted models whose clean losses defend the masks; one mask tensor for all."""
        a = self.preserve
        parts = [
            (weight, MaskedModel(each, sites, silencing=self.mask_means))
            for weight, each in ((a, model), (1 - a, suppressed))
            if weight > 0
        ]
        for _, masked in parts:
            masked.masks = parts[0][1].masks
        return parts

    def train_masks(
        self,
        parts: list[tuple[float, MaskedModel]],
        weights: Tensor,
        clean: CleanData,
        generator: torch.Generator,
        progress: bool,
    ) -> tuple[Tensor, Tensor, int]:
        """min over m of a L(m theta) + (1 - a) L(m theta_s) + lambda sum m M.

        Each term is back-propagated by itself, which gives the same gradient in half the memory.

        Args:
            parts: from `losses`.
            weights: M (number of neurons,), from `magnitudes`.

        Returns:
            the masks and the step that first brought each to 0 (inf: none did), both (number of
            neurons,) on the CPU; the number of steps.

        Raises:
            ScoringError: a gradient became NaN or inf.
        """
        masks = parts[0][1].masks
        steepness = self.penalty * weights.to(masks)
        for _, masked in parts:
            masked.use_statistics_(self.mask_statistics, clean.few())
        optimiser = torch.optim.SGD([masks], lr=self.mask_lr, momentum=self.mask_momentum)
        closed_at = torch.full_like(masks, torch.inf, requires_grad=False)
        steps, saturated = 0, False
        with progress_bar(self.steps, "weight penalty", progress) as bar:
            while steps < self.steps and not saturated:
                for batch in clean.batches(self.batch_size, generator):
                    gradient = torch.zeros_like(masks)
                    for weight, masked in parts:
                        gradient += loss_gradient(masked, batch, weight)
                        if not torch.isfinite(gradient).all():
                            raise ScoringError(
                                f"mask training diverged after {steps} steps (gradients of NaN or "
                                "inf); take a smaller mask_lr"
                            )
                    masks.grad = gradient + steepness
                    optimiser.step()
                    steps += 1
                    bar.update()
                    with torch.no_grad():
                        masks.clamp_(0, 1)
                        closed_at[(masks == 0) & (closed_at > steps)] = steps
                        share = (masks < self.closed_below).float().mean()
                    saturated = bool(share >= self.closed_share)
                    if saturated or steps == self.steps:
                        break
        for _, masked in parts:
            use_statistics_(masked.model, "running")
        return masks.detach().float().cpu(), closed_at.float().cpu(), steps

    def pull(
        self,
        parts: list[tuple[float, MaskedModel]],
        weights: Tensor,
        clean: CleanData,
        generator: torch.Generator,
    ) -> Tensor:
        """The gradient (number of neurons,) of the same objective before any mask has moved."""
        total = torch.zeros_like(weights)
        for weight, masked in parts:
            for batch in clean.batches(self.batch_size, generator):
                share = weight * len(batch) / len(clean)
                total += share * loss_gradient(masked, batch).float().cpu()
        return total + self.penalty * weights


@torch.no_grad()
def magnitudes(model: nn.Module, sites: tuple[Site, ...]) -> Tensor:
    """M (number of neurons,), on the CPU: the size of the weights that feed each neuron.

    The l1 norm of the filter (of the row, in a linear layer) before the norm layer, divided by its
    mean over the site: sums over 27 weights and over 4608 do not compare.
    """
    found = []
    for site in sites:
        producer: Any = model.get_submodule(site.producer)
        filters: Tensor = producer.weight.float().flatten(1)
        sizes: Tensor = filters.norm(p=1, dim=1)
        found.append((sizes / sizes.mean().clamp_min(torch.finfo(torch.float32).tiny)).cpu())
    return torch.cat(found)


def tie_free(masks: Tensor, closed_at: Tensor, weights: Tensor) -> Tensor:
    """Masks as scores, each bound spread out: 0 over [-1, 0) and 1 over (1, 2].

    Args:
        masks: in [0, 1] (number of neurons,).
        closed_at: when each was first at 0; earlier goes first.
        weights: M of each; the larger goes first where that ties too.
    """
    order = (-weights).argsort(stable=True)
    for key in (closed_at, masks):
        order = order[key[order].argsort(stable=True)]
    count = len(masks)
    place = torch.empty(count)
    place[order] = torch.arange(count, dtype=torch.float32)
    open_or_between = torch.where(masks >= 1, 1 + (place + 1) / count, masks)
    return torch.where(masks <= 0, place / count - 1, open_or_between)
