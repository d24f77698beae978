"""Fine-tuning on clean images: a baseline (FT), Fine-Pruning's second half, and unlearning.

Plain supervised training. Liu, Dolan-Gavitt and Garg, "Fine-Pruning", RAID 2018, do it after
pruning; BackdoorBench (Wu et al., NeurIPS 2022) does it alone and calls it ft. With a recovered
trigger stamped on some of the images, which keep their labels, it is the second mitigation of Wang
et al., "Neural Cleanse", IEEE S&P 2019: the network unlearns what the trigger does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.copies import frozen_copy, restore_modes_
from ..core.data import CleanData
from ..core.masks import Silencing, silence_
from ..core.norms import Statistics, use_statistics_
from ..core.recovered import RecoveredTrigger
from ..core.scores import Selection
from ..errors import DataError, ScoringError, UnsupportedModelError
from ..utils.progress import progress_bar
from ..utils.randomness import checked_seed, private_randomness
from ..utils.tensors import at_least_float32, placement

Optimiser = Literal["sgd", "adamw"]


def fine_tune(
    model: nn.Module,
    clean: CleanData | Iterable[Any],
    *,
    epochs: int = 100,
    lr: float = 0.01,
    batch_size: int = 64,
    shift: int = 0,
    statistics: Statistics = "batch",
    selection: Selection | None = None,
    silencing: Silencing = "zero",
    triggers: Sequence[RecoveredTrigger] = (),
    stamped: float = 0.2,
    optimiser: Optimiser = "sgd",
    largest_gradient: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """A copy of the model, trained further on clean images; `model` is left exactly as it was.

    SGD on the cross-entropy with momentum 0.9, weight decay 5e-4 and a cosine schedule over the
    epochs, as in BackdoorBench's settings of both ft and fp: 100 epochs from a rate of 0.01, there
    in batches of 256 from 2500 images. Batches of 64 take about as many steps (800, there 1000)
    from 500. All weights are trained, frozen ones too; the copy has the modes and flags of `model`.

    Fine-tuning gives accuracy back, and can give the backdoor back with it: neither the loss nor
    clean accuracy sees that. Part of it is BatchNorm, whose statistics are estimated anew along the
    way, which alone brought backdoors back in pruned networks here (docs/ranking.md);
    `statistics="running"` leaves them as they are. Measure accuracy on other images than these.

    Args:
        clean: labelled clean images, normalised as the model expects (see `CleanData`).
        shift: largest random translation in pixels; > 0 also mirrors. BackdoorBench's is 4 for
            32 x 32 images, where a mirrored image keeps its label.
        statistics: of BatchNorm while training. Dropout and drop-path stay off.
        selection: neurons to silence, and to keep silent after every step. Those of the model in
            its full shape: silence, fine-tune, then `compact`.
        silencing: what that means, see `masking`; "constant" lets their biases learn.
        triggers: recovered ones, to be unlearned: each batch gets one of them, drawn at random.
        stamped: share of a batch that it is stamped on (Neural Cleanse: 0.2); labels stay.
        optimiser: "sgd" as above; "adamw" has torch's defaults but for the rate.
        largest_gradient: norm over all weights to which a larger gradient is scaled down.
        seed: same seed, same machine, same result.

    Raises:
        DataError: see `CleanData`; or no labels, or a setting out of range.
        UnsupportedModelError: see `CleanData.check_against`, `silence_` and `check_trainable`; or
            the selection is of a model of another shape.
        ScoringError: training diverged.
    """
    if epochs < 0 or not lr > 0 or batch_size < 2 or shift < 0 or not 0 <= stamped <= 1:
        raise DataError(
            "expected epochs >= 0, lr > 0, batch_size >= 2, shift >= 0 and stamped in [0, 1], got "
            f"{epochs}, {lr:g}, {batch_size}, {shift} and {stamped:g}"
        )
    norm = 1.0 if largest_gradient is None else largest_gradient
    if optimiser not in ("sgd", "adamw") or not norm > 0:
        raise DataError(
            "expected optimiser 'sgd' or 'adamw' and largest_gradient > 0, got "
            f"{optimiser!r} and {largest_gradient}"
        )
    if silencing not in ("zero", "constant") or statistics not in ("batch", "running"):
        raise DataError(
            "expected silencing 'zero' or 'constant' and statistics 'batch' or 'running', got "
            f"{silencing!r} and {statistics!r}"
        )
    seed = checked_seed(seed)
    with private_randomness(seed), torch.enable_grad():
        data = CleanData.collect(clean)
        data.targets  # noqa: B018 - raises where there are none
        tuned = frozen_copy(model)
        weights = check_trainable(tuned)
        data.check_against(tuned)
        data = data.near(tuned)
        silent = Selection((), ()) if selection is None else selection
        check_fits(tuned, silent)
        silence_(tuned, silent, silencing=silencing)
        use_statistics_(tuned, statistics)
        for weight in weights:
            weight.requires_grad_(True)
        generator = torch.Generator().manual_seed(seed)
        where = placement(tuned)
        steps: torch.optim.Optimizer = (
            torch.optim.SGD(weights, lr=lr, momentum=0.9, weight_decay=5e-4)
            if optimiser == "sgd"
            else torch.optim.AdamW(weights, lr=lr)
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(steps, max(epochs, 1))
        with progress_bar(epochs, "fine-tuning", progress) as bar:
            for _ in range(epochs):
                for batch in data.batches(batch_size, generator, shift=shift):
                    images = _stamp(batch.images, triggers, stamped, generator)
                    logits = tuned(images.to(**where))
                    loss = F.cross_entropy(
                        at_least_float32(logits), batch.targets.to(where["device"])
                    )
                    if not torch.isfinite(loss):
                        raise ScoringError(
                            f"fine-tuning diverged (loss {loss.item()}); take a smaller lr"
                        )
                    steps.zero_grad(set_to_none=True)
                    loss.backward()
                    if largest_gradient is not None:
                        nn.utils.clip_grad_norm_(weights, largest_gradient)
                    steps.step()
                    # momentum and weight decay would wake them as well as the gradient
                    silence_(tuned, silent, silencing=silencing)
                schedule.step()
                bar.update()
        steps.zero_grad(set_to_none=True)
    _check_finite(tuned)
    restore_modes_(tuned, model)
    return tuned


def _stamp(
    images: Tensor, triggers: Sequence[RecoveredTrigger], share: float, generator: torch.Generator
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


def check_fits(model: nn.Module, selection: Selection) -> None:
    """Raise UnsupportedModelError unless the model has the channels that the selection knows."""
    layers: dict[str, Any] = dict(model.named_modules())
    for site in selection.sites:
        weight = getattr(layers.get(site.name), "weight", None)
        found = "no such layer" if weight is None else f"{len(weight)}"
        if found != f"{site.channels}":
            raise UnsupportedModelError(
                f"the selection knows {site.channels} channels of {site.name!r}, the model has "
                f'{found}; fine-tune the model in its full shape (purify(..., removal="none"))'
            )


def _check_finite(model: nn.Module) -> None:
    if not all(torch.isfinite(weight).all() for weight in model.parameters()):
        raise ScoringError("fine-tuning left NaN or inf in the weights; take a smaller lr")
