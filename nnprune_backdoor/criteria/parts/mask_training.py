"""Train one mask a neuron by SGD, as the published methods do."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ...core.norms import Statistics
from ...core.passes import Passes, Task, Work
from ...errors import DataError
from ...utils.progress import progress_bar
from ...utils.settings import check_settings

_Batch = TypeVar("_Batch")


@dataclass(frozen=True, kw_only=True)
class MaskTraining:
    """Rank by masks that are trained from one; the trained masks, in [0, 1], are the scores.

    Attributes:
        steps: Number of updates; or give `epochs`.
        epochs: Number of passes over the images.
        lr: Learning rate of the masks.
        momentum: Of SGD.
        batch_size: Images a step.
        statistics: BatchNorm statistics while masks are trained.
        closed_share: Stop early once this share of the masks lies below `closed_below`; None for
            never.
        closed_below: Value of a mask below which its neuron counts as closed.
    """

    steps: int | None = None
    epochs: int | None = None
    lr: float = 0.2
    momentum: float = 0.9
    batch_size: int = 128
    statistics: Statistics = "batch"
    closed_share: float | None = None
    closed_below: float = 0.2

    def __post_init__(self) -> None:
        check_settings(self, positive=("batch_size",))
        if (self.steps is None) == (self.epochs is None):
            raise DataError(
                f"expected either steps or epochs of mask training, got steps={self.steps} and "
                f"epochs={self.epochs}"
            )

    def passes(self, task: Task, a_step: int = 1) -> Work:
        """With so many passes a step; as if it did not stop early."""
        steps = self.steps
        if steps is None:
            return (task.epochs("masks", self.batch_size, (self.epochs or 0) * a_step),)
        size = min(self.batch_size, task.images)
        return (Passes("masks", size, steps * size * a_step),)

    def optimiser(self, masks: Tensor) -> torch.optim.Optimizer:
        """SGD on the masks."""
        return torch.optim.SGD([masks], lr=self.lr, momentum=self.momentum)

    def train(
        self,
        masks: Tensor,
        epoch: Callable[[], Iterable[_Batch]],
        gradient: Callable[[_Batch], Tensor],
        *,
        title: str,
        progress: bool = False,
        optimiser: torch.optim.Optimizer | None = None,
        after: Callable[[int], None] | None = None,
    ) -> tuple[Tensor, int]:
        """Update the masks in place, clamped to [0, 1] after each step.

        Args:
            masks: a leaf, (number of neurons,).
            epoch: gives the batches of one pass over the images.
            gradient: of the objective, (number of neurons,), for a batch at the present masks.
            title: of the progress bar.
            optimiser: by default `optimiser(masks)`.
            after: called with the number of steps after each.

        Returns:
            the masks (number of neurons,), float32 on the CPU, and the number of steps.
        """
        optimiser = self.optimiser(masks) if optimiser is None else optimiser
        steps = 0
        total = self.epochs if self.steps is None else self.steps
        with progress_bar(total or 0, title, progress) as bar:
            for _ in itertools.count() if self.epochs is None else range(self.epochs):
                if steps == self.steps:
                    break
                for batch in epoch():
                    masks.grad = gradient(batch)
                    optimiser.step()
                    with torch.no_grad():
                        masks.clamp_(0, 1)
                    steps += 1
                    if after is not None:
                        after(steps)
                    if self.steps is not None:
                        bar.update()
                    if steps == self.steps or self._closed(masks):
                        return _found(masks), steps
                if self.epochs is not None:
                    bar.update()
        return _found(masks), steps

    def _closed(self, masks: Tensor) -> bool:
        if self.closed_share is None:
            return False
        return bool((masks < self.closed_below).float().mean() >= self.closed_share)


def _found(masks: Tensor) -> Tensor:
    return masks.detach().float().cpu()
