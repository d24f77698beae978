"""A purification under way: the model, its images in three parts, and the options."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from ..core.checks import check_scoring_part
from ..core.data import CleanData
from ..core.held_out import HeldOut
from ..core.predictions import predict_labels
from ..core.prepared import Prepared
from ..core.scores import ChannelScores, Selection
from ..training.distillation import Distillation, distil_with_triggers
from ..triggers.suspects import SuspectTrigger
from ..utils.fingerprint import fingerprint
from .kept import Kept
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
        kept: Scores and selection of an earlier purification, where there are any.
    """

    def __init__(self, model: nn.Module, prepared: Prepared, options: Options, seed: int) -> None:
        self.model, self.prepared, self.options, self.seed = model, prepared, options, seed
        self.parts = prepared.clean.split(*options.shares, seed=seed)
        check_scoring_part(self.parts, prepared.classes)
        self.scoring, self.selecting, self.measuring = self.parts
        self.kept = self._kept()  # before any work, since a file may be of something else

    @cached_property
    def to_score(self) -> CleanData:
        """The scoring images; with the network's own answers where labels are needed and none."""
        scoring = self.scoring
        if scoring.labels is None and self.options.criterion.needs_labels:
            return CleanData(scoring.images, predict_labels(self.prepared.model, scoring.images))
        return scoring

    def _kept(self) -> Kept:
        """What there is in the files that the caller named."""
        options = self.options
        made_from = options.criterion.made_from(
            self.model, self.to_score, seed=self.seed, compute=options.compute
        )
        held = {"images": self.selecting.images, "labels": self.selecting.labels}
        selected_from = {
            **made_from,
            "selecting images": fingerprint(held),
            "selector": repr(options.selector),
            "silencing": options.silencing,
        }
        return Kept(options.kept_in, self.prepared.sites, made_from, selected_from)

    def scored(self) -> ChannelScores:
        """The criterion's scores of the given network."""
        if self.kept.scores is not None:
            return self.kept.scores
        options = self.options
        scores = options.criterion(
            self.model,
            self.to_score,
            sites=self.prepared.sites,
            seed=self.seed,
            progress=options.progress,
            compute=options.compute,
        )
        self.kept.keep_scores(scores)
        return scores

    def selected(self, scores: ChannelScores, held_out: HeldOut) -> Selection:
        """The selector's selection."""
        if self.kept.selection is not None:
            return self.kept.selection
        return self.kept.keep_selection(self.options.selector(scores, held_out))

    @property
    def distillation(self) -> Distillation:
        """How the silenced network is distilled."""
        return Distillation(silencing=self.options.silencing)

    @property
    def teaches_selecting(self) -> bool:
        """Whether the selecting images teach in distilling, too; see `distilled`."""
        return not self.options.selector.recovers_triggers

    def distilled(
        self, silenced: nn.Module, silent: Selection
    ) -> tuple[nn.Module, tuple[SuspectTrigger, ...]]:
        """A silenced network that has learned from the given one, and what it learned to ignore.

        The selecting images, whose work is done, teach as well; not after a selector that recovers
        triggers, which counts once more on them what is left.
        """
        parts = [self.scoring.images]
        if self.teaches_selecting:
            parts.append(self.selecting.images)
        return distil_with_triggers(
            silenced,
            self.model,
            CleanData(torch.cat(parts)),
            self.distillation,
            selection=silent,
            seed=self.seed,
            progress=self.options.progress,
        )
