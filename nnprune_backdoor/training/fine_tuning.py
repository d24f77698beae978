"""Fine-tuning on clean images: a baseline (FT), Fine-Pruning's second half, and unlearning.

Plain supervised training. Liu, Dolan-Gavitt and Garg, "Fine-Pruning", RAID 2018, do it after
pruning; BackdoorBench (Wu et al., NeurIPS 2022) does it alone and calls it ft. With a recovered
trigger stamped on some of the images, which keep their labels, it is the second mitigation of Wang
et al., "Neural Cleanse", IEEE S&P 2019: the network unlearns what the trigger does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.changing import changing_weights
from ..core.copies import restore_modes_
from ..core.data import CleanData
from ..core.masks import Silencing, silence_
from ..core.norms import Statistics, use_statistics_
from ..core.outputs import give_same_output_
from ..core.passes import Task, Work
from ..core.prepared import Prepared
from ..core.recovered import RecoveredTrigger
from ..core.scores import Selection
from ..errors import DataError, ScoringError, UnsupportedModelError
from ..utils.progress import progress_bar
from ..utils.randomness import checked_seed, private_randomness
from ..utils.settings import check_settings
from ..utils.tensors import at_least_float32, placement


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """How a network is fine-tuned.

    The defaults are SGD on the cross-entropy with momentum 0.9, weight decay 5e-4 and a cosine
    schedule over the epochs, as in BackdoorBench's settings of both ft and fp: 100 epochs from a
    rate of 0.01, there in batches of 256 from 2500 images. Batches of 64 take about as many steps
    (800, there 1000) from 500.

    Attributes:
        epochs: Number of passes over the images.
        lr: Learning rate at the start.
        batch_size: Images a step.
        shift: Largest random translation in pixels; more than 0 also mirrors. BackdoorBench's is 4
            for 32 x 32 images, where a mirrored image keeps its label.
        statistics: BatchNorm statistics while training. Dropout and drop-path stay off.
        silencing: What keeping a neuron silent means (see `core.masks`); "constant" lets its bias
            learn.
        stamped: Share of each batch that a trigger is stamped on (Neural Cleanse: 0.2).
        optimiser: "sgd" as above; "adamw" has torch's defaults but for the rate.
        largest_gradient: Norm over all weights to which a larger gradient is scaled down; None for
            no limit.
    """

    epochs: int = 100
    lr: float = 0.01
    batch_size: int = 64
    shift: int = 0
    statistics: Statistics = "batch"
    silencing: Silencing = "zero"
    stamped: float = 0.2
    optimiser: Literal["sgd", "adamw"] = "sgd"
    largest_gradient: float | None = None

    def __post_init__(self) -> None:
        check_settings(self, positive=("lr", "largest_gradient"))
        if self.batch_size < 2 or self.stamped > 1:
            raise DataError(
                "expected a batch_size of at least 2 and stamped in [0, 1], got "
                f"{self.batch_size} and {self.stamped:g}"
            )

    def passes(self, task: Task) -> Work:
        """What it sends through the network."""
        return (task.epochs("weights", self.batch_size, self.epochs),)

    def optimiser_of(self, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of these weights."""
        if self.optimiser == "adamw":
            return torch.optim.AdamW(weights, lr=self.lr)
        return torch.optim.SGD(weights, lr=self.lr, momentum=0.9, weight_decay=5e-4)


