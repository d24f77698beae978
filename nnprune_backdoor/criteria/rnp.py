"""Reconstructive Neuron Pruning (RNP).

Li, Lyu, Ma, Koren, Lyu, Li and Jiang, "Reconstructive Neuron Pruning for Backdoor Defense",
ICML 2023, https://arxiv.org/abs/2305.14876. Unlearn the clean task by gradient ascent until
accuracy has collapsed, but the backdoor has not; then ask which neurons must be masked for the
clean task to come back. Those were the backdoor's.

`RNP.paper()` is the authors' published code. The defaults differ, for the reasons and with the
numbers in docs/ranking.md: unlearning takes ten times smaller steps, of bounded gradient, and looks
after each of them whether to stop; and recovery is a `response`, not a run of mask training.
Fields without a remark keep the published value.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import CleanData, like
from ..errors import ScoringError
from ..masking import MaskedModel, Silencing
from ..norms import Statistics, use_statistics_
from ..progress import progress_bar
from ..scores import ChannelScores, Site
from .base import Criterion, register_criterion
from .response import loss_gradient, response_scores, sensitivity


@register_criterion("rnp")
@dataclass(frozen=True, kw_only=True)
class RNP(Criterion):
    """Masks that bring the clean task back after it was unlearned: low = backdoor.

    Scores of the trained masks lie in [0, 1]; those of the response in (0, 2), 1 meaning that
    the neuron does not matter for recovery.
    """

    reference: ClassVar[str] = "Li et al., Reconstructive Neuron Pruning, ICML 2023"
    needs_labels: ClassVar[bool] = True

    batch_size: int = 128
    unlearn_lr: float = 0.001  # paper 0.01; at 0.01 young networks lose the backdoor as well
    unlearn_momentum: float = 0.9
    unlearn_weight_decay: float = 5e-4
    unlearn_milestones: tuple[int, ...] = ()  # epochs at which the rate falls tenfold; paper 10, 20
    unlearn_epochs: int = 100  # at most; paper 21
    unlearn_stop: float = 0.2  # training accuracy at which clean function counts as gone
    unlearn_check: Literal["step", "epoch"] = "step"  # paper: epoch; a young network overshoots
    unlearn_clip: float | None = 20.0  # gradient norm, after backward; the authors' never acts
    unlearn_statistics: Statistics = "batch"  # of BatchNorm while unlearning
    unlearn_missed: Literal["error", "flag"] = "error"  # the stop was not reached

    recovery: Literal["response", "masks"] = "response"  # paper: masks
    damping: float = 0.1  # response: share of the mean clean sensitivity added to each neuron's
    probe_size: int = 20  # response: images a gradient of the clean sensitivity

    recover_epochs: int = 20  # masks: epochs
    recover_lr: float = 0.2  # masks: step
    recover_momentum: float = 0.9  # masks
    alpha: float = 0.2  # masks: weight of the loss; only scales the step
    recover_statistics: Statistics = "batch"  # masks: BatchNorm while recovering
    mask_means: Silencing = "constant"  # gamma only; "zero" masks beta as well

    @classmethod
    def paper(cls) -> Self:
        """The authors' published code: 21 epochs of unlearning at most, 20 of mask training."""
        return cls(
            unlearn_lr=0.01,
            unlearn_milestones=(10, 20),
            unlearn_epochs=21,
            unlearn_check="epoch",
            unlearn_clip=None,
            recovery="masks",
        )

    def score(
        self,
        model: nn.Module,
        clean: CleanData,
        sites: tuple[Site, ...],
        generator: torch.Generator,
        progress: bool,
    ) -> ChannelScores:
        """Unlearn, recover; the masks are the scores."""
        unlearned, details = self.unlearn(model, clean, generator, progress)
        if self.recovery == "masks":
            flat = self.recover(unlearned, clean, sites, generator, progress)
        else:
            flat = self.respond(model, unlearned, clean, sites, generator)
        return ChannelScores(sites, flat, repr(self), details)

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
        weights = list(unlearned.parameters())
        optimiser = torch.optim.SGD(
            weights,
            lr=self.unlearn_lr,
            momentum=self.unlearn_momentum,
            weight_decay=self.unlearn_weight_decay,
        )
        schedule = torch.optim.lr_scheduler.MultiStepLR(
            optimiser, list(self.unlearn_milestones), gamma=0.1
        )
        accuracies: list[float] = []
        steps, reached = 0, False
        recent, window = torch.empty(0, dtype=torch.bool), min(self.batch_size, len(clean))
        with progress_bar(self.unlearn_epochs, "unlearning", progress) as bar:
            for _ in range(self.unlearn_epochs):
                right = 0
                for batch in clean.batches(self.batch_size, generator):
                    logits, labels = _run(unlearned, batch)
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
                    gone = len(recent) == window and int(recent.sum()) <= self.unlearn_stop * window
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
                        f"unlearning, at most unlearn_stop ({self.unlearn_stop:.0%}); check labels "
                        "and normalisation, or lower unlearn_stop"
                    )
                schedule.step()
                bar.update()
                bar.set_postfix(accuracy=f"{accuracies[-1]:.2f}")
                reached = reached or accuracies[-1] <= self.unlearn_stop
                if reached:
                    break
        if not all(torch.isfinite(weight).all() for weight in weights):
            raise ScoringError("unlearning left NaN or inf in the weights; lower unlearn_lr")
        if not reached and self.unlearn_missed == "error":
            raise ScoringError(
                f"after {self.unlearn_epochs} epochs of unlearning the accuracy is still "
                f"{accuracies[-1]:.2f}, not {self.unlearn_stop}; give more unlearn_epochs or a "
                'larger unlearn_lr, or accept it with unlearn_missed="flag"'
            )
        use_statistics_(unlearned, "running")
        details = {
            "unlearn_steps": steps,
            "unlearn_accuracies": accuracies,
            "unlearn_stop_reached": reached,
        }
        return unlearned.requires_grad_(False), details

    def recover(
        self,
        unlearned: nn.Module,
        clean: CleanData,
        sites: tuple[Site, ...],
        generator: torch.Generator,
        progress: bool,
    ) -> Tensor:
        """Train one mask a neuron on the unlearned model; returns them, (number of neurons,)."""
        masked = MaskedModel(unlearned, sites, silencing=self.mask_means)
        use_statistics_(unlearned, self.recover_statistics)
        optimiser = torch.optim.SGD(
            [masked.masks], lr=self.recover_lr, momentum=self.recover_momentum
        )
        with progress_bar(self.recover_epochs, "recovering", progress) as bar:
            for _ in range(self.recover_epochs):
                for batch in clean.batches(self.batch_size, generator):
                    logits, labels = _run(masked, batch, like(unlearned))
                    loss = self.alpha * F.cross_entropy(logits.float(), labels)
                    optimiser.zero_grad(set_to_none=True)
                    loss.backward()
                    optimiser.step()
                    with torch.no_grad():
                        masked.masks.clamp_(0, 1)
                bar.update()
        return masked.masks.detach().float().cpu()

    def respond(
        self,
        model: nn.Module,
        unlearned: nn.Module,
        clean: CleanData,
        sites: tuple[Site, ...],
        generator: torch.Generator,
    ) -> Tensor:
        """How far each mask gives way to the unlearned model's wish to recover."""
        masked = MaskedModel(unlearned, sites, silencing=self.mask_means)
        pull = torch.zeros_like(masked.masks)
        for batch in clean.batches(self.batch_size, generator):
            pull += len(batch) * loss_gradient(masked, batch)
        stiffness = sensitivity(model, clean, sites, generator, self.probe_size)
        return response_scores(pull / len(clean), stiffness, self.damping)


def _run(
    model: nn.Module | MaskedModel, batch: CleanData, where: dict[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Logits and labels of a batch, on the model's device."""
    if where is None:
        assert isinstance(model, nn.Module)
        where = like(model)
    return model(batch.images.to(**where)), batch.targets.to(where["device"])
