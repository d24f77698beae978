"""Unlearn the clean task by gradient ascent: the first half of RNP and MNP.

Li et al., "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023; MNP calls it clean
suppression. SGD with weight decay wd on -L is ascent on L - mu ||theta||^2 with mu = wd / 2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.changing import changing_weights
from ...core.checks import count_classes
from ...core.compute import mean_gradients
from ...core.copies import clone
from ...core.data import CleanData
from ...core.norms import Statistics, use_statistics_
from ...core.passes import Task, Work
from ...core.predictions import predict_labels
from ...errors import ScoringError
from ...utils.progress import progress_bar
from ...utils.settings import check_settings
from ...utils.short_repr import ShortRepr
from ...utils.tensors import at_least_float32, placement

_USUAL_STEPS = 50  # until little accuracy is left: 30 to 70 with the defaults on most networks


@dataclass(frozen=True, repr=False)
class Look(ShortRepr):
    """What a model that is being unlearned did in one epoch.

    Attributes:
        steps: Ascent steps up to the end of the epoch.
        accuracy: Share of the clean images that got the label they had at first.
        predicted: Share of the images that each label got, (classes,).
    """

    steps: int
    accuracy: float
    predicted: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Unlearning:
    """How the clean task is unlearned. The defaults are ours; `published` has RNP's.

    Attributes:
        lr: Learning rate. RNP: 0.01, at which networks that were trained briefly lose the backdoor
            as well.
        momentum: Of SGD.
        weight_decay: Of all weights.
        milestones: Epochs at which the rate falls tenfold. RNP: 10 and 20.
        epochs: Maximum number of epochs; many, since of few images an epoch is a single step. RNP:
            21.
        stop: Training accuracy at which the clean task counts as unlearned. None: twice the
            accuracy of guessing, at least 0.2 and at most 0.5.
        check: When accuracy is held against `stop`. RNP: "epoch", which overshoots on networks
            that were trained briefly.
        clip: Largest gradient norm; None for no limit. The authors' clipping never acts.
        statistics: BatchNorm statistics while unlearning.
        missed: What to do where `stop` was not reached: raise an error, or flag it in the details.
        batch_size: Images a step.
    """

    lr: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 5e-4
    milestones: tuple[int, ...] = ()
    epochs: int = 400
    stop: float | None = 0.2
    check: Literal["step", "epoch"] = "step"
    clip: float | None = 20.0
    statistics: Statistics = "batch"
    missed: Literal["error", "flag"] = "error"
    batch_size: int = 128

    def __post_init__(self) -> None:
        # a stop below 0 is never reached
        check_settings(self, positive=("epochs", "batch_size"), any_number=("stop",))

    @classmethod
    def published(cls) -> Self:
        """RNP's published code: 21 epochs at most, from a rate of 0.01."""
        return cls(lr=0.01, milestones=(10, 20), epochs=21, check="epoch", clip=None)

    def careful(self, model: nn.Module) -> Self:
        """These settings, or small steps of small gradients where no layer is a BatchNorm.

        Without normalisation the weights diverge in a few steps.
        """
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
            return self
        clip = 1.0 if self.clip is None else min(self.clip, 1.0)
        return replace(self, lr=min(self.lr, 1e-3), clip=clip)

    def fitting(self, model: nn.Module, clean: CleanData) -> Self:
        """These settings, with BatchNorm's own statistics where a batch's leave little to unlearn.

        That happens to a pretrained network on images unlike its training images. Little: under a
        batch's statistics no more than half of the images, or no more than `stop`, get their label
        (`clean.targets`).
        """
        if self.statistics == "running":
            return self
        tried = clone(model)
        use_statistics_(tried, self.statistics)
        parts = -(-len(clean) // self.batch_size)  # of about equal size: one image has no variance
        predicted = predict_labels(tried, clean.images.tensor_split(parts))
        agree = (predicted == clean.targets).float().mean().item()
        lost = agree <= max(self._stop_for(model, clean), 0.5)
        return replace(self, statistics="running") if lost else self

    def passes(self, task: Task) -> Work:
        """So many steps as unlearning usually takes; how many it will take is not known before."""
        count = min(_USUAL_STEPS / max(1, -(-task.images // self.batch_size)), self.epochs)
        usual = task.epochs("weights", self.batch_size, count)
        return (replace(usual, most=task.images * self.epochs),)

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
            looks: receives what the model did in each epoch, if given.

        Raises:
            ScoringError: the loss or a weight became NaN or inf, or accuracy did not fall to
                `stop` in time (with `missed="error"`).
        """
        unlearned, stop = clone(model), self._stop_for(model, clean)
        ascent = _Ascent(self, unlearned, min(self.batch_size, len(clean)), stop)
        accuracies: list[float] = []
        with (
            changing_weights(unlearned),
            progress_bar(self.epochs, "unlearning", progress) as bar,
        ):
            for _ in range(self.epochs):
                accuracy, predicted = ascent.epoch(clean, generator)
                accuracies.append(accuracy)
                if looks is not None:
                    looks.append(Look(ascent.steps, accuracy, predicted))
                if ascent.steps == 0:
                    raise ScoringError(
                        f"the model is right on {accuracy:.0%} of the images before any "
                        f"unlearning, which is not above stop ({stop:.0%}); "
                        + self._advice(model, clean, stop)
                    )
                bar.update()
                bar.set_postfix(accuracy=f"{accuracy:.2f}")
                if ascent.reached:
                    break
        ascent.check_finite()
        if not ascent.reached and self.missed == "error":
            raise ScoringError(
                f"after {self.epochs} epochs of unlearning the accuracy is still "
                f"{accuracies[-1]:.2f}, not {stop}; give unlearning more epochs or a larger lr, or "
                'accept it with missed="flag"'
            )
        use_statistics_(unlearned, "running")
        details = {
            "unlearn_steps": ascent.steps,
            "unlearn_accuracies": accuracies,
            "unlearn_stop_reached": ascent.reached,
        }
        return unlearned.requires_grad_(False), details

    def _advice(self, model: nn.Module, clean: CleanData, stop: float) -> str:
        """What to do about a model that seems to have nothing to unlearn."""
        hits = predict_labels(model, clean.images) == clean.targets
        rate = hits.float().mean().item()
        if rate > stop:  # a pretrained network on images unlike those of its training
            return (
                f"that is with BatchNorm's statistics of the batch, with the model's own it is "
                f'right on {rate:.0%}: unlearn with statistics="running"'
            )
        return "check labels and normalisation, or lower stop"

    def _stop_for(self, model: nn.Module, clean: CleanData) -> float:
        if self.stop is not None:
            return self.stop
        return max(0.2, min(2 / count_classes(model, clean.images), 0.5))


class _Ascent:
    """SGD on the negative loss of a model, epoch by epoch, until little accuracy is left."""

    def __init__(self, settings: Unlearning, model: nn.Module, window: int, stop: float) -> None:
        self.steps, self.reached = 0, False
        self._settings, self._model, self._window, self._stop = settings, model, window, stop
        self._weights = [weight for weight in model.parameters() if weight.is_floating_point()]
        for weight in self._weights:
            weight.requires_grad_(True)
        use_statistics_(model, settings.statistics)
        self._optimiser = torch.optim.SGD(
            self._weights,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        self._schedule = torch.optim.lr_scheduler.MultiStepLR(
            self._optimiser, list(settings.milestones), gamma=0.1
        )
        self._recent = torch.empty(0, dtype=torch.bool)  # hits, a batch's worth

    def epoch(
        self, clean: CleanData, generator: torch.Generator
    ) -> tuple[float, tuple[float, ...]]:
        """Accuracy over one epoch, and the share of the images that each label got."""
        right, predicted, classes = 0, list[Tensor](), 0
        for batch in clean.batches(self._settings.batch_size, generator):
            self._optimiser.zero_grad(set_to_none=True)
            logits = _set_gradients_(self._model, batch)
            loss = F.cross_entropy(logits, batch.targets)
            if not torch.isfinite(loss):
                raise ScoringError(
                    f"unlearning diverged after {self.steps} steps (loss {loss.item()}); give "
                    "unlearning a smaller lr, or a clip"
                )
            classes = logits.shape[1]
            predicted.append(logits.argmax(1))
            hits = predicted[-1] == batch.targets
            right += int(hits.sum())
            # over a full batch's worth of images: two wrong ones at the end are no collapse
            self._recent = torch.cat([self._recent, hits])[-self._window :]
            full = len(self._recent) == self._window
            gone = full and int(self._recent.sum()) <= self._stop * self._window
            if self._settings.check == "step" and gone:
                self.reached = True
                break
            if self._settings.clip is not None:
                nn.utils.clip_grad_norm_(self._weights, self._settings.clip)
            self._optimiser.step()
            self.steps += 1
        if self.steps:
            self._schedule.step()
        accuracy = right / len(clean)
        self.reached = self.reached or (self.steps > 0 and accuracy <= self._stop)
        return accuracy, label_shares(predicted, classes)

    def check_finite(self) -> None:
        if not all(torch.isfinite(weight).all() for weight in self._weights):
            raise ScoringError("unlearning left NaN or inf in the weights; give it a smaller lr")


def _set_gradients_(model: nn.Module, batch: CleanData) -> Tensor:
    """Leave the gradients of ascent on a batch in the weights; its logits (N, classes), on CPU."""
    weights, place = [w for w in model.parameters() if w.is_floating_point()], placement(model)

    def passes(part: CleanData) -> tuple[tuple[Tensor, ...], Tensor]:
        logits = at_least_float32(model(part.images.to(**place)))
        loss = F.cross_entropy(logits, part.targets.to(place["device"]))
        # zeros for weights that no pass reads, such as those of auxiliary heads
        gradients = torch.autograd.grad(-loss, weights, allow_unused=True, materialize_grads=True)
        return gradients, logits.detach().cpu()

    gradients, logits = mean_gradients(batch, passes)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    assert logits is not None
    return logits


def label_shares(predicted: list[Tensor], classes: int) -> tuple[float, ...]:
    """How often each label was predicted, as shares (classes,)."""
    labels = torch.cat(predicted)
    return tuple((torch.bincount(labels, minlength=classes) / len(labels)).tolist())
