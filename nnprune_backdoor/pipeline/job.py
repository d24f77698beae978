"""A purification under way: the model, its images in three parts, and the options."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..core.checks import check_scoring_part
from ..core.data import CleanData
from ..core.predictions import predict_labels
from ..core.prepared import Prepared
from ..core.scores import ChannelScores, Selection
from ..training.distillation import Distillation, distil_with_triggers
from ..triggers.suspects import SuspectTrigger
from .options import Options


@dataclass(frozen=True, eq=False)
class Pruned:
    """A network before anything is removed from its tensors.

    Attributes:
        model: In its full shape.
        scores: Of the network as given.
        selection: The neurons that are silent in `model`.
        rejected: Why a repair was rejected; otherwise empty.
        triggers: Of the labels that distilling found suspect; None where it was not done.
    """

    model: nn.Module
    scores: ChannelScores
    selection: Selection
    rejected: str = ""
    triggers: tuple[SuspectTrigger, ...] | None = None


class Job:
    """What every step of a purification needs.

    Attributes:
        model: The network as given.
        prepared: Its private copy, with all clean images.
        options: What was asked for.
        parts: The clean images for scoring, selecting and measuring.
    """

    def __init__(self, model: nn.Module, prepared: Prepared, options: Options, seed: int) -> None:
        self.model, self.prepared, self.options = model, prepared, options
        self.parts = prepared.clean.split(*options.shares, seed=seed)
        check_scoring_part(self.parts, prepared.classes)
        self.scoring, self.selecting, self.measuring = self.parts

    def scored(self, seed: int) -> ChannelScores:
        """The criterion's scores of the given network.

        A criterion that needs labels gets the network's own answers where the images have none.
        """
        options, scoring = self.options, self.scoring
        if scoring.labels is None and options.criterion.needs_labels:
            answers = predict_labels(self.prepared.model, scoring.images)
            scoring = CleanData(scoring.images, answers)
        return options.criterion(
            self.model,
            scoring,
            sites=self.prepared.sites,
            seed=seed,
            progress=options.progress,
            compute=options.compute,
        )

    def distilled(
        self, silenced: nn.Module, silent: Selection, seed: int
    ) -> tuple[nn.Module, tuple[SuspectTrigger, ...]]:
        """A silenced network that has learned from the given one, and what it learned to ignore.

        The selecting images, whose work is done, teach as well; not after a selector that recovers
        triggers, which counts once more on them what is left.
        """
        parts = [self.scoring.images]
        if not self.options.selector.recovers_triggers:
            parts.append(self.selecting.images)
        return distil_with_triggers(
            silenced,
            self.model,
            CleanData(torch.cat(parts)),
            Distillation(silencing=self.options.silencing),
            selection=silent,
            seed=seed,
            progress=self.options.progress,
        )
