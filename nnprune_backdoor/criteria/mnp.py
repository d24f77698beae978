"""Magnitude-based Neuron Pruning (MNP): a reconstruction.

Li, Jiang and Yi, "Magnitude-based Neuron Pruning for Backdoor Defense", 2024,
https://arxiv.org/abs/2405.17750. Backdoor neurons have large weights of which the clean task makes
little use. Three objectives bring them out: clean suppression ascends the clean loss under weight
decay, so that clean neurons shrink and the backdoor's stand out; a weight penalty on masks closes
every large neuron that the clean loss does not defend; clean preserving is that defence.

No code of the authors is public, and we had the paper's three objectives but not its numbers, nor
where each clean loss is evaluated. Everything numerical here is therefore ours, `MNP.paper()`
included, mostly taken from RNP, whose unlearning is clean suppression term by term. Do not report
what this class gives as the paper's results; docs/results/mnp.md has the choices and what they
give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ..core.data import CleanData
from ..core.masks import MaskedModel, Silencing
from ..core.norms import use_statistics_
from ..core.passes import Task, Work
from ..core.scores import ChannelScores
from ..core.sites import Site
from ..errors import DataError, ScoringError
from .base import Criterion, register_criterion
from .parts.mask_training import MaskTraining
from .parts.response import Response, loss_gradient
from .parts.unlearning import Unlearning


@register_criterion("mnp")
@dataclass(frozen=True, kw_only=True)
class MNP(Criterion):
    """Scores a neuron by how far a weight penalty closes its mask against the clean task's defence.

    Low scores mark backdoor neurons. A reconstruction: see the module. Trained masks score in
    (0, 1); masks at 0 in [-1, 0), the first to get there lowest, then the larger neuron; masks at 1
    in (1, 2], the smallest neuron highest.

    Where no layer is a BatchNorm, weights ascend at a rate of 0.001 and a gradient norm of 1 at
    most: without normalisation they diverge in a few steps. Whether magnitude says anything there
    is not known.

    Attributes:
        unlearning: Clean suppression, ascent on L - mu ||theta||^2 with mu = weight_decay / 2.
        preserve: a, weight of the original's clean loss; 1 - a is that of the suppressed model's.
        penalty: lambda, of the sum over neurons of mask times magnitude.
        ranking: The masks' response to this objective, or masks trained on it (paper).
        mask_silencing: What a mask multiplies: "constant" gamma alone, "zero" beta too.
    """

    reference: ClassVar[str] = (
        "Li, Jiang and Yi, Magnitude-based Neuron Pruning, arXiv 2405.17750, 2024 (reconstruction)"
    )
    needs_labels: ClassVar[bool] = True
    cost: ClassVar[str] = "about ten thousand images, forward and backward"

    unlearning: Unlearning = Unlearning(stop=None)
    preserve: float = 0.5
    penalty: float = 5e-3
    ranking: Response | MaskTraining = Response()
    mask_silencing: Silencing = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.preserve <= 1:
            raise DataError(f"expected preserve in [0, 1], got {self.preserve}")

    @classmethod
    def paper(cls) -> Self:
        """The reconstruction with RNP's published unlearning; the paper's numbers are unknown."""
        return cls(
            unlearning=Unlearning(lr=0.01, milestones=(10,), epochs=20, check="epoch", stop=None),
            ranking=MaskTraining(steps=500, closed_share=0.1),
        )

    @property
    def silencing(self) -> Silencing:
        return self.mask_silencing if isinstance(self.ranking, MaskTraining) else "zero"

    def passes(self, task: Task) -> Work:
        models = 2 if 0 < self.preserve < 1 else 1
        return (*self.unlearning.passes(task), *self.ranking.passes(task, models))

    def score(
        self,
        model: nn.Module,
        clean: CleanData,
        sites: tuple[Site, ...],
        generator: torch.Generator,
        progress: bool,
    ) -> ChannelScores:
        """Suppress the clean task, then weigh the penalty against the clean losses."""
        ascent = self.unlearning.careful(model)
        suppressed, details = ascent.unlearn(model, clean, generator, progress)
        parts = self.losses(model, suppressed, sites)
        weights = magnitudes(suppressed, sites)
        if isinstance(self.ranking, MaskTraining):
            masks, closed_at, steps = self.train(
                self.ranking, parts, weights, clean, generator, progress=progress
            )
            flat = tie_free(masks, closed_at, weights)
            details["mask_steps"] = steps
        else:
            ranking, masked = self.ranking, parts[0][1]
            stiffness = ranking.stiffness(model, clean, sites, generator)
            for _, part in parts:
                part.use_statistics_(ranking.statistics, clean.examples())
            flat = ranking.scores(
                masked,
                lambda: self.pull(ranking, parts, weights, clean, generator),
                stiffness,
                progress,
            )
            details["ranks_only"] = True
        return ChannelScores(sites, flat, repr(self), details)

    def losses(
        self, model: nn.Module, suppressed: nn.Module, sites: tuple[Site, ...]
    ) -> list[tuple[float, MaskedModel]]:
        """The weighted models whose clean losses defend the masks; one mask tensor for all."""
        a = self.preserve
        parts = [
            (weight, MaskedModel(each, sites, silencing=self.mask_silencing))
            for weight, each in ((a, model), (1 - a, suppressed))
            if weight > 0
        ]
        for _, masked in parts:
            masked.masks = parts[0][1].masks
        return parts

    def train(
        self,
        training: MaskTraining,
        parts: list[tuple[float, MaskedModel]],
        weights: Tensor,
        clean: CleanData,
        generator: torch.Generator,
        *,
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
            masked.use_statistics_(training.statistics, clean.examples())
        closed_at, steps = torch.full_like(masks, torch.inf, requires_grad=False), 0

        def gradient(batch: CleanData) -> Tensor:
            total = torch.zeros_like(masks)
            for weight, masked in parts:
                total += loss_gradient(masked, batch, weight)
                if not torch.isfinite(total).all():
                    raise ScoringError(
                        f"mask training diverged after {steps} steps (gradients of NaN or inf); "
                        "take a smaller lr"
                    )
            return total + steepness

        def note(step: int) -> None:
            nonlocal steps
            steps = step
            closed_at[(masks == 0) & (closed_at > step)] = step

        found, _ = training.train(
            masks,
            lambda: clean.batches(training.batch_size, generator),
            gradient,
            title="weight penalty",
            progress=progress,
            after=note,
        )
        for _, masked in parts:
            use_statistics_(masked.model, "running")
        return found, closed_at.float().cpu(), steps

    def pull(
        self,
        ranking: Response,
        parts: list[tuple[float, MaskedModel]],
        weights: Tensor,
        clean: CleanData,
        generator: torch.Generator,
    ) -> Tensor:
        """The gradient (number of neurons,) of the same objective at the present masks."""
        total = torch.zeros_like(weights)
        for weight, masked in parts:
            for _ in range(ranking.rounds):
                for batch in clean.batches(ranking.batch_size, generator):
                    share = weight * len(batch) / len(clean) / ranking.rounds
                    total += share * loss_gradient(masked, batch).float().cpu()
        return total + self.penalty * weights


@torch.no_grad()
def magnitudes(model: nn.Module, sites: tuple[Site, ...]) -> Tensor:
    """M (number of neurons,), on the CPU: the size of the weights that feed each neuron.

    The l1 norm of the filter (of the row, in a linear layer) before the norm layer, or of the
    weights that read a head, divided by its mean over the site: sums over 27 weights and over 4608
    do not compare.
    """
    found = []
    for site in sites:
        filters = site.weights_of(model.get_submodule(site.producer)).float().flatten(1)
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
