"""What criteria share that unlearn the clean task first (`exposure.py`)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.compute import mean_gradients
from ...core.copies import clone
from ...core.data import CleanData
from ...core.norms import Statistics, use_statistics_
from ...core.predictions import predict_labels
from ...errors import ScoringError
from ...utils.progress import progress_bar
from ...utils.settings import check_settings
from ...utils.tensors import at_least_float32, placement
from ..base import Criterion


@dataclass(frozen=True)
class Look:
    """What a model that is being unlearned did in one epoch."""

    steps: int  # of ascent, up to the end of the epoch
    accuracy: float  # share of the clean images that got the label they had at first
    predicted: tuple[float, ...]  # share of the images that each label got, (classes,)


@dataclass(frozen=True, kw_only=True)
class Unlearning:
    """How the clean task is unlearned; RNP's paper and defaults."""

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

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def weight_decay(self) -> float:
        """Of all weights while unlearning."""
        return 5e-4

    def careful(self, model: nn.Module) -> Self:
        """These settings, or where no layer is a BatchNorm small steps of small gradients.

        Without normalisation the weights diverge in a few steps.
        """
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
            return self
        clip = 1.0 if self.unlearn_clip is None else min(self.unlearn_clip, 1.0)
        return replace(self, unlearn_lr=min(self.unlearn_lr, 1e-3), unlearn_clip=clip)

    def fitting(self, model: nn.Module, clean: CleanData) -> Self:
        """These settings, with BatchNorm's own statistics where a batch's leave little to unlearn.

        So it is with a pretrained network on images unlike those of its training. Little: a batch
        gets no more than half of its labels (`clean.targets`), or no more than `unlearn_stop`.
        """
        if self.unlearn_statistics == "running":
            return self
        tried, where = clone(model), placement(model)
        use_statistics_(tried, self.unlearn_statistics)
        parts = -(-len(clean) // self.batch_size)  # of about equal size: one image has no variance
        with torch.no_grad():
            said = [tried(x.to(**where)).argmax(1).cpu() for x in clean.images.tensor_split(parts)]
        agree = (torch.cat(said) == clean.targets).float().mean().item()
        lost = agree <= max(self._stop(model, clean), 0.5)
        return replace(self, unlearn_statistics="running") if lost else self

    def unlearn(
        self,
        model: nn.Module,
        clean: CleanData,
        generator: torch.Generator,
        progress: bool,
        looks: list[Look] | None = None,
    ) -> tuple[nn.Module, dict[str, Any]]:
        """A copy of the model after gradient ascent on all its weights, and how that went.

        Args:
            looks: gets what the model did in each epoch, if given.

        Raises:
            ScoringError: the loss or a weight became NaN or inf, or accuracy did not fall to
                `unlearn_stop` within `unlearn_epochs` (with `unlearn_missed="error"`).
        """
        unlearned = clone(model)
        weights = [weight for weight in unlearned.parameters() if weight.is_floating_point()]
        for weight in weights:
            weight.requires_grad_(True)
        use_statistics_(unlearned, self.unlearn_statistics)
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
                right, predicted = 0, []
                for batch in clean.batches(self.batch_size, generator):
                    optimiser.zero_grad(set_to_none=True)
                    logits = _set_gradients_(unlearned, batch)
                    loss = F.cross_entropy(logits, batch.targets)
                    if not torch.isfinite(loss):
                        raise ScoringError(
                            f"unlearning diverged after {steps} steps (loss {loss.item()}); "
                            "take a smaller unlearn_lr or set unlearn_clip"
                        )
                    predicted.append(logits.argmax(1))
                    hits = predicted[-1] == batch.targets
                    right += int(hits.sum())
                    # a full batch's worth of images: two wrong ones at the end are no collapse
                    recent = torch.cat([recent, hits])[-window:]
                    gone = len(recent) == window and int(recent.sum()) <= stop * window
                    if self.unlearn_check == "step" and gone:
                        reached = True
                        break
                    if self.unlearn_clip is not None:
                        nn.utils.clip_grad_norm_(weights, self.unlearn_clip)
                    optimiser.step()
                    steps += 1
                accuracies.append(right / len(clean))
                if looks is not None:
                    classes = logits.shape[1]
                    looks.append(Look(steps, accuracies[-1], _shares(predicted, classes)))
                if steps == 0:
                    raise ScoringError(
                        f"the model is right on {accuracies[-1]:.0%} of the images before any "
                        f"unlearning, at most unlearn_stop ({stop:.0%}); "
                        + self._why(model, clean, stop)
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

    def _why(self, model: nn.Module, clean: CleanData, stop: float) -> str:
        """What to do about a model that seems to have nothing to unlearn."""
        hits = predict_labels(model, clean.images) == clean.targets
        rate = hits.float().mean().item()
        if rate > stop:  # a pretrained network on images unlike those of its training
            return (
                f"that is with BatchNorm's statistics of the batch, with the model's own it is "
                f'right on {rate:.0%}: set unlearn_statistics="running"'
            )
        return "check labels and normalisation, or lower unlearn_stop"

    def _stop(self, model: nn.Module, clean: CleanData) -> float:
        if self.unlearn_stop is not None:
            return self.unlearn_stop
        classes = CleanData(clean.images).check_against(model)  # there may be more than images
        return max(0.2, min(2 / classes, 0.5))


def _set_gradients_(model: nn.Module, batch: CleanData) -> Tensor:
    """Leave the gradients of ascent on a batch in the weights; its logits (N, classes), on CPU."""
    weights, where = [w for w in model.parameters() if w.is_floating_point()], placement(model)

    def passes(part: CleanData) -> tuple[tuple[Tensor, ...], Tensor]:
        logits = at_least_float32(model(part.images.to(**where)))
        loss = F.cross_entropy(logits, part.targets.to(where["device"]))
        # zeros for weights that no pass reads, such as those of auxiliary heads
        gradients = torch.autograd.grad(-loss, weights, allow_unused=True, materialize_grads=True)
        return gradients, logits.detach().cpu()

    gradients, logits = mean_gradients(batch, passes)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    assert logits is not None
    return logits


def _shares(predicted: list[Tensor], classes: int) -> tuple[float, ...]:
    """How often each label was predicted, as shares."""
    labels = torch.cat(predicted)
    return tuple((torch.bincount(labels, minlength=classes) / len(labels)).tolist())


@dataclass(frozen=True, kw_only=True)
class UnlearningCriterion(Unlearning, Criterion):
    """A criterion whose fields named `unlearn_...` say how the clean task is unlearned."""

    @property
    @abstractmethod
    def weight_decay(self) -> float:
        """Of all weights while unlearning."""
