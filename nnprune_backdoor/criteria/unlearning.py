"""Gradient ascent on the clean loss: what clean function needs goes, and the backdoor stays.

RNP calls it unlearning, MNP clean suppression. SGD with weight decay wd on -L is ascent on
L - mu ||theta||^2 with mu = wd / 2.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..data import CleanData, like
from ..errors import ScoringError
from ..norms import Statistics, use_statistics_
from ..progress import progress_bar
from .base import Criterion


@dataclass(frozen=True, kw_only=True)
class UnlearningCriterion(Criterion):
    """What criteria share that unlearn the clean task first; RNP's paper and defaults."""

    batch_size: int = 128
    unlearn_lr: float = 0.001  # paper 0.01; at 0.01 young networks lose the backdoor as well
    unlearn_momentum: float = 0.9
    unlearn_milestones: tuple[int, ...] = ()  # epochs at which the rate falls tenfold; paper 10, 20
    unlearn_epochs: int = 100  # at most; paper 21
    unlearn_stop: float | None = 0.2  # training accuracy at which clean function counts as gone;
    # None: twice that of guessing, at least 0.2, at most 0.5
    unlearn_check: Literal["step", "epoch"] = "step"  # paper: epoch; a young network overshoots
    unlearn_clip: float | None = 20.0  # gradient norm, after backward; the authors' never acts
    unlearn_statistics: Statistics = "batch"  # of BatchNorm while unlearning
    unlearn_missed: Literal["error", "flag"] = "error"  # the stop was not reached

    @property
    @abstractmethod
    def weight_decay(self) -> float:
        """Of all weights while unlearning."""

    def unlearn(
        self, model: nn.Module, clean: CleanData, generator: torch.Generator, progress: bool
    ) -> tuple[nn.Module, dict[str, Any]]:
        """A copy of the model after gradient ascent on all its weights, and how that went.

        Raises:
            ScoringError: the loss or a weight became NaN or inf, or accuracy did not fall to
                `unlearn_stop` within `unlearn_epochs` (with `unlearn_missed="error"`).
        """
        unlearned = copy.deepcopy(model).requires_grad_(True)
        use_statistics_(unlearned, self.unlearn_statistics)
        weights, where = list(unlearned.parameters()), like(unlearned)
        optimiser = torch.optim.SGD(
            weights,
            lr=self.unlearn_lr,
            momentum=self.unlearn_momentum,
            weight_decay=self.weight_decay,
        )
        schedule = torch.optim.lr_scheduler.MultiStepLR(
            optimiser, list(self.unlearn_milestones), gamma=0.1
        )
        stop = self._stop(model, clean)
        accuracies: list[float] = []
        steps, reached = 0, False
        recent, window = torch.empty(0, dtype=torch.bool), min(self.batch_size, len(clean))
        with progress_bar(self.unlearn_epochs, "unlearning", progress) as bar:
            for _ in range(self.unlearn_epochs):
                right = 0
                for batch in clean.batches(self.batch_size, generator):
                    logits = unlearned(batch.images.to(**where))
                    labels = batch.targets.to(where["device"])
                    loss = F.cross_entropy(logits.float(), labels)
                    if not torch.isfinite(loss):
                        raise ScoringError(
                            f"unlearning diverged after {steps} steps (loss {loss.item()}); "
                            "take a smaller unlearn_lr or set unlearn_clip"
                        )
                    hits = (logits.argmax(1) == labels).cpu()
                    right += int(hits.sum())
                    # a full batch's worth of images: two wrong ones at the end are no collapse
                    recent = torch.cat([recent, hits])[-window:]
                    gone = len(recent) == window and int(recent.sum()) <= stop * window
                    if self.unlearn_check == "step" and gone:
                        reached = True
                        break
                    optimiser.zero_grad(set_to_none=True)
                    (-loss).backward()
                    if self.unlearn_clip is not None:
                        nn.utils.clip_grad_norm_(weights, self.unlearn_clip)
                    optimiser.step()
                    steps += 1
                accuracies.append(right / len(clean))
                if steps == 0:
                    raise ScoringError(
                        f"the model is right on {accuracies[-1]:.0%} of the images before any "
                        f"unlearning, at most unlearn_stop ({stop:.0%}); check labels "
                        "and normalisation, or lower unlearn_stop"
                    )
                schedule.step()
                bar.update()
                bar.set_postfix(accuracy=f"{accuracies[-1]:.2f}")
                reached = reached or accuracies[-1] <= stop
                if reached:
                    break
        if not all(torch.isfinite(weight).all() for weight in weights):
            raise ScoringError("unlearning left NaN or inf in the weights; lower unlearn_lr")
        if not reached and self.unlearn_missed == "error":
            raise ScoringError(
                f"after {self.unlearn_epochs} epochs of unlearning the accuracy is still "
                f"{accuracies[-1]:.2f}, not {stop}; give more unlearn_epochs or a "
                'larger unlearn_lr, or accept it with unlearn_missed="flag"'
            )
        use_statistics_(unlearned, "running")
        details = {
            "unlearn_steps": steps,
            "unlearn_accuracies": accuracies,
            "unlearn_stop_reached": reached,
        }
        return unlearned.requires_grad_(False), details

    def _stop(self, model: nn.Module, clean: CleanData) -> float:
        if self.unlearn_stop is not None:
            return self.unlearn_stop
        return max(0.2, min(2 / clean.check_against(model), 0.5))
