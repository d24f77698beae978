"""What a purification leaves on record: what was given, what was done, what was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Self

from torch import Tensor, nn

from .compute import Compute
from .criteria import Criterion
from .data import CleanData, like
from .evaluation import Rate, predict
from .fingerprint import fingerprint
from .inversion import PixelRange, RecoveredTrigger
from .masking import Silencing
from .removal import RemovalReport
from .scores import ChannelScores, Selection
from .selection import Selector, paired_drop

Removal = Literal["exact", "group", "none"]
Repair = Literal["none", "unlearn"]
Source = Literal["criterion", "selector"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Given:
    """What `purify` was given."""

    architecture: str  # class of the model, and timm's name where the model carries it
    classes: int
    parameters: int
    where: str  # device and dtype of the model
    images: int  # clean ones, all together
    labelled: bool
    parts: tuple[int, int, int]  # images that scored, selected, and measured the product
    probe: int  # images of the batch on which the smaller model was tried and timed
    example: Tensor  # (C, H, W), one of the clean images, to show triggers on
    pixels: PixelRange  # seen in the clean images
    criterion: Criterion
    selector: Selector
    removal: Removal
    repair: Repair
    shares: tuple[float, float, float]  # of the images: scoring, selecting, measuring
    compute: Compute  # how the criterion's passes were run
    sha256: dict[str, str]  # "weights" of the model, "clean": images and labels

    @classmethod
    def of(cls, model: nn.Module, clean: CleanData, **others: Any) -> Self:
        """Describe a model and clean images; the other fields are given by name."""
        config = getattr(model, "pretrained_cfg", None)  # timm's
        name = config.get("architecture") if isinstance(config, dict) else None
        kind = type(model).__name__
        where = like(model)
        return cls(
            architecture=f"{name} ({kind})" if name else kind,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            where=f"{where['device']}, {str(where['dtype']).removeprefix('torch.')}",
            images=len(clean),
            labelled=clean.labels is not None,
            example=clean.images[0].float().clone(),
            pixels=PixelRange.seen_in(clean.images),
            sha256={
                "weights": fingerprint(model.state_dict()),
                "clean": fingerprint({"images": clean.images, "labels": clean.labels}),
            },
            **others,
        )


@dataclass(frozen=True)
class PairedAccuracy:
    """Clean accuracy before and after on the same images, which nothing before had seen."""

    before: Rate
    after: Rate
    drop: float  # share of the images; negative = gain
    interval: tuple[float, float]  # of the drop, 95 %

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


@dataclass(frozen=True, eq=False)
class ProxySuccess:
    """How often a recovered trigger sends clean images to its label, before and after.

    The same images twice, which nothing before had seen, without those that the model as given
    sends there anyway. A proxy: the attacker's trigger may be another one.
    """

    trigger: RecoveredTrigger
    source: Source  # who recovered it
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
        labels = predict(before, clean.images)
        found = []
        sources: tuple[tuple[Source, tuple[RecoveredTrigger, ...]], ...] = (
            ("criterion", scores.triggers),
            ("selector", selection.triggers),
        )
        for source, trigger in ((name, one) for name, some in sources for one in some):
            stamped = trigger(clean.images[labels != trigger.target])
            if len(stamped):
                hits = (predict(model, stamped) == trigger.target for model in (before, after))
                rates = (Rate(int(hit.sum()), len(stamped)) for hit in hits)
                found.append(cls(trigger, source, *rates))
        return tuple(found)

    def __str__(self) -> str:
        return (
            f"{self.before.value:.1%} -> {self.after.value:.1%} of {self.before.count} images, "
            f"trigger of label {self.trigger.target} recovered by the {self.source}"
        )


@dataclass(frozen=True, eq=False)
class Record:
    """All that `purify` knows when it is done; `Purified` says it."""

    model: nn.Module
    scores: ChannelScores
    selection: Selection
    accuracy: PairedAccuracy | None  # None where the clean images have no labels
    silencing: Silencing
    removal: RemovalReport | None  # None where nothing was to be taken out of the tensors
    seed: int
    given: Given
    triggers: tuple[ProxySuccess, ...] = ()  # those of the criterion, then those of the selector
    seconds: dict[str, float] = field(default_factory=dict)  # wall time of each stage
    # where model and images came from, as plain data and as the caller says: `purify` cannot know
    source: dict[str, Any] = field(default_factory=dict)
    undone: str = ""  # why a repair that was asked for was not kept

    @property
    def guessing(self) -> str:
        """Why little here means anything, where the model as given may have guessed; else ""."""
        if self.accuracy is None or self.accuracy.before.interval[0] > 1 / self.given.classes:
            return ""
        return (
            "what the model as given gets right of these images cannot be told from guessing; look "
            "at the order of the classes, the labels and the normalisation"
        )

    @property
    def repaired(self) -> bool:
        """Whether weights were trained further; nothing is where no neuron was selected."""
        return self.given.repair != "none" and len(self.selection) > 0 and not self.undone
