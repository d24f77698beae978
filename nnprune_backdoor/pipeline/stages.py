"""Rank, silence a little, distil, compare, and again: iterative pruning of a backdoored network."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from ..core.agreement import Agreement
from ..core.copies import frozen_copy
from ..core.measures import Stage
from ..core.scores import ChannelScores, Selection
from ..errors import ScoringError
from ..selectors.stages import Stages
from .job import Job, Pruned


@dataclass(frozen=True, eq=False)
class _Round:
    """A stage with its network."""

    scores: ChannelScores
    silent: Selection
    student: nn.Module
    agreement: Agreement


def in_stages(job: Job, rule: Stages, seed: int) -> Pruned:
    """Silence and distil in turns, as long as the rule says.

    Raises:
        DataError, UnsupportedModelError, ScoringError: see criteria and `distil`. A ScoringError
            after the first stage ends the stages, and the reason says so.
    """
    student, silent = job.model, Selection(job.prepared.sites, ())
    rounds: list[_Round] = []
    stopped = ""
    while not rounds or rule.goes_on([made.agreement for made in rounds]):
        try:
            rounds.append(_round(job, rule, student, silent, seed + len(rounds)))
        except ScoringError as error:
            if not rounds:
                raise
            stopped = f"; the next stage failed: {error}"
            break
        student, silent = rounds[-1].student, rounds[-1].silent
    best = rule.best([made.agreement for made in rounds])
    kept = rounds[best]
    product = job.distilled_closer(kept.student, kept.silent, seed + rule.most)
    stages = tuple(
        Stage(len(made.silent), made.agreement, number == best)
        for number, made in enumerate(rounds)
    )
    reason = (
        f"of {len(rounds)} networks, each pruned further than the one before and distilled, that "
        f"of stage {best + 1} is most like the given one on held-out images{stopped}"
    )
    return Pruned(product, rounds[0].scores, replace(kept.silent, reason=reason), stages)


def _round(job: Job, rule: Stages, student: nn.Module, silent: Selection, seed: int) -> _Round:
    """One stage: of the network as given, or of the last stage's."""
    scores = job.ranked(student, seed)
    silent = rule.more(scores, silent)
    student = job.distilled(student, silent, seed)
    agreement = Agreement.of(job.prepared.model, frozen_copy(student), job.selecting.images)
    return _Round(scores, silent, student, agreement)
