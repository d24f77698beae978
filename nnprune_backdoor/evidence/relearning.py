"""Does the backdoor come back? A few steps of training on a trigger, and how soon it works again.

After a purification the trigger does little, but what it worked by may be asleep rather than gone.
Min, Qin, Zhang, Shen and Cheng, "Uncovering, Explaining, and Mitigating the Superficial Safety of
Backdoor Defense", NeurIPS 2024, saw purified networks relearn their backdoor from very few poisoned
images. This is a probe in that spirit, with a recovered trigger; it mends nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.copies import frozen_copy
from ..core.data import CleanData
from ..core.norms import use_statistics_
from ..core.predictions import check_labels, predict_labels
from ..errors import DataError, ScoringError
from ..utils.progress import progress_bar
from ..utils.randomness import checked_seed, private_randomness
from ..utils.tensors import at_least_float32, placement


@dataclass(frozen=True)
class Relearned:
    """How often a trigger sends held-out clean images to its label, step by step of training."""

    target: int
    tested: int  # images; those that the model gives the label without the trigger are left out
    successes: tuple[float, ...]  # before the first step, and after each
    kept: tuple[float, ...]  # share of them that, unstamped, has the label it had at first

    @property
    def steps_to_half(self) -> int | None:
        """Steps after which the trigger works on half of the images; None: it never did."""
        return next((i for i, share in enumerate(self.successes) if share >= 0.5), None)


def relearn(
    model: nn.Module,
    clean: CleanData | Iterable[Any],
    stamp: Callable[[Tensor], Tensor],
    target: int,
    *,
    steps: int = 30,
    batch_size: int = 32,
    poisoned: float = 0.1,
    lr: float = 0.01,
    seed: int = 0,
    progress: bool = True,
) -> Relearned:
    """Trains a copy on the trigger and looks after every step whether it works.

    SGD with momentum 0.9 on all weights, gradients of a norm of 1 at most, BatchNorm's statistics
    as they are. Some images of each batch are stamped and labelled with the target, the rest keep
    their labels. Half of the images train, half are looked at. By itself the number says little:
    hold it against the same probe of a network that never had the backdoor (docs/diagnosis.md has
    some). A network may also collapse onto the target, and then reads as relearned: look at `kept`.

    Args:
        model: usually purified; left exactly as it was.
        clean: labelled clean images, normalised as the model expects.
        stamp: images (N, C, H, W) -> the same with a trigger; usually one that was recovered from
            the model as it was given (`purified.scores.triggers`).
        target: the label that it sends to.
        poisoned: share of each batch that is stamped, at least one image.

    Raises:
        DataError: see `CleanData`; or no labels, a setting out of range, or no image to look at.
        UnsupportedModelError: see `CleanData.check_against`.
        ScoringError: training diverged.
    """
    if steps < 1 or batch_size < 2 or not 0 < poisoned < 1 or not lr > 0:
        raise DataError(
            "expected steps >= 1, batch_size >= 2, poisoned in (0, 1) and lr > 0, got "
            f"{steps}, {batch_size}, {poisoned:g} and {lr:g}"
        )
    seed = checked_seed(seed)
    with private_randomness(seed), torch.enable_grad():
        data = CleanData.collect(clean)
        data.targets  # noqa: B018 - raises where there are none
        own = frozen_copy(model).float()
        (target,) = check_labels([target], data.check_against(own))
        fit, look = data.split(0.5, 0.5, seed=seed)
        with torch.no_grad():
            labels = predict_labels(own, look.images)
        others, labels = look.images[labels != target], labels[labels != target]
        if not len(others):
            raise DataError(f"the model gives every image the label {target} already")
        stamped = stamp(others)
        use_statistics_(own.requires_grad_(True), "running")
        optimiser = torch.optim.SGD(own.parameters(), lr=lr, momentum=0.9)
        generator, where = torch.Generator().manual_seed(seed), placement(own)
        successes, kept = [_share(own, stamped, target)], [1.0]
        count = max(1, round(poisoned * batch_size))
        with progress_bar(steps, "relearning the trigger", progress) as bar:
            for _ in range(steps):
                batch = next(fit.batches(batch_size, generator, replacement=True))
                images = torch.cat([stamp(batch.images[:count]), batch.images[count:]])
                wanted = batch.targets.clone()
                wanted[:count] = target
                loss = F.cross_entropy(
                    at_least_float32(own(images.to(**where))), wanted.to(where["device"])
                )
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(own.parameters(), 1.0)  # ConvNeXts diverge without
                optimiser.step()
                if not all(torch.isfinite(weight).all() for weight in own.parameters()):
                    raise ScoringError(f"relearning diverged (loss {loss.item()}); lower lr")
                successes.append(_share(own, stamped, target))
                kept.append(_share(own, others, labels))
                bar.update()
    return Relearned(target, len(others), tuple(successes), tuple(kept))


def _share(model: nn.Module, images: Tensor, labels: Tensor | int) -> float:
    """Of the images, those that get this label."""
    return (predict_labels(model, images) == labels).float().mean().item()
