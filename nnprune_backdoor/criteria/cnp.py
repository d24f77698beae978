"""Contrastive Neuron Pruning (CNP).

Feng, Ma, Liu, Zhang, Cai and Xia, "Contrastive Neuron Pruning for Backdoor Defense", IEEE
Transactions on Image Processing 34, 2025, https://doi.org/10.1109/TIP.2025.3539466. In feature
space, triggered images lie apart from benign ones. Find the target, recover its trigger, stamp it
on clean images, and let masks learn to bring stamped images back to the benign side: what they
close was the backdoor's. No labels are needed.

`CNP.paper()` is the authors' published code. The defaults differ in three named ways, for the
reasons and with the numbers in docs/results/cnp.md: the target is the label of the smallest trigger
(`candidates`), the trigger is inverted until small (`inversion`), and the masks' `Response` to the
contrastive loss replaces their training (`ranking`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.checks import count_classes
from ..core.compute import mean_gradients
from ..core.data import CleanData
from ..core.masks import MaskedModel, Silencing
from ..core.passes import Task, Work
from ..core.predictions import check_labels, predict_labels
from ..core.recovered import PixelRange, RecoveredTrigger
from ..core.scores import ChannelScores
from ..core.sites import Site, find_classifiers, find_sites
from ..errors import DataError, ScoringError
from ..utils.progress import progress_bar
from ..utils.settings import check_settings
from ..utils.tensors import at_least_float32, placement
from .base import register_criterion
from .parts.mask_training import MaskTraining
from .parts.noise import adversarial_noise
from .parts.response import Response
from .parts.trigger import TriggerCriterion


@dataclass(frozen=True, kw_only=True)
class PlateauTraining(MaskTraining):
    """Mask training whose learning rate halves where the share of images recovered stalls.

    Attributes:
        least_lr: The rate does not fall below this.
        patience: Number of checks without progress after which it halves.
        check_every: Steps between two checks.
    """

    least_lr: float = 0.01
    patience: int = 2
    check_every: int = 40

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, positive=("check_every",))

    def schedule(
        self, optimiser: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
        """To be stepped with the share of images recovered."""
        return torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimiser, mode="max", factor=0.5, patience=self.patience, min_lr=self.least_lr
        )


@register_criterion("cnp")
@dataclass(frozen=True, kw_only=True)
class CNP(TriggerCriterion):
    """Scores a neuron by how far its mask must close for stamped images to have benign features.

    Low scores mark backdoor neurons. Wherever the method speaks of labels, the model's own
    predictions serve.

    Attributes:
        stamp: Your own trigger in place of a recovered one: images (N, C, H, W), normalised as the
            model expects, to images of the same shape.
        candidates: Number of labels to invert, those that noise leads to most; None for all.
            Published: 1.
        noise_passes: Draws per image when candidates are sought.
        inversion: How the trigger is recovered: until it is small, or as in the authors' code.
        inversion_lr: Learning rate of the authors' inversion.
        inversion_penalty: Weight of the sum of the mask in the authors' inversion, at 32 x 32
            pixels; times 1024 / (H W).
        ranking: The masks' response to the contrastive loss, or masks trained on it (published:
            1200 steps).
        temperature: tau of the contrastive loss.
        noise_budget: epsilon, the largest relative change of a weight or bias at the start.
        noise_steps: Ascent steps of the noise.
        project_noise: Keep the noise within [-epsilon, epsilon]; the authors' reaches 2 epsilon.
        mirror: Mirror images at random. Published: True, which digits and signs forbid.
    """

    reference: ClassVar[str] = "Feng et al., Contrastive Neuron Pruning, IEEE TIP 2025"
    needs_labels: ClassVar[bool] = False
    cost: ClassVar[str] = "as tac, then a few passes over the images"

    stamp: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    candidates: int | None = None
    noise_passes: int = 5
    inversion: Literal["smallest", "authors"] = "smallest"
    inversion_lr: float = 0.005
    inversion_penalty: float = 0.01
    ranking: Response | PlateauTraining = Response(stages=20)
    temperature: float = 0.3
    noise_budget: float = 0.4
    noise_steps: int = 1
    project_noise: bool = False
    mirror: bool = False

    def __post_init__(self) -> None:
        if self.candidates is not None and self.candidates < 1:
            raise DataError(f"expected candidates of at least 1, got {self.candidates}")
        super().__post_init__()

    @property
    def silencing(self) -> Silencing:
        return "constant" if isinstance(self.ranking, MaskTraining) else "zero"

    @property
    def recovers_triggers(self) -> bool:
        return self.stamp is None

    @classmethod
    def paper(cls) -> Self:
        """The authors' published code. They prune 1 %: `selector=LowestFraction(0.01)`."""
        return cls(
            candidates=1,
            inversion="authors",
            steps=800,
            batch_size=128,
            min_success=0.0,
            ranking=PlateauTraining(steps=1200),
            mirror=True,
        )

    def passes(self, task: Task) -> Work:
        # a gradient: the noise, then three views under the masks and two without
        under_masks = self.ranking.passes(task, self.noise_steps + 3)
        without = (replace(each, kind="forward", images=each.images / 2) for each in under_masks)
        noise: Work = ()
        if self.candidates is not None and self.stamp is None:
            size, drawn = self.ranking.batch_size, self.noise_passes
            noise = (
                task.epochs("masks", size, self.noise_steps * drawn),
                task.epochs("forward", size, 2 * drawn),
            )
        found = self.recovery(task) if self.stamp is None else ()
        return (*noise, *found, *under_masks, *without)

    def recovery(self, task: Task) -> Work:
        if self.target is None and self.candidates is not None:
            task = replace(task, classes=self.candidates if self.candidates > 1 else 0)
        return super().recovery(task)

    def score(
        self,
        model: nn.Module,
        clean: CleanData,
        sites: tuple[Site, ...],
        generator: torch.Generator,
        progress: bool,
    ) -> ChannelScores:
        """Find the target, recover its trigger, rank by what tells stamped from benign features."""
        unlabelled = CleanData(clean.images)
        heads = find_classifiers(model, clean.images[:2].to(**placement(model)))
        stamp = self.stamp
        details: dict[str, Any] = {"trigger": "given"}
        triggers: tuple[RecoveredTrigger, ...] = ()
        if stamp is None:
            stamp, details = self.recover(model, unlabelled, generator, progress)
            triggers = (stamp,)
        views = _Views(model, sites, heads, stamp)
        if isinstance(self.ranking, MaskTraining):
            flat, trained = self.train(self.ranking, views, unlabelled, generator, progress)
            details |= trained
        else:
            ranking = self.ranking
            predicted = CleanData(clean.images, predict_labels(model, clean.images))
            stiffness = ranking.stiffness(model, predicted, sites, generator)
            views.masked.use_statistics_(ranking.statistics, clean.examples())

            def gradient(batch: CleanData) -> Tensor:
                return self.gradient(views, self.augmented(batch.images, generator), generator)[0]

            flat = ranking.scores(
                views.masked,
                lambda: ranking.mean(views.masked, unlabelled, generator, gradient),
                stiffness,
                progress,
            )
            details["ranks_only"] = True
        return ChannelScores(sites, flat, repr(self), details, triggers)

    # ---- target and trigger -----------------------------------------------------------------

    def find_target(
        self, model: nn.Module, clean: CleanData, seed: int, progress: bool
    ) -> tuple[int, dict[str, Any]]:
        """The authors' noise rule, as far as `candidates` asks for it.

        1: the label that noise leads to is the target. More: that of the smallest trigger among
        so many labels that noise leads to, or among all labels if none of them works. None: that
        of the smallest trigger among all labels.
        """
        if self.candidates is None:
            return super().find_target(model, clean, seed, progress)
        increase = self.noise_increase(model, clean, torch.Generator().manual_seed(seed))
        likely = increase.argsort(descending=True, stable=True)[: self.candidates].tolist()
        details: dict[str, Any] = {"noise_increase": increase.tolist(), "candidates": likely}
        if len(likely) == 1:
            return likely[0], details
        evidence = self.search(model, clean, likely, seed, progress)
        if evidence.target is None:
            evidence = self.search(model, clean, None, seed, progress)
        target, search = self.believed(evidence)
        return target, {**details, **search}

    def noise_increase(
        self, model: nn.Module, clean: CleanData, generator: torch.Generator
    ) -> Tensor:
        """How many more images get each label (classes,) under adversarial noise than without.

        The noise is on every neuron of the model, whichever of them are to be scored.
        """
        place = placement(model)
        masked = MaskedModel(model, find_sites(model, clean.images[:2].to(**place)))
        size = self.ranking.batch_size
        draws = self.draws(clean, generator, size)
        increase = torch.zeros(count_classes(model, clean.images), dtype=torch.int64)
        for images in islice(draws, -(-self.noise_passes * len(clean) // size)):
            here = images.to(**place)
            with torch.no_grad():
                before = masked(here).argmax(1)
            noise = self.noise(masked, here, before, generator)
            with torch.no_grad():
                after = masked(here, **noise).argmax(1)
            increase += after.cpu().bincount(minlength=len(increase))
            increase -= before.cpu().bincount(minlength=len(increase))
        return increase

    def invert(
        self, model: nn.Module, clean: CleanData, target: int, seed: int, progress: bool
    ) -> RecoveredTrigger:
        """The smallest trigger that works, or the authors' inversion.

        Theirs: Adam on mask and pattern themselves, clamped to valid pixels; a fixed penalty; all
        images, those that have the label already included; the last iterate.
        """
        if self.inversion == "smallest":
            return super().invert(model, clean, target, seed, progress)
        (target,) = check_labels([target], count_classes(model, clean.images))
        pixels = self.pixels or PixelRange.seen_in(clean.images)
        pixels.check(clean.images)
        place, generator = placement(model), torch.Generator().manual_seed(seed)
        channels, height, width = clean.images.shape[1:]
        penalty = self.inversion_penalty * 1024 / (height * width)
        unit = torch.rand(1 + channels, height, width, generator=generator)  # mask, pattern
        unit = unit.to(place["device"]).requires_grad_(True)
        low, high = pixels.low.to(unit), pixels.high.to(unit)
        optimiser = torch.optim.Adam([unit], lr=self.inversion_lr)
        draws = islice(self.draws(clean, generator, self.batch_size), self.steps)
        with progress_bar(self.steps, "recovering the trigger", progress) as bar:
            for images in draws:
                mask, pattern = unit[:1], low + (high - low) * unit[1:]
                stamped = (1 - mask) * images.to(place["device"]) + mask * pattern
                logits = at_least_float32(model(stamped.to(place["dtype"])))
                labels = torch.full((len(images),), target, device=logits.device)
                loss = F.cross_entropy(logits, labels) + penalty * mask.sum()
                _check_finite(loss, "trigger recovery")
                (unit.grad,) = torch.autograd.grad(loss, unit)
                optimiser.step()
                with torch.no_grad():
                    unit.clamp_(0, 1)
                bar.update()
        mask, pattern = unit.detach()[:1], low + (high - low) * unit.detach()[1:]
        trigger = RecoveredTrigger(target, mask.cpu(), pattern.cpu(), 0.0, 0, self.steps)
        return trigger.tested_on(model, clean)

    # ---- contrast ---------------------------------------------------------------------------

    def draws(self, clean: CleanData, generator: torch.Generator, size: int) -> Iterator[Tensor]:
        """Batches of images without end, each image drawn by itself."""
        while True:
            for batch in clean.batches(size, generator, replacement=True):
                yield self.augmented(batch.images, generator)

    def augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images (B, C, H, W), half of them mirrored if that is asked for."""
        if not self.mirror:
            return images
        flip = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        return torch.where(flip.to(images.device), images.flip(3), images)

    def noise(
        self, masked: MaskedModel, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """delta and xi that lead the images away from these labels; see `adversarial_noise`."""
        return adversarial_noise(
            masked,
            images,
            labels,
            generator,
            budget=self.noise_budget,
            steps=self.noise_steps,
            project=self.project_noise,
        )

    def gradient(
        self, views: _Views, images: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, float]:
        """Of the contrastive loss of a batch, (number of neurons,), and the share of it recovered.

        Recovered: a stamped image has, under the masks, the label that the original model gives
        it unstamped.
        """
        start = generator.get_state()

        def passes(part: CleanData) -> tuple[tuple[Tensor, ...], Tensor]:
            generator.set_state(start)  # the same noise to start from, also when memory ran out
            loss, recovered = self.loss(views, part.images, generator)
            return torch.autograd.grad(loss, views.masked.masks), recovered.float()

        (gradient,), recovered = mean_gradients(CleanData(images), passes)
        assert recovered is not None
        return gradient, recovered.mean().item()

    def loss(
        self, views: _Views, images: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Contrastive loss of a batch, and which of its images the masks recover, bool (B,).

        z are features: of the original model (z), under the masks (m), and under masks and noise
        (n); stamped ones have an s. The noise and the original's features are constants.
        """
        images = images.to(**placement(views.model))
        stamped = views.stamped(images)
        z_m, logits = views.features(views.masked, images)
        noise = self.noise(views.masked, images, logits.detach().argmax(1), generator)
        z_n, _ = views.features(views.masked, images, **noise)
        zs_m, recovered = views.features(views.masked, stamped)
        with torch.no_grad():
            z, predicted = views.features(views.original, images)
            zs, _ = views.features(views.original, stamped)
        alike = (z_m, z), (zs_m, z), (z_n, z)
        apart = (z_n, zs), (z_m, zs), (zs_m, zs)
        similarities = [F.cosine_similarity(a, b) for a, b in alike + apart]
        loss = contrastive_loss(torch.stack(similarities, 1), self.temperature)
        _check_finite(loss, "the contrastive loss")
        return loss, recovered.argmax(1) == predicted.argmax(1)

    def train(
        self,
        training: PlateauTraining,
        views: _Views,
        clean: CleanData,
        generator: torch.Generator,
        progress: bool,
    ) -> tuple[Tensor, dict[str, Any]]:
        """SGD on the masks, whose learning rate follows the share of images recovered.

        Returns the masks (number of neurons,), and the number of steps and the share recovered at
        each check for the details.
        """
        views.masked.use_statistics_(training.statistics, clean.examples())
        optimiser = training.optimiser(views.masked.masks)
        schedule = training.schedule(optimiser)
        shares: list[float] = []
        recovered: list[float] = []

        def epoch() -> Iterator[Tensor]:
            for batch in clean.batches(training.batch_size, generator, replacement=True):
                yield self.augmented(batch.images, generator)

        def gradient(images: Tensor) -> Tensor:
            found, share = self.gradient(views, images, generator)
            shares.append(share)
            return found

        def follow(step: int) -> None:
            if step % training.check_every == 0:
                recovered.append(sum(shares) / len(shares))
                schedule.step(recovered[-1])
                shares.clear()

        masks, steps = training.train(
            views.masked.masks,
            epoch,
            gradient,
            title="contrasting features",
            progress=progress,
            optimiser=optimiser,
            after=follow,
        )
        return masks, {"mask_steps": steps, "recovered": recovered}


def contrastive_loss(similarities: Tensor, temperature: float) -> Tensor:
    """Mean over a batch of -1/3 sum over the positive pairs of log softmax(similarity / tau).

    Each positive competes with all six pairs of its own image, the other positives included; there
    are no negatives across images.

    Args:
        similarities: (B, 6), the three positive pairs first.
    """
    return -(similarities / temperature).log_softmax(1)[:, :3].mean()


class _Views:
    """The original and the masked model, and what either makes of images, stamped or not."""

    def __init__(
        self,
        model: nn.Module,
        sites: tuple[Site, ...],
        heads: tuple[str, ...],
        stamp: Callable[[Tensor], Tensor],
    ) -> None:
        self.model = model
        self.original = MaskedModel(model, sites)
        self.original.masks.requires_grad_(False)
        self.masked = MaskedModel(model, sites)
        self._heads = [model.get_submodule(name) for name in heads]
        self._stamp = stamp

    def stamped(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            stamped = self._stamp(images)
        if stamped.shape != images.shape or not torch.isfinite(stamped).all():
            raise DataError(
                f"expected stamp to return finite images of shape {tuple(images.shape)}, got "
                f"{tuple(stamped.shape)}"
            )
        return stamped.to(images)

    def features(self, run: MaskedModel, images: Tensor, **noise: Tensor) -> tuple[Tensor, Tensor]:
        """Penultimate features (B, D), float32, and logits (B, classes), of one forward pass.

        The features are what the classifier is given, flattened; of several heads, side by side.
        """
        seen: list[Tensor] = []

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(at_least_float32(inputs[0].flatten(1)))

        with contextlib.ExitStack() as hooks:
            for head in self._heads:
                hooks.callback(head.register_forward_pre_hook(keep).remove)
            logits = run(images, **noise)
        return torch.cat(seen, 1), logits


def _check_finite(loss: Tensor, what: str) -> None:
    if not torch.isfinite(loss):
        raise ScoringError(
            f"{what} diverged (loss {loss.item()}); does the model give finite logits on all valid "
            "images? If so, take a smaller noise_budget"
        )
