"""Groups that an importance leaves alone, and one warning a step that says how many of how many."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch_pruning as tp

from ..errors import UnsupportedModelError
from ..utils.callers import warn_caller
from .graph import members

Kind = Literal["unscored", "heads", "misfit", "broken"]

_WHY: dict[Kind, str] = {
    "unscored": "no neuron in it is scored (classifiers, attention projections and gates never "
    "are)",
    "heads": "no neuron in it is scored, so that no head goes in spite of prune_num_heads=True",
    "misfit": "Torch-Pruning has wrong channel indices for {}",
    "broken": "without channels of it the network does not run ({})",
}
_OPT_OUT = (
    "; if your script mends that after pruning, make the importance with trial=False, or with "
    "trial=a function that mends a model"
)
_NAMED = 3  # groups of a kind that a warning names


class SkippedGroup(NamedTuple):
    """A group that was left unpruned.

    Attributes:
        root: The layer that it was asked for.
        kind: unscored: it has no scored neuron; heads: nor has it, and heads were to be pruned;
            misfit: Torch-Pruning's channel indices do not fit its layers; broken: the network does
            not run without channels of it.
        why: The same in words, with the error.
    """

    root: str
    kind: Kind
    why: str


class SkippedGroups:
    """What was asked for and what was skipped, in this step of a pruner or outside of any."""

    def __init__(self) -> None:
        self.groups: list[SkippedGroup] = []
        self._pruner: tp.pruner.BasePruner | None = None
        self._asked = 0
        self._any_valued = False
        self._told: set[str] = set()

    def asked(self, *, valued: bool) -> None:
        """A group was asked for."""
        self._asked += 1
        self._any_valued |= valued

    def add(self, group: tp.dependency.Group, kind: Kind, about: str = "") -> None:
        """A group is left alone; outside of a step a warning says so, once a kind."""
        root = next(members(group))[0]
        if kind == "unscored" and self._is_of_heads(group):
            kind = "heads"
        skipped = SkippedGroup(root, kind, _WHY[kind].format(about))
        if self._pruner is not None or skipped not in self.groups:
            self.groups.append(skipped)
        if self._pruner is None and kind not in self._told:
            self._told.add(kind)
            advice = _OPT_OUT if kind == "broken" else ""
            warn_caller(
                f"the group of {root!r} is left unpruned, and others like it: {skipped.why}"
                f"{advice}",
                tp,
            )

    def begin(self, pruner: tp.pruner.BasePruner) -> None:
        """From now on a step of this pruner asks about its groups."""
        self._pruner, self._asked, self.groups = pruner, 0, []

    def end(self) -> None:
        """It has asked about all of them, or raised."""
        self._pruner = None

    def report(self) -> None:
        """Sum up the step that has ended in one warning.

        Raises:
            UnsupportedModelError: it asked about some, and no group was ever given values.
        """
        if self.groups and not self._any_valued:
            raise UnsupportedModelError(
                f"none of the {self._asked} groups would be pruned: {self._summary()}"
            )
        roots = {skipped.root for skipped in self.groups}
        if not roots <= self._told:  # later steps of iterative pruning skip the same ones
            self._told |= roots
            warn_caller(
                f"{len(self.groups)} of {self._asked} groups are left unpruned, which the "
                f"importance lists as `skipped`: {self._summary()}",
                tp,
            )

    def _summary(self) -> str:
        kinds: dict[Kind, list[SkippedGroup]] = {}
        for skipped in self.groups:
            kinds.setdefault(skipped.kind, []).append(skipped)
        return "; ".join(
            f"{_names(of_kind)}: {of_kind[0].why}{_OPT_OUT if kind == 'broken' else ''}"
            for kind, of_kind in kinds.items()
        )

    def _is_of_heads(self, group: tp.dependency.Group) -> bool:
        """Whether the pruner that asks would take whole heads of this group."""
        if self._pruner is None or not self._pruner.prune_num_heads:
            return False
        return any(d.target.module in self._pruner.num_heads for _, d, *_ in members(group))


def _names(skipped: list[SkippedGroup]) -> str:
    named = ", ".join(repr(group.root) for group in skipped[:_NAMED])
    more = len(skipped) - _NAMED
    return f"{named} and {more} more" if more > 0 else named
