"""Linear response of masks: what training them would do first, without its noise.

Ours, not from a paper. A criterion's objective L pulls on the masks with the gradient
g = dL/dm at m = 1. Let the original model resist with the stiffness of its clean loss, which near
its minimum is the Fisher information f of each mask (Kirkpatrick et al., "Overcoming catastrophic
forgetting", PNAS 2017, use it for weights). Minimising g (m - 1) + f (1 - m)^2 / 2 gives
1 - m = g / f: a neuron gives way if masking it serves the objective and costs the clean task
little. Trained masks are this up to the wandering of a hundred noisy steps, after which the lowest
ones are an ensemble that only works together; see docs/ranking.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.compute import mean_gradients
from ...core.data import CleanData
from ...core.masks import MaskedModel
from ...core.sites import Site
from ...errors import DataError
from ...utils.progress import progress_bar
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
    where = placement(masked.model)
    logits = masked(batch.images.to(**where), **noise)
    return F.cross_entropy(at_least_float32(logits), batch.targets.to(where["device"]))


def loss_gradient(
    masked: MaskedModel, batch: CleanData, weight: float = 1.0, /, **noise: Tensor
) -> Tensor:
    """weight * dCE/dm (number of neurons,) on a batch, at the present masks."""

    def passes(part: CleanData) -> tuple[tuple[Tensor, ...], None]:
        return torch.autograd.grad(weight * clean_loss(masked, part, **noise), masked.masks), None

    (gradient,), _ = mean_gradients(batch, passes)
    return gradient


def successive_scores(
    masked: MaskedModel,
    pull: Callable[[], Tensor],
    stiffness: Tensor,
    damping: float,
    *,
    stages: int,
    share: float,
    progress: bool = False,
) -> Tensor:
    """Response scores, measured again each time a few neurons have been silenced.

    A gradient at masks of one says what silencing a single neuron would do, and neurons that stand
    in for each other hide each other. So the lowest `share` of all neurons is silenced, the
    response of the others is measured anew, and so on; neurons that only the first look found
    guilty need not go, and accuracy holds out longer (docs/ranking.md).

    Args:
        masked: its masks are set to zero on the way, and to one again at the end.
        pull: the gradient (number of neurons,) at the present masks.
        stiffness, damping: as of `response_scores`; measured once, with nothing silenced.
        stages: how often; 1 is `response_scores`.
        share: of all neurons, silenced after each stage but the last; at least one goes.

    Returns:
        Scores in (0, stages + 1), low = silenced first. A neuron that is pulled the other way is
        never silenced.

    Raises:
        DataError: no stage, or a share outside (0, 1].
    """
    if stages < 1 or not 0 < share <= 1:
        raise DataError(f"expected stages >= 1 and a share in (0, 1], got {stages} and {share}")
    found = torch.zeros(len(masked.masks))
    silent = torch.zeros(len(masked.masks), dtype=torch.bool)
    with progress_bar(stages, "silencing in stages", progress) as bar:
        for stage in range(stages):
            scores = response_scores(pull(), stiffness, damping)
            found[~silent] = stage + scores[~silent]
            if stage < stages - 1:
                lowest = scores.masked_fill(silent, torch.inf)
                chosen = lowest.argsort(stable=True)[: max(1, round(share * len(silent)))]
                chosen = chosen[lowest[chosen] < 1]
                silent[chosen] = True
                # below all that is still to come, above all that went before
                found[chosen] = stage + scores[chosen] / 2
                with torch.no_grad():
                    masked.masks[chosen.to(masked.masks.device)] = 0
            bar.update()
    with torch.no_grad():
        masked.masks.fill_(1)
    return found


def mean_gradient(
    masked: MaskedModel, clean: CleanData, batch_size: int, generator: torch.Generator
) -> Tensor:
    """dCE/dm (number of neurons,) over all images, at the present masks."""
    total = torch.zeros_like(masked.masks)
    for batch in clean.batches(batch_size, generator):
        total += len(batch) * loss_gradient(masked, batch)
    return total / len(clean)


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