def fine_tune(
    model: nn.Module,
    clean: CleanData | Iterable[Any],
    settings: FineTuning = FineTuning(),
    *,
    selection: Selection | None = None,
    triggers: Sequence[RecoveredTrigger] = (),
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """A copy of the model, trained further on clean images; `model` is left exactly as it was.

    All weights are trained, frozen ones too; the copy has the modes and flags of `model`.

    Fine-tuning gives accuracy back, and can give the backdoor back with it: neither the loss nor
    clean accuracy sees that. Part of it is BatchNorm, whose statistics are estimated anew along the
    way, which alone brought backdoors back in pruned networks (docs/results/ranking.md);
    `statistics="running"` leaves them as they are. Measure accuracy on other images than these.

    Args:
        clean: labelled clean images, normalised as the model expects (see `CleanData`).
        settings: how it is trained.
        selection: neurons to silence, and to keep silent after every step. Those of the model in
            its full shape: silence, fine-tune, then `compact`.
        triggers: recovered ones, to be unlearned: each batch gets one of them, drawn at random, on
            `settings.stamped` of its images, which keep their labels.
        seed: same seed, same machine, same number of threads, same result.

    Raises:
        DataError: see `Prepared.of`; or no labels.
        UnsupportedModelError: see `Prepared.of`, `silence_` and `check_trainable`; or the selection
            is of a model of another shape.
        ScoringError: training diverged.
    """
    seed = checked_seed(seed)
    with private_randomness(seed), torch.enable_grad():
        prepared = Prepared.of(model, clean, labels="needed").moved()
        tuned = prepared.model
        trainer = _Trainer(tuned, settings, selection or Selection((), ()), triggers)
        generator = torch.Generator().manual_seed(seed)
        with (
            changing_weights(tuned),
            progress_bar(settings.epochs, "fine-tuning", progress) as bar,
        ):
            for _ in range(settings.epochs):
                trainer.epoch(prepared.clean, generator)
                bar.update()
        trainer.forget_gradients()
    _check_finite(tuned)
    restore_modes_(tuned, model)
    give_same_output_(tuned, model)
    return tuned


class _Trainer:
    """Trains all weights of a model, of which some neurons stay silent."""

    def __init__(
        self,
        model: nn.Module,
        settings: FineTuning,
        silent: Selection,
        triggers: Sequence[RecoveredTrigger],
    ) -> None:
        self._weights = check_trainable(model)
        check_fits(model, silent)
        silence_(model, silent, silencing=settings.silencing)
        use_statistics_(model, settings.statistics)
        for weight in self._weights:
            weight.requires_grad_(True)
        self._model, self._settings, self._silent = model, settings, silent
        self._triggers = triggers
        self._optimiser = settings.optimiser_of(self._weights)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self._optimiser, max(settings.epochs, 1)
        )

    def epoch(self, clean: CleanData, generator: torch.Generator) -> None:
        settings, place = self._settings, placement(self._model)
        for batch in clean.batches(settings.batch_size, generator, shift=settings.shift):
            images = stamp(batch.images, self._triggers, settings.stamped, generator)
            logits = at_least_float32(self._model(images.to(**place)))
            loss = F.cross_entropy(logits, batch.targets.to(place["device"]))
            if not torch.isfinite(loss):
                raise ScoringError(f"fine-tuning diverged (loss {loss.item()}); take a smaller lr")
            self._optimiser.zero_grad(set_to_none=True)
            loss.backward()
            if settings.largest_gradient is not None:
                nn.utils.clip_grad_norm_(self._weights, settings.largest_gradient)
            self._optimiser.step()
            # momentum and weight decay would wake them as well as the gradient
            silence_(self._model, self._silent, silencing=settings.silencing)
        self._schedule.step()

    def forget_gradients(self) -> None:
        self._optimiser.zero_grad(set_to_none=True)


def stamp(
    images: Tensor,
    triggers: Sequence[Callable[[Tensor], Tensor]],
    share: float,
    generator: torch.Generator,
) -> Tensor:
    """Images (B, C, H, W), already in random order, the first of them with one of the triggers."""
    count = round(share * len(images))
    if not triggers or not count:
        return images
    trigger = triggers[int(torch.randint(len(triggers), (), generator=generator))]
    return torch.cat([trigger(images[:count]), images[count:]])


def check_trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that can be trained: all but integers.

    Raises:
        UnsupportedModelError: there are none, or they are of several precisions.
    """
    weights = [p for p in model.parameters() if p.is_floating_point() or p.is_complex()]
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in weights if not p.is_complex()})
    if not weights:
        raise UnsupportedModelError("the model has no weights that could be trained")
    if len(kinds) > 1:
        raise UnsupportedModelError(
            f"the model's weights are of several types ({', '.join(kinds)}), and are not trained "
            "so; give it in one: model.float()"
        )
    return weights


def training_precision(model: nn.Module) -> torch.dtype:
    """Single, or that of the model if it is higher: small steps are lost in half precision."""
    return at_least_float32(torch.empty(0, dtype=placement(model)["dtype"])).dtype


def restore_precision_(trained: nn.Module, given: nn.Module) -> None:
    """Cast parameters and buffers back to the types that they have in the model as given."""
    pairs = zip(_tensors(trained), _tensors(given), strict=True)
    for tensor, original in pairs:
        tensor.data = tensor.data.to(original.dtype)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def check_fits(model: nn.Module, selection: Selection) -> None:
    """Raise UnsupportedModelError unless the model has the channels that the selection knows."""
    layers: dict[str, Any] = dict(model.named_modules())
    for site in selection.sites:
        weight = getattr(layers.get(site.name), "weight", None)
        known, found = site.channels * site.width, "no such layer"
        if weight is not None:
            found = f"{weight.shape[1] if site.kind == 'heads' else len(weight)}"
        if found != f"{known}":
            raise UnsupportedModelError(
                f"the selection knows {known} channels of {site.name!r}, the model has "
                f'{found}; fine-tune the model in its full shape (purify(..., removal="none"))'
            )


def _check_finite(model: nn.Module) -> None:
    if not all(torch.isfinite(weight).all() for weight in model.parameters()):
        raise ScoringError("fine-tuning left NaN or inf in the weights; take a smaller lr")
