"""Distillation: a pruned network learns from the answers of the network that it was made from.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, with a consistent
teacher: both see the same view of an image (Beyer et al., "Knowledge distillation: A good teacher
is patient and consistent", CVPR 2022). It gives back what pruning cost, and needs no labels.

Some images carry a trigger (a universal perturbation, a patch, or a picture that shows through),
and the student is to answer as the teacher does without it: adversarial training against what works
on all images, as in Zeng et al., "Adversarial Unlearning of Backdoors via Implicit Hypergradient",
ICLR 2022. The triggers are those of the labels that the teacher makes suspect; where it makes none
so, there are none. Where such a label still stands out in the student by what single images do,
some carry a perturbation of their own: a trigger may differ from image to image (see
triggers/individual.py). Labels that are far from single images are trained so from the start: they
never stand out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.changing import changing_weights
from ..core.copies import frozen_copy, restore_modes_
from ..core.data import CleanData
from ..core.masks import Silencing, silence_
from ..core.norms import use_statistics_
from ..core.outputs import give_same_output_
from ..core.passes import Task, Work
from ..core.prepared import Prepared
from ..core.recovered import PixelRange
from ..core.scores import Selection
from ..core.splits import jittered
from ..errors import DataError, ScoringError
from ..triggers.individual import IndividualPerturbations
from ..triggers.suspects import SuspectLabels, SuspectTrigger
from ..utils.progress import progress_bar
from ..utils.randomness import checked_seed, private_randomness
from ..utils.settings import check_settings
from ..utils.tensors import at_least_float32, placement
from .fine_tuning import (
    check_fits,
    check_trainable,
    restore_precision_,
    stamp,
    training_precision,
)
from .views import mixed, turned


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How a pruned network learns from the given one. The defaults are ours.

    Attributes:
        epochs: Passes over the images.
        lr: Learning rate of AdamW at its highest; it rises over a tenth of the steps and falls to
            zero along a cosine.
        batch_size: Images a step.
        temperature: Both networks' logits are divided by it.
        turned: Share of the images that are rotated, by up to 14 degrees, and zoomed in.
        mixed: Share of the batches in which images are blended with one another (mixup) or have a
            rectangle of one another (CutMix), half and half.
        stamped: Share of each batch that carries a recovered trigger; 0 for plain distillation.
        perturbed: Share of each batch in which each image is moved by itself, in the student as it
            is then, towards suspect labels that are far from single images or still stand out; 0
            where none are stamped.
        renewed: Epochs between two searches of the student for triggers that still work; those
            found before stay in use.
        search: Which labels the teacher makes suspect, and how their triggers are recovered.
        individual: How single images are moved towards a label.
        largest_gradient: Norm over all weights to which a larger gradient is scaled down.
        silencing: What keeping a neuron silent means (see `core.masks`).
    """

    epochs: int = 72
    lr: float = 1e-3
    batch_size: int = 64
    temperature: float = 2.0
    turned: float = 0.5
    mixed: float = 0.5
    stamped: float = 0.3
    perturbed: float = 0.05
    renewed: int = 12
    search: SuspectLabels = SuspectLabels()
    individual: IndividualPerturbations = IndividualPerturbations()
    largest_gradient: float = 1.0
    silencing: Silencing = "zero"

    def __post_init__(self) -> None:
        check_settings(self, positive=("lr", "temperature", "largest_gradient", "renewed"))
        if self.batch_size < 2 or max(self.turned, self.mixed) > 1:
            raise DataError(
                "expected a batch_size of at least 2, and turned and mixed in [0, 1], "
                f"got {self.batch_size}, {self.turned:g} and {self.mixed:g}"
            )
        if self.stamped + self.perturbed > 1:
            raise DataError(
                "expected stamped and perturbed of together at most 1, "
                f"got {self.stamped:g} and {self.perturbed:g}"
            )

    def passes(self, task: Task) -> Work:
        """What it sends through the two networks, where one label turns out to be suspect."""
        teacher = task.epochs("forward", self.batch_size, self.epochs)
        student = task.epochs("weights", self.batch_size, self.epochs)
        if not self.stamped:
            return (teacher, student)
        triggers = [*self.search.passes(task)]
        triggers += self.search.passes_again(task) * -(-self.epochs // self.renewed)
        if self.perturbed:
            moved = round(self.perturbed * student.batch)
            share = 0.5 * moved / student.batch  # where a label stands out, it does so for a while
            triggers += self.individual.passes(task, moved, share * student.images)
        return (teacher, student, *triggers)

    def scaled(self, factor: float) -> Self:
        """The same with the radius of every perturbation multiplied by a factor."""
        individual = replace(self.individual, rms=factor * self.individual.rms)
        return replace(self, search=self.search.scaled(factor), individual=individual)

    def view(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """A random view of images (N, C, H, W): turned, shifted, mirrored, mixed."""
        height, width = images.shape[2:]
        images = turned(images, self.turned, generator)
        images = jittered(images, max(1, min(height, width) // 8), generator)
        if torch.rand((), generator=generator) >= self.mixed:
            return images
        return mixed(images, generator)


def distil(
    pruned: nn.Module,
    teacher: nn.Module,
    clean: CleanData | Iterable[Any],
    settings: Distillation = Distillation(),
    *,
    selection: Selection | None = None,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """A copy of a pruned network, trained to answer as its teacher does.

    For networks that were pruned by whatever means, smaller ones too. All weights are trained,
    frozen ones too; the copy has the modes and flags of `pruned`. Both networks that are given are
    left as they were. It is no defence by itself: the teacher's answers hold its backdoor.

    Args:
        pruned: (N, C, H, W) -> (N, classes).
        teacher: the network before pruning, of the same classes.
        clean: clean images, normalised as the models expect; labels are not used.
        settings: how it is trained.
        selection: neurons of `pruned` to silence, and to keep silent after every step.
        seed: same seed, same machine, same number of threads, same result.

    Raises:
        DataError: see `Prepared.of`; or the two have other numbers of classes.
        UnsupportedModelError: see `Prepared.of`, `silence_` and `check_trainable`; or the selection
            is of a model of another shape.
        ScoringError: training diverged.
    """
    model, _ = distil_with_triggers(
        pruned, teacher, clean, settings, selection=selection, seed=seed, progress=progress
    )
    return model


def distil_with_triggers(
    pruned: nn.Module,
    teacher: nn.Module,
    clean: CleanData | Iterable[Any],
    settings: Distillation,
    *,
    selection: Selection | None,
    seed: int,
    progress: bool,
) -> tuple[nn.Module, tuple[SuspectTrigger, ...]]:
    """The same as `distil`, with the triggers of the labels that the teacher makes suspect.

    Those that were recovered from the student meanwhile are not among them.
    """
    seed = checked_seed(seed)
    with private_randomness(seed), torch.enable_grad():
        prepared = Prepared.of(pruned, clean, labels="ignored").moved()
        given = Prepared.of(teacher, prepared.clean)
        if given.classes != prepared.classes:
            raise DataError(
                f"the teacher has {given.classes} classes, the pruned network {prepared.classes}"
            )
        model = prepared.model.to(training_precision(prepared.model))
        student = _Student(model, settings, selection or Selection((), ()))
        triggers: tuple[SuspectTrigger, ...] = ()
        if settings.stamped:
            factor = settings.search.scale(given.model, prepared.clean, seed=seed)
            settings = student.settings = settings.scaled(factor)
            triggers = settings.search.suspect(given.model, prepared.clean, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        student.learn(given.model, prepared.clean, triggers, generator, progress=progress)
    restore_modes_(model, pruned)
    give_same_output_(model, pruned)
    restore_precision_(model, pruned)
    return model, triggers


class _Student:
    """Trains all weights of a model, of which some neurons stay silent."""

    def __init__(self, model: nn.Module, settings: Distillation, silent: Selection) -> None:
        self._weights = check_trainable(model)
        check_fits(model, silent)
        silence_(model, silent, silencing=settings.silencing)
        use_statistics_(model, "running")
        for weight in self._weights:
            weight.requires_grad_(True)
        self._model, self.settings, self._silent = model, settings, silent

    def learn(
        self,
        teacher: nn.Module,
        clean: CleanData,
        triggers: tuple[SuspectTrigger, ...],
        generator: torch.Generator,
        *,
        progress: bool,
    ) -> None:
        """Distil, and train against the triggers and, image by image, their labels."""
        settings, model = self.settings, self._model
        steps = settings.epochs * max(1, -(-len(clean) // settings.batch_size))
        optimiser = torch.optim.AdamW(self._weights, lr=settings.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, settings.lr, total_steps=max(steps, 2) + 1, pct_start=0.1
        )
        suspects = sorted({trigger.target for trigger in triggers})
        outstanding = settings.search.far_among(triggers) if settings.perturbed else ()
        pixels = PixelRange.seen_in(clean.images)
        with (
            changing_weights(model),
            progress_bar(settings.epochs, "distilling", progress) as bar,
        ):
            for epoch in range(settings.epochs):
                if suspects and epoch % settings.renewed == 0:
                    seed = int(torch.randint(2**31, (), generator=generator))
                    now = frozen_copy(model)
                    triggers += settings.search.still_working(now, clean, suspects, seed=seed)
                    if epoch and settings.perturbed:
                        more = settings.search.standing_out(now, clean, suspects, seed=seed)
                        outstanding = tuple(sorted({*outstanding, *more}))
                for batch in clean.batches(settings.batch_size, generator):
                    images = settings.view(batch.images, generator)
                    attacked = stamp(images, triggers, settings.stamped, generator)
                    if outstanding:
                        attacked = self._perturbed(attacked, outstanding, pixels, generator)
                    loss = self._loss(teacher, images, attacked)
                    optimiser.zero_grad(set_to_none=True)
                    loss.backward()
                    nn.utils.clip_grad_norm_(self._weights, settings.largest_gradient)
                    optimiser.step()
                    schedule.step()
                    # momentum and weight decay would wake them as well as the gradient
                    silence_(model, self._silent, silencing=settings.silencing)
                bar.update()
        optimiser.zero_grad(set_to_none=True)

    def _perturbed(
        self,
        images: Tensor,
        labels: tuple[int, ...],
        pixels: PixelRange,
        generator: torch.Generator,
    ) -> Tensor:
        """The last images (of B, in random order), each moved towards one of the labels."""
        count = round(self.settings.perturbed * len(images))
        if not count:
            return images
        label = labels[int(torch.randint(len(labels), (), generator=generator))]
        rest, last = images[:-count], images[-count:]
        moved = self.settings.individual.perturb(self._model, last, label, pixels, generator)
        return torch.cat([rest, moved])

    def _loss(self, teacher: nn.Module, images: Tensor, stamped: Tensor) -> Tensor:
        """Divergence of the answers to stamped images from the teacher's to the same without."""
        heat = self.settings.temperature
        with torch.no_grad():
            answers = at_least_float32(teacher(images.to(**placement(teacher))))
            wanted = F.log_softmax(answers / heat, 1)
        logits = self._model(stamped.to(**placement(self._model)))
        given = F.log_softmax(at_least_float32(logits) / heat, 1)
        loss = heat**2 * F.kl_div(given, wanted, reduction="batchmean", log_target=True)
        if not torch.isfinite(loss):
            raise ScoringError(f"distilling diverged (loss {loss.item()}); take a smaller lr")
        return loss
