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

from ..core.changing import changing_weights
from ..core.data import CleanData
from ..core.norms import use_statistics_
from ..core.predictions import check_labels, predict_labels
from ..core.prepared import Prepared
from ..errors import DataError, ScoringError
from ..utils.progress import progress_bar
from ..utils.randomness import checked_seed, private_randomness
from ..utils.short_repr import ShortRepr
from ..utils.tensors import at_least_float32, placement


@dataclass(frozen=True, repr=False)
class Relearned(ShortRepr):
    """How often a trigger sends held-out clean images to its label, step by step of training.

    Attributes:
        target: The trigger's label.
        tested: Number of held-out images, without those that get the label even unstamped.
        successes: The trigger's success rate before the first step and after each.
        kept: Share of the unstamped images that keep their first label, likewise.
    """

    target: int
    tested: int
    successes: tuple[float, ...]
    kept: tuple[float, ...]

    @property
    def steps_to_half(self) -> int | None:
        """Steps after which the trigger works on half of the images; None: it never did."""
        return next((i for i, share in enumerate(self.successes) if share >= 0.5), None)


@dataclass(frozen=True, kw_only=True)
class Relearning:
    """How a trigger is relearned.

    Attributes:
        steps: Number of SGD steps.
        batch_size: Images a step.
        poisoned: Share of each batch that is stamped; at least one image is.
        lr: Learning rate.
    """

    steps: int = 30
    batch_size: int = 32
    poisoned: float = 0.1
    lr: float = 0.01

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 2 or not 0 < self.poisoned < 1 or not self.lr > 0:
            raise DataError(
                "expected steps >= 1, batch_size >= 2, poisoned in (0, 1) and lr > 0, got "
                f"{self.steps}, {self.batch_size}, {self.poisoned:g} and {self.lr:g}"
            )


def relearn(
    model: nn.Module,
    clean: CleanData | Iterable[Any],
    stamp: Callable[[Tensor], Tensor],
    target: int,
    settings: Relearning = Relearning(),
    *,
    seed: int = 0,
    progress: bool = True,
) -> Relearned:
    """Train a copy on the trigger, and measure after every step whether it works.

    SGD with momentum 0.9 on all weights, gradients of a norm of 1 at most, BatchNorm's statistics
    as they are. Some images of each batch are stamped and labelled with the target, the rest keep
    their labels. Half of the images train, half measure. The number means little by itself: compare
    it with the same probe of a network that never had the backdoor (docs/results/diagnosis.md has
    some). A network may also collapse onto the target, which reads as relearned: check `kept`.

    Args:
        model: usually purified; left exactly as it was.
        clean: labelled clean images, normalised as the model expects.
        stamp: images (N, C, H, W) -> the same with a trigger; usually one that was recovered from
            the model as it was given (`purified.scores.triggers`).
        target: the label that it sends to.
        settings: how it is trained.

    Raises:
        DataError: see `CleanData`; or no labels, a setting out of range, or no image to look at.
        UnsupportedModelError: see `Prepared.of`.
        ScoringError: training diverged.
    """
    seed = checked_seed(seed)
    with private_randomness(seed), torch.enable_grad():
        prepared = Prepared.of(model, clean, labels="needed")
        frozen = prepared.model.float()
        (target,) = check_labels([target], prepared.classes)
        fit, look = prepared.clean.split(0.5, 0.5, seed=seed)
        with torch.no_grad():
            labels = predict_labels(frozen, look.images)
        others, labels = look.images[labels != target], labels[labels != target]
        if not len(others):
            raise DataError(
                f"the model gives all {len(look)} held-out images the label {target} already"
            )
        stamped = stamp(others.clone())  # which it may write into
        trainer = _Trainer(frozen, fit, stamp, target=target, settings=settings, seed=seed)
        successes, kept = [_share(frozen, stamped, target)], [1.0]
        with (
            changing_weights(frozen),
            progress_bar(settings.steps, "relearning the trigger", progress) as bar,
        ):
            for _ in range(settings.steps):
                trainer.step()
                successes.append(_share(frozen, stamped, target))
                kept.append(_share(frozen, others, labels))
                bar.update()
    return Relearned(target, len(others), tuple(successes), tuple(kept))


class _Trainer:
    """SGD on batches of which a part is stamped and labelled with the target."""

    def __init__(
        self,
        model: nn.Module,
        clean: CleanData,
        stamp: Callable[[Tensor], Tensor],
        *,
        target: int,
        settings: Relearning,
        seed: int,
    ) -> None:
        use_statistics_(model.requires_grad_(True), "running")
        self._model, self._clean, self._stamp, self._target = model, clean, stamp, target
        self._optimiser = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=0.9)
        self._generator = torch.Generator().manual_seed(seed)
        self._size = settings.batch_size
        self._count = max(1, round(settings.poisoned * settings.batch_size))

    def step(self) -> None:
        """One batch; ScoringError where training diverges."""
        place, count = placement(self._model), self._count
        batch = next(self._clean.batches(self._size, self._generator, replacement=True))
        images = torch.cat([self._stamp(batch.images[:count]), batch.images[count:]])
        wanted = batch.targets.clone()
        wanted[:count] = self._target
        logits = at_least_float32(self._model(images.to(**place)))
        loss = F.cross_entropy(logits, wanted.to(place["device"]))
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)  # ConvNeXts diverge without
        self._optimiser.step()
        if not all(torch.isfinite(weight).all() for weight in self._model.parameters()):
            raise ScoringError(f"relearning diverged (loss {loss.item()}); lower lr")


def _share(model: nn.Module, images: Tensor, labels: Tensor | int) -> float:
    """Of the images, those that get this label."""
    return (predict_labels(model, images) == labels).float().mean().item()
