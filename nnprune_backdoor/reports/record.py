"""What a purification leaves on record: what was given, what was done, what was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, nn

from ..core.compute import Compute
from ..core.data import CleanData
from ..core.masks import Silencing
from ..core.measures import PairedAccuracy, ProxySuccess, Removal, Repair
from ..core.recovered import PixelRange
from ..core.scores import ChannelScores, Selection
from ..criteria.base import Criterion
from ..removal.compaction import RemovalReport
from ..selectors.base import Selector
from ..utils.fingerprint import fingerprint
from ..utils.tensors import placement


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
        where = placement(model)
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
    repair_rejected: str = ""  # why a repair that was asked for was not kept

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
        return self.given.repair != "none" and len(self.selection) > 0 and not self.repair_rejected
