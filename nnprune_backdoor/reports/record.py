"""The record of a purification: what was given, what was done, what was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..core.agreement import Agreement
from ..core.answers import Answers
from ..core.compute import Compute
from ..core.data import CleanData
from ..core.masks import Silencing
from ..core.measures import PairedAccuracy, ProxySuccess, Removal, Repair, SuspectLabel
from ..core.recovered import PixelRange
from ..core.scores import ChannelScores, Selection
from ..criteria.base import Criterion
from ..removal.report import RemovalReport
from ..selectors.base import Selector
from ..utils.fingerprint import fingerprint, now
from ..utils.short_repr import ShortRepr
from ..utils.tensors import placement


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Given(ShortRepr):
    """What `purify` was given.

    Attributes:
        architecture: Class of the model, and its timm name if the model has one.
        classes: Number of classes.
        parameters: Number of parameters.
        where: Device and dtype of the model.
        images: Number of clean images.
        labelled: Whether they have labels.
        parts: Numbers of images for scoring, selecting and measuring.
        probe: Number of images on which the smaller model was compared and timed.
        example: One of the clean images, (C, H, W), to show triggers on.
        pixels: Range of the clean images.
        criterion: The criterion.
        selector: The selector.
        removal: As for `purify`.
        repair: As for `purify`.
        shares: Of the images for scoring, selecting and measuring.
        compute: How the criterion was computed.
        sha256: "weights": of the model; "clean": of images and labels; "images": of the images.
        threads: Number of CPU threads, on which sums depend; None if unknown.
        unscored: What is not scored, a phrase for each kind (see `core.unscored`).
        date: When the purification began, in UTC (ISO 8601).
    """

    architecture: str
    classes: int
    parameters: int
    where: str
    images: int
    labelled: bool
    parts: tuple[int, int, int]
    probe: int
    example: Tensor
    pixels: PixelRange
    criterion: Criterion
    selector: Selector
    removal: Removal
    repair: Repair
    shares: tuple[float, float, float]
    compute: Compute
    sha256: dict[str, str]
    threads: int | None = None
    unscored: tuple[str, ...] = ()
    date: str = ""

    @classmethod
    def of(cls, model: nn.Module, clean: CleanData, **others: Any) -> Self:
        """Describe a model and clean images; `others` are the other fields."""
        config = getattr(model, "pretrained_cfg", None)  # of timm models
        name = config.get("architecture") if isinstance(config, dict) else None
        kind = type(model).__name__
        place = placement(model)
        return cls(
            architecture=f"{name} ({kind})" if name else kind,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            where=f"{place['device']}, {str(place['dtype']).removeprefix('torch.')}",
            images=len(clean),
            labelled=clean.labels is not None,
            example=clean.images[0].float().clone(),
            pixels=PixelRange.seen_in(clean.images),
            threads=torch.get_num_threads(),
            sha256={
                "weights": fingerprint(model.state_dict()),
                "clean": fingerprint({"images": clean.images, "labels": clean.labels}),
                "images": fingerprint({"images": clean.images}),
            },
            date=now(),
            **others,
        )


@dataclass(frozen=True, eq=False, repr=False)
class Record(ShortRepr):
    """All that a purification gives; the fields of `Purified`.

    Attributes:
        model: The purified model.
        scores: Scores of all neurons.
        selection: The neurons that were silenced.
        accuracy: Clean accuracy before and after; None if the clean images have no labels.
        silencing: What silencing does to a neuron; see `purify`.
        removal: What was removed from the tensors; None if nothing was to be removed.
        seed: As for `purify`.
        given: What `purify` was given.
        triggers: Success of recovered triggers, those of the criterion first.
        seconds: Stage -> wall time.
        source: Where the model and the images came from, as plain data that the caller gives.
        repair_rejected: Why a repair that was asked for was rejected; otherwise empty.
        agreement: Of the purified model with the given one, on the images of `accuracy`.
        suspects: Labels that distilling found suspect in the given model; None: it was not done.
        answers: Of both models to the images of `accuracy`, with a few of these images; the
            triggers are those of the criterion, of the selector and of the suspect labels.
    """

    model: nn.Module
    scores: ChannelScores
    selection: Selection
    accuracy: PairedAccuracy | None
    silencing: Silencing
    removal: RemovalReport | None
    seed: int
    given: Given
    triggers: tuple[ProxySuccess, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    repair_rejected: str = ""
    agreement: Agreement | None = None
    suspects: tuple[SuspectLabel, ...] | None = None
    answers: Answers | None = None

    @property
    def guessing(self) -> str:
        """A caution if the model as given may have guessed on the clean images; else empty."""
        if self.accuracy is None or self.accuracy.before.interval[0] > 1 / self.given.classes:
            return ""
        return (
            "the accuracy of the model as given on these images may be that of guessing; check the "
            "order of the classes, the labels and the normalisation"
        )

    @property
    def repaired(self) -> bool:
        """Whether weights were trained by a repair; never if no neuron was selected."""
        return self.given.repair != "none" and len(self.selection) > 0 and not self.repair_rejected
