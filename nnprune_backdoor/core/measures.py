"""What is measured before and after a purification, on the same clean images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

from torch import Tensor, nn

from ..utils.short_repr import ShortRepr
from ..utils.statistics import Rate, paired_drop
from .data import CleanData
from .predictions import predict
from .recovered import RecoveredTrigger
from .scores import ChannelScores, Selection

Removal = Literal["exact", "group", "none"]

Repair = Literal["none", "unlearn", "distil"]

Source = Literal["criterion", "selector"]


@dataclass(frozen=True)
class PairedAccuracy:
    """Clean accuracy before and after, on the same images, which no earlier step has used.

    Attributes:
        before: Accuracy of the model as given.
        after: Accuracy of the purified model.
        drop: Loss of accuracy as a share of the images; negative is a gain.
        interval: 95 % interval of the drop.
    """

    before: Rate
    after: Rate
    drop: float
    interval: tuple[float, float]

    @classmethod
    def of(cls, before: nn.Module, after: nn.Module, clean: CleanData) -> Self | None:
        """Of two models on these images; None where they have no labels."""
        if clean.labels is None:
            return None
        hits = [predict(model, clean.images) == clean.labels for model in (before, after)]
        drop, error = paired_drop(*hits)
        old, new = (Rate(int(right.sum()), len(right)) for right in hits)
        low, high = max(-1.0, drop - 1.96 * error), min(1.0, drop + 1.96 * error)
        return cls(old, new, drop, (low, high))

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.before.value:.1%} -> {self.after.value:.1%} on {self.before.count} images, "
            f"drop {100 * self.drop:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
        )


@dataclass(frozen=True, eq=False, repr=False)
class ProxySuccess(ShortRepr):
    """How often a recovered trigger sends clean images to its label, before and after.

    Measured on the same images, which no earlier step has used, without those that the model as
    given sends there anyway. A proxy: the attacker's trigger may be another one.

    Attributes:
        trigger: The recovered trigger.
        source: Whether the criterion or the selector recovered it.
        before: Its success rate on the model as given.
        after: Its success rate on the purified model.
    """

    trigger: RecoveredTrigger
    source: Source
    before: Rate
    after: Rate

    @classmethod
    def of(
        cls,
        scores: ChannelScores,
        selection: Selection,
        before: nn.Module,
        after: nn.Module,
        clean: CleanData,
    ) -> tuple[Self, ...]:
        """Of every trigger that was recovered; none where no image is left to count on."""
        found = []
        sources: tuple[tuple[Source, tuple[RecoveredTrigger, ...]], ...] = (
            ("criterion", scores.triggers),
            ("selector", selection.triggers),
        )
        for source, trigger in ((name, one) for name, some in sources for one in some):
            rates = _sent(trigger, trigger.target, (before, after), clean)
            if rates:
                found.append(cls(trigger, source, *rates))
        return tuple(found)

    def __str__(self) -> str:
        return (
            f"{self.before.value:.1%} -> {self.after.value:.1%} of {self.before.count} images, "
            f"trigger of label {self.trigger.target} recovered by the {self.source}"
        )


@dataclass(frozen=True)
class SuspectLabel:
    """How often a small perturbation sends clean images to a label, before and after.

    Recovered from the model as given; `distil` trains against it. Measured on images that no
    earlier step has used, without those that the model as given sends there anyway.

    Attributes:
        label: That the images are sent to.
        before: Share of them, by the model as given; None where no image is left to count on.
        after: By the purified model; None likewise.
    """

    label: int
    before: Rate | None
    after: Rate | None

    @classmethod
    def of(
        cls,
        label: int,
        perturb: Callable[[Tensor], Tensor],
        before: nn.Module,
        after: nn.Module,
        clean: CleanData,
    ) -> Self:
        """Of a perturbation of this label."""
        return cls(label, *(_sent(perturb, label, (before, after), clean) or (None, None)))

    def __str__(self) -> str:
        if self.before is None or self.after is None:
            return f"label {self.label}: no image was left to measure a small perturbation on"
        return (
            f"label {self.label}: a small perturbation sends {self.before.value:.1%} -> "
            f"{self.after.value:.1%} of {self.before.count} images there"
        )


def _sent(
    stamp: Callable[[Tensor], Tensor],
    target: int,
    models: tuple[nn.Module, nn.Module],
    clean: CleanData,
) -> tuple[Rate, Rate] | None:
    """Shares of the images that two models send to the target, and the first does not by itself."""
    stamped = stamp(clean.images[predict(models[0], clean.images) != target])
    if not len(stamped):
        return None
    first, second = (int((predict(model, stamped) == target).sum()) for model in models)
    return Rate(first, len(stamped)), Rate(second, len(stamped))
