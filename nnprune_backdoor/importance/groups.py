"""Scores as Torch-Pruning importances."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from ..core.scores import ChannelScores
from ..errors import DataError, UnsupportedModelError
from ..utils.callers import warn_caller
from .graph import members, out_of_range
from .graph_fixes import GRAPH_FIXES
from .ledger import Ledger
from .ranks import ranks_by_site
from .skipping import SkippedGroup, SkippedGroups
from .steps import REGULARISERS, STEPS
from .trial import Mend, Trial

Reduction = Literal["max", "min", "mean"]

_REDUCE = {"max": max, "min": min, "mean": lambda ranks: sum(ranks) / len(ranks)}


class GroupImportance(tp.importance.Importance):  # type: ignore[misc] # the package is untyped
    """Importance of coupled channels by the scores of their neurons; low values are pruned first.

    The value of a neuron is its rank among all neurons of the model. Ranks do not tie, so that
    local, global and isomorphic pruning remove as many channels as were asked for, unless that
    would remove a whole layer: Torch-Pruning then leaves its group as it is. The scores stay those
    of the model as given, also in later steps of iterative pruning.

    Torch-Pruning's pruners do not see frozen layers: they prune nothing, or only the other layers
    of a group. A warning says so if the model has frozen parameters. Unfreeze all parameters
    before making the pruner, or take the groups from `importance.graph.trace`.

    Scores of attention heads are not used: Torch-Pruning prunes channels within heads.

    Args:
        model: the model that will be pruned, not a copy of it; or one that returns its logits and
            holds it.
        scores: of this model in its present state.
        reduction: of the scores of several sites in one group. With "max", a shared channel is
            pruned only if the scores of all its sites are low; with "min", if one is; "mean" is in
            between.
        example: images (N, C, H, W) on the model's device; one is enough. With them, each group is
            first pruned from a copy, and left alone if the copy does not run.
        trial: False: nothing is pruned from a copy first. A function: it is called on each such
            copy of the pruner's model, to mend there what your script mends after pruning.

    Raises:
        DataError: unknown reduction.
        UnsupportedModelError: the scores are for another model, or for another state of it.
    """

    def __init__(
        self,
        model: nn.Module,
        scores: ChannelScores,
        reduction: Reduction = "max",
        *,
        example: Tensor | None = None,
        trial: bool | Mend = True,
    ) -> None:
        if reduction not in _REDUCE:
            raise DataError(f"expected reduction 'max', 'min' or 'mean', got {reduction!r}")
        self.scores = scores
        self.reduction = reduction
        self.skipping = SkippedGroups()
        self.trial: Trial | None = None
        if example is not None and trial is not False:
            self.trial = Trial(model, example, None if trial is True else trial)
        self._reduce: Any = _REDUCE[reduction]
        self._ledger = Ledger(model, _refusal(weakref.ref(self)))
        for patch in (GRAPH_FIXES, STEPS, *REGULARISERS):
            patch.hold(self)
        self._ranks: dict[nn.Module, list[float]] = {}
        layers = dict(model.named_modules())
        channels = [
            pair
            for pair in zip(scores.sites, ranks_by_site(scores), strict=True)
            if pair[0].kind != "heads"
        ]
        names = (name for site, _ in channels for name in (site.name, site.producer))
        self._scored = {name: layers[name] for name in names if name in layers}
        for site, ranks in channels:
            layer = layers.get(site.name)
            width = None if layer is None else len(self._ledger.alive(layer))
            if layer is None or width != site.channels:
                raise UnsupportedModelError(
                    f"the scores have {site.channels} channels of {site.name!r}, the model has "
                    f"{width or 'no such layer'}; score this model in its present state"
                )
            self._ranks[layer] = ranks
        self._warned: set[str] = set()
        if frozen := _frozen(model):
            self._warn_once("unseen", frozen)

    def __call__(self, group: tp.dependency.Group) -> Tensor | None:
        """Values of a group's root channels, in the order of `group[0].idxs`; high = keep.

        Returns:
            (C,), float64. Root channels without a scored neuron, such as some of a concatenation,
            get higher values than all others. None, with a warning, if no neuron of the group is
            scored, its indices do not fit its layers, or the network would not run without channels
            of it; the pruner then leaves the group alone.

        Raises:
            UnsupportedModelError: the group is of another model, or the model was changed without
                Torch-Pruning: a layer was cut or replaced, it no longer runs.
        """
        graph = group._DG
        if not any(layer in graph.module2node for layer in self._ranks):
            raise UnsupportedModelError(self._why_unknown(graph.model))
        self._refuse_replaced(graph.model)
        unseen = self._why_unseen(graph)
        if unseen:
            self._warn_once("unseen", unseen)
        values = self._values(group, unseen)
        self.skipping.asked(valued=values is not None)
        return values

    @property
    def skipped(self) -> tuple[SkippedGroup, ...]:
        """The groups that the last step of a pruner left unpruned; after it, others asked about."""
        return tuple(self.skipping.groups)

    def refuses(self, group: tp.dependency.Group) -> bool:
        """Whether the network would not run once exactly these channels are pruned, with a warning.

        One channel that can go says little of many, where a layer is cut into halves.
        """
        error = "" if self.trial is None else self.trial.breaks(group)
        if error:
            self._warn_once(
                "broken by several",
                f"without {len(group[0].idxs)} channels of {next(members(group))[0]!r} the network "
                f"does not run ({error}); cuts like this are not made",
            )
        return bool(error)

    def _values(self, group: tp.dependency.Group, unseen: str) -> Tensor | None:
        misfit = out_of_range(group)
        if misfit is not None:
            self.skipping.add(group, "misfit", repr(misfit))
            return None
        ranks_by_root = self._ranks_by_root(group)
        if not any(ranks_by_root.values()):
            self.skipping.add(group, "unscored")
            return None
        if self.trial is not None:
            error = self.trial.error_without(group, list(self._ranks), self._ledger.cuts)
            if error:
                reason = f"{error}; {unseen}" if unseen else error
                self.skipping.add(group, "broken", reason)
                return None
        count = float(len(self.scores.flat))
        values = [
            self._reduce(ranks) if ranks else count + position
            for position, ranks in enumerate(ranks_by_root.values())
        ]
        return torch.tensor(values, dtype=torch.float64)

    def _refuse_replaced(self, model: nn.Module) -> None:
        """Raise UnsupportedModelError if a scored layer is no longer the one that was scored."""
        known = set(self._scored.values())
        for name, layer in model.named_modules():
            if layer not in known and name in self._scored:
                raise UnsupportedModelError(
                    f"layer {name!r} was replaced after this importance was made, and the scores "
                    "are those of the network with the old one; make the importance again, after "
                    "all changes to the model"
                )

    def _why_unseen(self, graph: tp.DependencyGraph) -> str:
        """Why the graph lacks scored layers of its model; empty if it has them all."""
        unseen = [
            name
            for name, layer in graph.model.named_modules()
            if layer in self._ranks and layer not in graph.module2node
        ]
        if not unseen:
            return ""
        return _frozen(graph.model) or (
            f"Torch-Pruning did not see {len(unseen)} of the scored layers run ({unseen[0]!r}, "
            "...), so they stay as they are; unfreeze parameters before making the pruner, and "
            "take no_grad and inference_mode out of the forward pass"
        )

    def _why_unknown(self, model: nn.Module) -> str:
        """Why the graph of the pruner's model has none of the scored layers."""
        layers = dict(model.named_modules())
        if any(layer in self._ranks for layer in layers.values()):
            return _frozen(model) or (
                "Torch-Pruning saw none of the scored layers run; does the model's forward pass "
                "run under no_grad or inference_mode, or does the pruner's forward_fn call others?"
            )
        names = {site.name for site in self.scores.sites}
        if names & layers.keys():
            return (
                "this importance was made for another model object, of which the pruner's is a "
                "copy or in which layers were replaced; make it for the model that the pruner is "
                "given, after all changes to it"
            )
        return (
            "this importance was made for another model: the pruner's has no layer "
            f"{sorted(names)[0]!r}; make it for the model that the pruner is given"
        )

    def _ranks_by_root(self, group: tp.dependency.Group) -> dict[int, list[float]]:
        """Root channel -> ranks of the scored neurons that would be pruned with it."""
        by_root: dict[int, list[float]] = {int(root): [] for root in group[0].idxs}
        graph = group._DG
        for name, dependency, channels, roots in members(group):
            ranks = self._ranks.get(dependency.target.module)
            if ranks is None or not graph.is_out_channel_pruning_fn(dependency.handler):
                continue
            alive = self._ledger.alive(dependency.target.module)
            width = graph.get_out_channels(dependency.target.module)
            if len(alive) != width:
                raise UnsupportedModelError(
                    f"{name!r} has {width} channels where {len(alive)} were expected, so it was "
                    "cut without Torch-Pruning; score the model again"
                )
            for channel, root in zip(channels, roots, strict=True):
                if root is not None:
                    by_root[root].append(ranks[alive[channel]])
        return by_root

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warn_caller(message, tp)


def _refusal(
    importance: weakref.ref[GroupImportance],
) -> Callable[[tp.dependency.Group], bool]:
    """Asks the importance, which a ledger must not keep alive."""

    def refuses(group: tp.dependency.Group) -> bool:
        asked = importance()
        return asked is not None and asked.refuses(group)

    return refuses


def _frozen(model: nn.Module) -> str:
    """What frozen parameters mean for Torch-Pruning; empty if there are none."""
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if not frozen:
        return ""
    return (
        f"{len(frozen)} parameters of the model are frozen ({frozen[0]!r}, ...), and "
        "Torch-Pruning does not see layers whose output then needs no gradient; call "
        "model.requires_grad_(True) before making the pruner, and freeze them again afterwards"
    )
