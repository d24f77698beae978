"""Linear response of masks: what training them would do first, without its noise.

Ours, not from a paper. A criterion's objective L pulls on the masks with the gradient
g = dL/dm at m = 1. Let the original model resist with the stiffness of its clean loss, which near
its minimum is the Fisher information f of each mask (Kirkpatrick et al., "Overcoming catastrophic
forgetting", PNAS 2017, use it for weights). Minimising g (m - 1) + f (1 - m)^2 / 2 gives
1 - m = g / f: a neuron gives way if masking it serves the objective and costs the clean task
little. Trained masks are this up to the wandering of a hundred noisy steps, after which the lowest
ones are an ensemble that only works together; see docs/results/ranking.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.compute import mean_gradients
from ...core.data import CleanData
from ...core.masks import MaskedModel
from ...core.norms import Statistics
from ...core.passes import Passes, Task
from ...core.sites import Site
from ...errors import DataError
from ...utils.progress import progress_bar
from ...utils.settings import check_settings
from ...utils.tensors import at_least_float32, placement


def sensitivity(
    model: nn.Module,
    clean: CleanData,
    sites: tuple[Site, ...],
    generator: torch.Generator,
    probe_size: int = 20,
) -> Tensor:
    """Fisher information f (number of neurons,) of each mask under the clean loss, on the CPU.

    The mean over images of the squared gradient; estimated from gradients of `probe_size` images
    at once, whose per-image parts are nearly independent, so that one backward pass serves many.
    """
    masked = MaskedModel(model, sites)
    total = torch.zeros_like(masked.masks)
    for batch in clean.batches(probe_size, generator):
        gradient = loss_gradient(masked, batch)
        total += gradient.square() * len(batch) ** 2
    return (total / len(clean)).float().cpu()


def clean_loss(masked: MaskedModel, batch: CleanData, **noise: Tensor) -> Tensor:
    """Mean cross-entropy of a batch at the present masks, differentiable in them."""
    place = placement(masked.model)
    logits = masked(batch.images.to(**place), **noise)
    return F.cross_entropy(at_least_float32(logits), batch.targets.to(place["device"]))


def loss_gradient(
    masked: MaskedModel, batch: CleanData, weight: float = 1.0, /, **noise: Tensor
) -> Tensor:
    """weight * dCE/dm (number of neurons,) on a batch, at the present masks."""

    def passes(part: CleanData) -> tuple[tuple[Tensor, ...], None]:
        return torch.autograd.grad(weight * clean_loss(masked, part, **noise), masked.masks), None

    (gradient,), _ = mean_gradients(batch, passes)
    return gradient


@dataclass(frozen=True, kw_only=True)
class Response:
    """Rank by the response of the masks: the pull of an objective over the clean task's stiffness.

    A gradient at masks of one says what silencing a single neuron would do, and neurons that stand
    in for each other hide each other. So the lowest neurons can be silenced in stages, with the
    response of the others measured anew in each; neurons that only the first stage found guilty
    need not go, and accuracy holds out longer (docs/results/ranking.md).

    Scores lie in (0, stages + 1), low = prune first; the whole part is the stage that silenced the
    neuron.

    Attributes:
        stages: How often the response is measured.
        stage_share: Share of all neurons that is silenced after each stage but the last.
        damping: Share of the mean stiffness that is added to each neuron's, so that one which
            costs nothing at all needs some reason to go.
        probe_size: Images to one gradient of the stiffness.
        rounds: Passes over the images in a stage; more than one helps where each draws fresh noise.
        batch_size: Images to one gradient of the objective.
        statistics: BatchNorm statistics while the pull is measured.
    """

    stages: int = 1
    stage_share: float = 0.0025
    damping: float = 0.1
    probe_size: int = 20
    rounds: int = 1
    batch_size: int = 128
    statistics: Statistics = "running"

    def __post_init__(self) -> None:
        check_settings(self, positive=("stages", "probe_size", "rounds", "batch_size"))
        if not 0 < self.stage_share <= 1:
            raise DataError(f"expected a stage_share in (0, 1], got {self.stage_share}")

    def passes(self, task: Task, a_step: int = 1) -> tuple[Passes, Passes]:
        """Of the stiffness, and of the objective with so many passes for each gradient."""
        return (
            task.epochs("masks", self.probe_size, 1),
            task.epochs("masks", self.batch_size, self.stages * self.rounds * a_step),
        )

    def stiffness(
        self,
        model: nn.Module,
        clean: CleanData,
        sites: tuple[Site, ...],
        generator: torch.Generator,
    ) -> Tensor:
        """`sensitivity` of the model's masks, (number of neurons,)."""
        return sensitivity(model, clean, sites, generator, self.probe_size)

    def mean(
        self,
        masked: MaskedModel,
        clean: CleanData,
        generator: torch.Generator,
        gradient: Callable[[CleanData], Tensor] | None = None,
    ) -> Tensor:
        """Mean gradient (number of neurons,) over all images and rounds, at the present masks.

        Args:
            gradient: of a batch; by default that of the cross-entropy.
        """
        total = torch.zeros_like(masked.masks)
        for _ in range(self.rounds):
            for batch in clean.batches(self.batch_size, generator):
                found = loss_gradient(masked, batch) if gradient is None else gradient(batch)
                total += len(batch) * found
        return total / (self.rounds * len(clean))

    def scores(
        self,
        masked: MaskedModel,
        pull: Callable[[], Tensor],
        stiffness: Tensor,
        progress: bool = False,
    ) -> Tensor:
        """Scores (number of neurons,), measured again after each stage.

        Args:
            masked: its masks are set to zero on the way, and to one again at the end.
            pull: the gradient (number of neurons,) at the present masks.
            stiffness: measured once, with nothing silenced.

        Returns:
            low = silenced first. A neuron that is pulled the other way is never silenced.
        """
        found = torch.zeros(len(masked.masks))
        silent = torch.zeros(len(masked.masks), dtype=torch.bool)
        with progress_bar(self.stages, "silencing in stages", progress) as bar:
            for stage in range(self.stages):
                scores = response_scores(pull(), stiffness, self.damping)
                found[~silent] = stage + scores[~silent]
                if stage < self.stages - 1:
                    remaining = scores.masked_fill(silent, torch.inf)
                    count = max(1, round(self.stage_share * len(silent)))
                    chosen = remaining.argsort(stable=True)[:count]
                    chosen = chosen[remaining[chosen] < 1]
                    silent[chosen] = True
                    # below all that is still to come, above all that went before
                    found[chosen] = stage + scores[chosen] / 2
                    with torch.no_grad():
                        masked.masks[chosen.to(masked.masks.device)] = 0
                bar.update()
        with torch.no_grad():
            masked.masks.fill_(1)
        return found


def response_scores(gradient: Tensor, stiffness: Tensor, damping: float) -> Tensor:
    """Scores in (0, 2), low = gives way first; 1 = not pulled at all.

    Args:
        gradient: g, mean over the clean images (number of neurons,).
        stiffness: f, from `sensitivity`.
        damping: share of the mean stiffness added to each, so that a neuron which costs nothing
            at all needs some reason to go.
    """
    mean = stiffness.double().mean().clamp_min(torch.finfo(torch.float64).tiny)
    pull = gradient.double().cpu() / (stiffness.double() / mean + damping)
    # two forms of 1 - pull / (1 + |pull|), each exact where it is used
    return torch.where(pull >= 0, 1 / (1 + pull), 2 - 1 / (1 + pull.abs())).float()
