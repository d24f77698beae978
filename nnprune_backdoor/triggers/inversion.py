"""Trigger recovery: the smallest mask and pattern that send clean images to one label.

Wang, Yao, Shan, Li, Viswanath, Zheng and Zhao, "Neural Cleanse: Identifying and Mitigating Backdoor
Attacks in Neural Networks", IEEE S&P 2019. A backdoor is a short cut to the target, so the trigger
recovered for the target is smaller than that for any other label. Only clean images are needed,
and no labels.

Mixing commutes with normalisation: (1 - m) x + m p is the same blend whether x and p are pixels or
normalised pixels, channel by channel. So the blend is made where the model looks, and what pixel
space demands is kept by `PixelRange`: the pattern stays between the lowest and the highest value
that a valid pixel has there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.data import CleanData
from ..core.passes import Task, Work
from ..core.predictions import predict_labels
from ..core.recovered import PixelRange, RecoveredTrigger
from ..errors import DataError, ScoringError
from ..utils.progress import progress_bar
from ..utils.randomness import checked_seed, private_randomness
from ..utils.short_repr import ShortRepr
from ..utils.tensors import at_least_float32, placement
from .search import Search, labels_at_once, search_passes


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """How triggers are recovered: Adam on the logits of mask and pattern, for each label

        mean over images of CE(model((1 - mask) x + mask pattern), label) + penalty * sum(mask).

    The penalty is Neural Cleanse's: it grows while the trigger works and falls while it does not,
    and the smallest mask that worked is kept. Ours is quicker at it (fewer steps, gentler factors);
    see docs/results/inversion.md. Other values are those of the authors' code.

    Attributes:
        steps: Optimisation steps. The authors: up to 1000 epochs.
        batch_size: Images for each label and step.
        lr: Of Adam.
        betas: Of Adam.
        penalty: Weight of the mask's sum at the start, at 32 x 32 pixels; scaled by 1024 / (H W).
        raise_by: Factor of the penalty while the trigger works. The authors: 2, and they wait 5
            epochs where this waits 5 steps.
        lower_by: Divisor of the penalty while it does not. The authors: 2 ** 1.5.
        patience: Steps between two checks of success and penalty.
        enough: Success rate at which a trigger works.
        held_out: Share of the images that only measure success.
    """

    steps: int = 200
    batch_size: int = 32
    lr: float = 0.1
    betas: tuple[float, float] = (0.5, 0.9)
    penalty: float = 1e-3
    raise_by: float = 1.5
    lower_by: float = 1.5**1.5
    patience: int = 5
    enough: float = 0.99
    held_out: float = 0.2

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.patience) < 1:
            raise DataError("expected steps, batch_size and patience of at least 1")

    def passes(self, task: Task, labels: int) -> Work:
        """What recovering so many labels' triggers sends through the network."""
        held = self.held_out * task.images
        fit = task.images - held
        search = search_passes(task, fit, self.batch_size, self.steps, labels)
        groups = math.ceil(labels / labels_at_once(task.at_once, self.batch_size, round(fit)))
        return (*search, task.forward(groups * fit + 2 * labels * held))

    def recover(
        self,
        model: nn.Module,
        clean: CleanData | Iterable[Any],
        labels: Iterable[SupportsIndex] | None = None,
        *,
        pixels: PixelRange | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> tuple[RecoveredTrigger, ...]:
        """One trigger a label, several labels to a forward pass.

        A label's trigger does not depend on which other labels are asked for. One that does not
        converge is returned as well, at its most successful: look at `success`.

        Args:
            model: a classifier; it is left as it was.
            clean: clean images, normalised as the model expects. Labels are not looked at.
            labels: by default every class.
            pixels: the valid range; by default that seen in the images.

        Raises:
            DataError: images outside the range, too few to split, no such label.
            UnsupportedModelError: see `core.copies.clone`.
            ScoringError: the loss became NaN or inf.
        """
        seed = checked_seed(seed)
        with private_randomness(seed), torch.enable_grad():  # a loader may shuffle
            search = Search.of(
                model,
                clean,
                labels,
                pixels,
                held_out=self.held_out,
                batch_size=self.batch_size,
                seed=seed,
            )
            found: list[RecoveredTrigger] = []
            steps = self.steps * len(search.groups)
            with progress_bar(steps, "recovering triggers", progress) as bar:
                for group in search.groups:
                    found += self._descend(search, group, seed=seed, bar=bar)
            return tuple(trigger.tested_on(search.model, search.held) for trigger in found)

    def _descend(
        self, search: Search, labels: list[int], *, seed: int, bar: Any
    ) -> list[RecoveredTrigger]:
        """Gradient descent on the triggers of a few labels at once (K of them)."""
        model, fit, pixels = search.model, search.fit, search.pixels
        place = placement(model)
        device, count = place["device"], len(labels)
        channels, height, width = fit.images.shape[1:]
        low, high = pixels.low.to(device), pixels.high.to(device)
        targets = torch.tensor(labels, device=device)
        already = predict_labels(model, fit.images).to(device)
        # beginnings and batches depend on the seed and the label alone, not on the company
        start = torch.stack([_start(seed, label, channels + 1, height, width) for label in labels])
        logits = start.to(device).requires_grad_(True)  # (K, 1 + C, H, W): mask, pattern
        optimiser = torch.optim.Adam([logits], lr=self.lr, betas=self.betas)
        penalty = torch.full((count,), self.penalty * 1024 / (height * width), device=device)
        hits, seen = torch.zeros(2, count, device=device)
        best = torch.full((2, count), -torch.inf, device=device)  # success, then minus the norm
        kept, kept_at = logits.detach().clone(), [0] * count

        for step, chosen in enumerate(self._plan(len(fit), seed), start=1):
            images = fit.images[chosen].to(**place)
            counts = (already[chosen.to(device)] != targets[:, None]).float()  # (K, B)
            mask, pattern = _mask_and_pattern(logits, low, high)
            stamped = (1 - mask)[:, None] * images + (mask * pattern)[:, None]
            output = at_least_float32(model(stamped.flatten(0, 1).to(images.dtype)))
            wanted = targets.repeat_interleave(len(images))
            losses = F.cross_entropy(output, wanted, reduction="none").view(count, -1)
            loss = (losses * counts).sum(1) / counts.sum(1).clamp_min(1)
            norms = mask.sum((1, 2, 3))
            objective = (loss + penalty * norms).sum()
            if not torch.isfinite(objective):
                raise ScoringError(
                    f"trigger recovery diverged after {step - 1} steps (loss {objective.item()}); "
                    "does the model give finite logits on all valid images?"
                )
            hits += ((output.argmax(1) == wanted).view(count, -1) * counts).sum(1)
            seen += counts.sum(1)
            if step % self.patience == 0 or step == self.steps:
                success = hits / seen.clamp_min(1)
                works = success >= self.enough
                now = torch.stack([success.clamp_max(self.enough), -norms.detach()])
                better = (now[0] > best[0]) | ((now[0] == best[0]) & (now[1] > best[1]))
                best = torch.where(better, now, best)
                kept = torch.where(better[:, None, None, None], logits.detach(), kept)
                kept_at = [step if b else k for b, k in zip(better.tolist(), kept_at, strict=True)]
                penalty = torch.where(works, penalty * self.raise_by, penalty / self.lower_by)
                hits, seen = torch.zeros(2, count, device=device)
            (logits.grad,) = torch.autograd.grad(objective, logits)
            optimiser.step()
            bar.update()
        masks, patterns = (part.cpu() for part in _mask_and_pattern(kept, low, high))
        return [
            RecoveredTrigger(label, mask, pattern, 0.0, 0, at)
            for label, mask, pattern, at in zip(labels, masks, patterns, kept_at, strict=True)
        ]

    def _plan(self, count: int, seed: int) -> Iterator[Tensor]:
        """Indices of each step's images, epoch after epoch without a gap."""
        generator, size = torch.Generator().manual_seed(seed), min(self.batch_size, count)
        epochs = -(-self.steps * size // count)
        order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
        yield from order[: self.steps * size].split(size)


@dataclass(frozen=True, eq=False, repr=False)
class TargetEvidence(ShortRepr):
    """What the recovered triggers of all labels say about which is the attacker's target.

    `sizes` are the triggers' norms; a label whose trigger does not work counts as needing the
    whole image. `anomaly` says how far below the bulk log(size) lies, (median - x) / spread with
    the spread from the median absolute deviation. Neural Cleanse takes sizes as they are and calls
    2 suspicious; ours span two orders of magnitude. It points to the target, and does not tell
    whether there is one: a benign network reached 5.5 (docs/results/diagnosis.md).

    Attributes:
        trigger: The smallest that works; None: none does.
    """

    triggers: tuple[RecoveredTrigger, ...]
    sizes: tuple[float, ...]
    anomaly: tuple[float, ...]
    trigger: RecoveredTrigger | None

    @property
    def target(self) -> int | None:
        """The label of the smallest trigger that works, if any does."""
        return None if self.trigger is None else self.trigger.target

    @classmethod
    def of(cls, triggers: Sequence[RecoveredTrigger], min_success: float = 0.75) -> Self:
        """Weigh one trigger a label; those that work have at least `min_success`."""
        working = [trigger for trigger in triggers if trigger.success >= min_success]
        sizes = torch.tensor(
            [
                float(trigger.norm if trigger in working else trigger.mask.numel())
                for trigger in triggers
            ]
        )
        smallest = min(working, key=lambda trigger: trigger.norm, default=None)
        anomaly = tuple(anomalies(sizes).tolist())
        return cls(tuple(triggers), tuple(sizes.tolist()), anomaly, smallest)


def anomalies(sizes: Tensor) -> Tensor:
    """How far the log of each size (K,) lies below the bulk, in robust standard deviations."""
    logs = sizes.clamp_min(1e-3).log()
    below = logs.quantile(0.5) - logs
    spread = 1.4826 * below.abs().quantile(0.5)
    if spread == 0:  # more than half alike: sigma of a normal from its mean deviation
        spread = (1.2533 * below.abs().mean()).clamp_min(torch.finfo(torch.float32).tiny)
    return below / spread


def relative_sizes(sizes: Tensor) -> Tensor:
    """Each size (K,) as a share of the median one.

    Unlike an anomaly it does not ask how far the others lie apart, which among ten is mostly noise.
    """
    sizes = sizes.clamp_min(1e-3)
    return sizes / sizes.quantile(0.5)


def _start(seed: int, label: int, *shape: int) -> Tensor:
    """Logits of uniform numbers: a random mask over a random picture."""
    generator = torch.Generator().manual_seed(seed + label)
    return torch.logit(torch.rand(shape, generator=generator), eps=0.01)


def _mask_and_pattern(logits: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(K, 1 + C, H, W) -> masks (K, 1, H, W) in [0, 1], patterns (K, C, H, W) in [low, high]."""
    unit = logits.sigmoid()
    return unit[:, :1], low + (high - low) * unit[:, 1:]
