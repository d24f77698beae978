"""What Torch-Pruning's pruners do with an importance that leaves groups alone.

They skip a group without a word where `importance(group)` is None, and some of their regularisers
raise. While an importance of ours is alive, a step of its pruner ends the scoring with a report,
and a regulariser goes over the groups that have values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch_pruning as tp

from .patching import Patch


def _reporting(original: Callable[[Any], Iterator[Any]]) -> Callable[[Any], Iterator[Any]]:
    def _prune(self: tp.pruner.BasePruner) -> Iterator[tp.dependency.Group]:
        groups = original(self)
        if not any(self.importance is user for user in STEPS.users):
            yield from groups
            return
        skipping = self.importance.skipping
        skipping.begin(self)
        try:
            first = next(groups, None)  # all groups are scored before the first one is given
        finally:
            skipping.end()
        skipping.report()
        try:
            if first is not None:
                yield first
                yield from groups
        finally:
            if self.importance.trial is not None:
                self.importance.trial.forget()

    return _prune


STEPS = Patch(tp.pruner.BasePruner, "_prune", _reporting)


def _over_groups_with_values(original: Callable[..., None]) -> Callable[..., None]:
    def regularize(self: Any, *args: Any, **settings: Any) -> None:
        groups = self._groups
        if any(self.importance is user for user in STEPS.users) and getattr(
            self, "group_lasso", True
        ):
            # group lasso has an importance of its own, which is None without a BatchNorm
            value = getattr(self, "_l2_imp", self.importance)
            self._groups = [group for group in groups if value(group) is not None]
        try:
            original(self, *args, **settings)
        finally:
            self._groups = groups

    return regularize


# the regulariser of the third one, GrowingRegPruner, skips a group that has no value
REGULARISERS = tuple(
    Patch(pruner, "regularize", _over_groups_with_values)
    for pruner in (tp.pruner.GroupNormPruner, tp.pruner.BNScalePruner)
)
