"""Scores as Torch-Pruning importances, with one class for each registered criterion."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from ..core.copies import frozen_copy
from ..core.data import CleanData
from ..core.originals import refuse_originals
from ..core.scores import ChannelScores
from ..criteria.base import Criterion, create_criterion, criterion_class
from ..errors import DataError, UnsupportedModelError
from ..utils.randomness import private_randomness
from ..utils.tensors import placement
from .graph import breaks, fails, members, out_of_range
from .graph_fixes import GRAPH_FIXES
from .ledger import Ledger

Reduction = Literal["max", "min", "mean"]

_REDUCE = {"max": max, "min": min, "mean": lambda ranks: sum(ranks) / len(ranks)}

_JITTER = 1e-3  # of a rank, to break ties of averages; see `_ranks`


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
        model: the model that will be pruned, not a copy of it.
        scores: of this model in its present state.
        reduction: of the scores of several sites in one group. With "max", a shared channel is
            pruned only if the scores of all its sites are low; with "min", if one is; "mean" is in
            between.
        example: images (N, C, H, W) on the model's device; one is enough. With them, each group is
            first pruned from a copy, and left alone if the copy does not run.

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
    ) -> None:
        if reduction not in _REDUCE:
            raise DataError(f"expected reduction 'max', 'min' or 'mean', got {reduction!r}")
        self.scores = scores
        self.reduction = reduction
        self._example = example
        self._shape = torch.Size() if example is None else _shape_of_logits(model, example)
        self._reduce: Any = _REDUCE[reduction]
        self._ledger = Ledger(model, _refusal(weakref.ref(self)))
        GRAPH_FIXES.hold(self)
        self._ranks: dict[nn.Module, list[float]] = {}
        layers = dict(model.named_modules())
        channels = [
            pair
            for pair in zip(scores.sites, _ranks(scores), strict=True)
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
            get higher values than all others. None, with a warning the first time, if no neuron of
            the group is scored, its indices do not fit its layers, or the network would not run
            without channels of it; the pruner then leaves the group alone.

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
        misfit = out_of_range(group)
        if misfit is not None:
            self._warn_once(
                "misfit",
                f"Torch-Pruning has wrong channel indices for {misfit!r} and the layers coupled "
                "with it; groups like this are left unpruned",
            )
            return None
        ranks_by_root = self._ranks_by_root(group)
        if not any(ranks_by_root.values()):
            root = next(members(group))[0]
            self._warn_once(
                "unscored",
                f"no neuron in the group of {root!r} is scored (classifiers, attention "
                "projections and gates never are); groups like this are left unpruned",
            )
            return None
        error = self._error_without(group)
        if error:
            self._warn_once(
                "broken",
                f"without channels of {next(members(group))[0]!r} the network does not run "
                f"({error}); {unseen or 'groups like this are left unpruned'}",
            )
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

    def refuses(self, group: tp.dependency.Group) -> bool:
        """Whether the network would not run once exactly these channels are pruned, with a warning.

        One channel that can go says little of many, where a layer is cut into halves.
        """
        if self._example is None:
            return False
        error = breaks(group, self._example, self._shape, only=True)
        if not error or self._fails(group._DG.model):  # it does not run with these channels either
            return False
        self._warn_once(
            "broken by several",
            f"without {len(group[0].idxs)} channels of {next(members(group))[0]!r} the network "
            f"does not run ({error}); cuts like this are not made",
        )
        return True

    def _error_without(self, group: tp.dependency.Group) -> str:
        """What happens without channels of a group, in a model that runs with them."""
        if self._example is None:
            return ""
        error = breaks(group, self._example, self._shape)
        reason = self._fails(group._DG.model) if error else ""
        if reason:
            raise UnsupportedModelError(
                "the model itself, with nothing pruned, no longer does what it did when this "
                f"importance was made ({reason}, expected logits of shape {tuple(self._shape)}); "
                "mend it, or make the importance again, after all changes to the model"
            )
        return error

    def _fails(self, model: nn.Module) -> str:
        assert self._example is not None
        return fails(frozen_copy(model), self._example, self._shape)

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
            warnings.warn(message, stacklevel=3)


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


def _shape_of_logits(model: nn.Module, example: Tensor) -> torch.Size:
    frozen = frozen_copy(model)
    refuse_originals(model, frozen, example)
    with torch.no_grad():
        logits: Tensor = frozen(example)
    return logits.shape


def _ranks(scores: ChannelScores) -> list[list[float]]:
    """For each site the ranks (C,) of its neurons, 0 = prune first.

    Equal scores are ranked by the relative position of the channel in its site. If they were ranked
    by the order of the sites, a global pruner would ask for whole layers, which Torch-Pruning
    silently leaves unpruned.

    A random fraction of a rank is added, since averages of whole numbers may tie: Torch-Pruning
    averages over channel groups (grouped convolutions, heads), and "mean" averages over sites.
    """
    sizes = [site.channels for site in scores.sites]
    position = torch.cat([(torch.arange(size) + 0.5) / size for size in sizes])
    by_position = position.argsort(stable=True)
    order = by_position[scores.flat[by_position].argsort(stable=True)]
    ranks = torch.empty(len(order), dtype=torch.float64)
    ranks[order] = torch.arange(len(order), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    ranks += _JITTER * torch.rand(len(ranks), dtype=torch.float64, generator=generator)
    return [piece.tolist() for piece in ranks.split(sizes)]


# --- one class a criterion ---


class CriterionImportance(GroupImportance):
    """Importance by a registered criterion, which scores the model when the importance is made.

    Args:
        model: the model that will be pruned, not a copy of it; scoring works on a copy.
        clean_loader: clean images, as for `purify`.
        reduction: see `GroupImportance`.
        seed: same seed, same machine, same number of threads, same scores.
        progress: show progress bars on a terminal.
        **hyperparameters: of the criterion.

    Attributes:
        criterion: Name under which the criterion is registered.

    Raises:
        UnknownNameError: the criterion has no such hyper-parameter.
        DataError: the images or labels cannot be used.
        UnsupportedModelError: the model cannot be scored.
        ScoringError: the criterion did not reach a usable result.
    """

    criterion: ClassVar[str]

    def __init__(
        self,
        model: nn.Module,
        clean_loader: CleanData | Iterable[Any],
        *,
        reduction: Reduction = "max",
        seed: int = 0,
        progress: bool = False,
        **hyperparameters: Any,
    ) -> None:
        criterion = create_criterion(self.criterion, **hyperparameters)
        with private_randomness(seed):
            data = CleanData.collect(clean_loader)
        scores = criterion(model, data, seed=seed, progress=progress)
        example = data.images[:1].to(**placement(model), copy=True)  # not the storage of all
        super().__init__(model, scores, reduction, example=example)


def importance_class(name: str) -> type[CriterionImportance]:
    """The importance class of a registered criterion; for "rnp" it is `RNPImportance`.

    Raises:
        UnknownNameError: no criterion has that name; the message lists similar ones.
    """
    cls = criterion_class(name)
    if cls not in _CLASSES:
        body = {
            "criterion": name,
            "__doc__": f"{cls.reference}.\n\n{CriterionImportance.__doc__}",
            "__module__": __name__,
        }
        # another thread may have made it by now
        _CLASSES.setdefault(cls, type(importance_name(cls), (CriterionImportance,), body))
    return _CLASSES[cls]


_CLASSES: dict[type[Criterion], type[CriterionImportance]] = {}


def importance_name(cls: type[Criterion]) -> str:
    """`RNP` -> "RNPImportance"."""
    return f"{cls.__name__}Importance"
