"""Contrastive Neuron Pruning (CNP).

Feng, Ma, Liu, Zhang, Cai and Xia, "Contrastive Neuron Pruning for Backdoor Defense", IEEE
Transactions on Image Processing 34, 2025, https://doi.org/10.1109/TIP.2025.3539466. In feature
space, triggered images lie apart from benign ones. Find the target, recover its trigger, stamp it
on clean images, and let masks learn to bring stamped images back to the benign side: what they
close was the backdoor's. No labels are needed.

`CNP.paper()` is the authors' published code. The defaults differ in three named ways, for the
reasons and with the numbers in docs/cnp.md: the target is the label of the smallest trigger
(`candidates`), the trigger is inverted until small (`inversion`), and the masks' `response` to the
contrastive loss replaces their training (`ranking`). Fields without a remark keep the published
value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.compute import mean_gradients
from ..core.data import CleanData
from ..core.masks import MaskedModel, Silencing
from ..core.norms import Statistics
from ..core.predictions import check_labels, predict_labels
from ..core.recovered import PixelRange, RecoveredTrigger
from ..core.scores import ChannelScores
from ..core.sites import Site, find_classifiers, find_sites
from ..errors import DataError, ScoringError
from ..utils.progress import progress_bar
from ..utils.tensors import at_least_float32, placement
from .base import register_criterion
from .parts.noise import adversarial_noise
from .parts.response import sensitivity, successive_scores
from .parts.trigger import TriggerCriterion


@register_criterion("cnp")
@dataclass(frozen=True, kw_only=True)
class CNP(TriggerCriterion):
    """Masks under which stamped images have benign features: low = backdoor.

    Scores of the trained masks lie in [0, 1]; those of the response in (0, stages + 1), the whole
    part being the stage that silenced the neuron (`response.py`). Wherever the method speaks of
    labels, the model's own predictions serve.
    """

    reference: ClassVar[str] = "Feng et al., Contrastive Neuron Pruning, IEEE TIP 2025"
    needs_labels: ClassVar[bool] = False
    cost: ClassVar[str] = "as tac, then a few passes over the images"

    # one's own trigger instead: images (N, C, H, W), normalised as the model expects -> the same
    stamp: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    candidates: int | None = None  # labels that noise leads to most, to invert; None: all; paper 1
    noise_passes: int = 5  # candidates: draws per image
    inversion: Literal["smallest", "authors"] = "smallest"  # paper: authors
    inversion_lr: float = 0.005  # of the authors' inversion
    inversion_penalty: float = 0.01  # ... on the sum of the mask, at 32 x 32; times 1024 / (H W)

    ranking: Literal["response", "masks"] = "response"  # paper: masks
    temperature: float = 0.3  # tau of the contrastive loss
    noise_budget: float = 0.4  # epsilon: largest relative change of a weight or bias, at first
    noise_steps: int = 1
    project_noise: bool = False  # into [-epsilon, epsilon]; the authors' reaches 2 epsilon
    statistics: Statistics = "running"  # of BatchNorm; paper: batch, benign and stamped apart
    mirror: bool = False  # images at random; the authors': True, which digits and signs forbid
    mask_batch: int = 128

    rounds: int = 1  # response: passes over the clean images a stage, each with fresh noise
    damping: float = 0.1  # response: share of the mean clean sensitivity added to each neuron's
    probe_size: int = 20  # response: images a gradient of the clean sensitivity
    stages: int = 20  # response: neurons are silenced and the rest asked again so often
    stage_share: float = 0.0025  # response: of all neurons, silenced at a time

    mask_steps: int = 1200  # masks: updates
    mask_lr: float = 0.2  # masks
    mask_momentum: float = 0.9  # masks
    mask_lr_least: float = 0.01  # masks: the rate halves, down to this, where recovery stalls ...
    mask_patience: int = 2  # masks: ... for more than so many looks
    mask_look: int = 40  # masks: steps between two looks

    def __post_init__(self) -> None:
        labels = 1 if self.candidates is None else self.candidates
        if min(labels, self.rounds, self.mask_batch, self.mask_look) < 1:
            raise DataError("expected rounds, mask_batch, mask_look and candidates of at least 1")
        super().__post_init__()

    @property
    def silencing(self) -> Silencing:
        return "constant" if self.ranking == "masks" else "zero"

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
            ranking="masks",
            statistics="batch",
            mirror=True,
        )

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
        if self.ranking == "masks":
            views.masked.use_statistics_(self.statistics, clean.few())
            flat, trained = self.train_masks(views, unlabelled, generator, progress)
            details |= trained
        else:
            own = CleanData(clean.images, predict_labels(model, clean.images))
            stiffness = sensitivity(model, own, sites, generator, self.probe_size)
            views.masked.use_statistics_(self.statistics, clean.few())
            flat = successive_scores(
                views.masked,
                lambda: self.pull(views, unlabelled, generator),
                stiffness,
                self.damping,
                stages=self.stages,
                share=self.stage_share,
                progress=progress,
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
        where = placement(model)
        masked = MaskedModel(model, find_sites(model, clean.images[:2].to(**where)))
        draws = self.draws(clean, generator)
        increase = torch.zeros(clean.check_against(model), dtype=torch.int64)
        for images in islice(draws, -(-self.noise_passes * len(clean) // self.mask_batch)):
            here = images.to(**where)
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
        (target,) = check_labels([target], clean.check_against(model))
        pixels = self.pixels or PixelRange.seen_in(clean.images)
        pixels.check(clean.images)
        where, generator = placement(model), torch.Generator().manual_seed(seed)
        channels, height, width = clean.images.shape[1:]
        penalty = self.inversion_penalty * 1024 / (height * width)
        unit = torch.rand(1 + channels, height, width, generator=generator)  # mask, pattern
        unit = unit.to(where["device"]).requires_grad_(True)
        low, high = pixels.low.to(unit), pixels.high.to(unit)
        optimiser = torch.optim.Adam([unit], lr=self.inversion_lr)
        draws = islice(self.draws(clean, generator, self.batch_size), self.steps)
        with progress_bar(self.steps, "recovering the trigger", progress) as bar:
            for images in draws:
                mask, pattern = unit[:1], low + (high - low) * unit[1:]
                stamped = (1 - mask) * images.to(where["device"]) + mask * pattern
                logits = at_least_float32(model(stamped.to(where["dtype"])))
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

    def draws(
        self, clean: CleanData, generator: torch.Generator, size: int | None = None
    ) -> Iterator[Tensor]:
        """Batches of images without end, each image drawn by itself."""
        while True:
            for batch in clean.batches(size or self.mask_batch, generator, replacement=True):
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
            z, own = views.features(views.original, images)
            zs, _ = views.features(views.original, stamped)
        alike = (z_m, z), (zs_m, z), (z_n, z)
        apart = (z_n, zs), (z_m, zs), (zs_m, zs)
        similarities = [F.cosine_similarity(a, b) for a, b in alike + apart]
        loss = contrastive_loss(torch.stack(similarities, 1), self.temperature)
        _check_finite(loss, "the contrastive loss")
        return loss, recovered.argmax(1) == own.argmax(1)

    def pull(self, views: _Views, clean: CleanData, generator: torch.Generator) -> Tensor:
        """Mean gradient of the contrastive loss at the present masks, (number of neurons,)."""
        total = torch.zeros_like(views.masked.masks)
        for _ in range(self.rounds):
            for batch in clean.batches(self.mask_batch, generator):
                images = self.augmented(batch.images, generator)
                total += len(batch) * self.gradient(views, images, generator)[0]
        return total / (self.rounds * len(clean))

    def train_masks(
        self, views: _Views, clean: CleanData, generator: torch.Generator, progress: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """SGD on the masks, whose rate of learning follows the share of images recovered.

        Returns the masks (number of neurons,), the number of steps, and the share at each look.
        """
        masks = views.masked.masks
        optimiser = torch.optim.SGD([masks], lr=self.mask_lr, momentum=self.mask_momentum)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimiser,
            mode="max",
            factor=0.5,
            patience=self.mask_patience,
            min_lr=self.mask_lr_least,
        )
        shares: list[float] = []
        looks: list[float] = []
        with progress_bar(self.mask_steps, "contrasting features", progress) as bar:
            for images in islice(self.draws(clean, generator), self.mask_steps):
                masks.grad, share = self.gradient(views, images, generator)
                optimiser.step()
                with torch.no_grad():
                    masks.clamp_(0, 1)
                shares.append(share)
                if len(shares) == self.mask_look:
                    looks.append(sum(shares) / len(shares))
                    schedule.step(looks[-1])
                    shares.clear()
                bar.update()
        return masks.detach().float().cpu(), {"mask_steps": self.mask_steps, "recovered": looks}


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
