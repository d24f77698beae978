"""Torch-Pruning importances made of scores, one class for each registered criterion."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from ..core.copies import frozen_copy
from ..core.data import CleanData
from ..core.scores import ChannelScores
from ..criteria.base import Criterion, create_criterion, criterion_class
from ..errors import DataError, UnsupportedModelError
from ..utils.randomness import private_randomness
from ..utils.tensors import placement
from .graph import breaks, members, out_of_range
from .graph_fixes import MENDED
from .ledger import Ledger

Reduction = Literal["max", "min", "mean"]

_REDUCE = {"max": max, "min": min, "mean": lambda ranks: sum(ranks) / len(ranks)}

_JITTER = 1e-3  # below one rank; see `_ranks`


class GroupImportance(tp.importance.Importance):  # type: ignore[misc] # the package is untyped
    """Ranks groups of coupled channels by the scores of the neurons in them; low goes first.

    A neuron's value is its rank among all neurons of the model, so that no two tie and local,
    global and isomorphic pruning alike remove as many channels as they were asked for. (Unless
    that would empty a layer: then Torch-Pruning leaves its whole group as it is.) The scores are
    those of the model as it was given, however many steps of pruning come between.

    Torch-Pruning's pruners trace by autograd and do not see frozen layers: they prune nothing, or
    groups from which the frozen layer is missing. A warning says so; let all parameters ask for
    gradients while the pruner is made, or take the groups from `graph.trace`.

    Args:
        model: the very model that will be pruned.
        scores: of this model, as it is now.
        reduction: of several scored sites in one group. `max`: a shared channel goes only if all
            its sites are suspicious; `min`: if one is; `mean`: in between.
        example: images (N, C, H, W) on the model's device; one is enough. With them each group is
            tried in a copy, and those without which the network does not run are left alone.

    Raises:
        DataError: unknown reduction.
        UnsupportedModelError: the scores are another model's, or from before it was pruned.
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
        self._broken: dict[nn.Module, str] = {}  # root -> why it cannot be cut, empty if it can
        self._reduce: Any = _REDUCE[reduction]
        self._ledger = Ledger(model)
        MENDED.hold(self)
        self._ranks: dict[nn.Module, list[float]] = {}
        layers = dict(model.named_modules())
        for site, ranks in zip(scores.sites, _ranks(scores), strict=True):
            layer = layers.get(site.name)
            width = None if layer is None else len(self._ledger.alive(layer))
            if layer is None or width != site.channels:
                raise UnsupportedModelError(
                    f"the scores know {site.channels} channels of {site.name!r}, the model has "
                    f"{width or 'no such layer'}; score this model, as it is now"
                )
            self._ranks[layer] = ranks
        self._said: set[str] = set()
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        if frozen:
            self._say_once(
                "frozen",
                f"{len(frozen)} parameters are frozen ({frozen[0]!r}, ...), which Torch-Pruning's "
                "own tracing does not see; call model.requires_grad_(True) before making a pruner",
            )

    def __call__(self, group: tp.dependency.Group) -> Tensor | None:
        """Values (C,), float64, one a root channel in the order of `group[0].idxs`; high = keep.

        Root channels of which no neuron is scored (some of a concatenation, for example) come
        after all that are. None, which lets the pruner leave the group alone, where no neuron of
        it is scored, its indices do not fit its layers, or the network would not run without
        channels of it; each is said once.

        Raises:
            UnsupportedModelError: the group is of another model, or a layer was cut in a way that
                the ledger could not see.
        """
        graph = group._DG
        if not any(layer in graph.module2node for layer in self._ranks):
            raise UnsupportedModelError(
                "this importance was made for another model object; make it of the very model "
                "that the pruner is given (a copy is another one)"
            )
        misfit = out_of_range(group)
        if misfit is not None:
            self._say_once(
                "misfit",
                f"Torch-Pruning lost count of the channels of {misfit!r} and what is coupled with "
                "it; groups like this are left unpruned",
            )
            return None
        found = self._ranks_by_root(group)
        if not any(found.values()):
            root = next(members(group))[0]
            self._say_once(
                "unscored",
                f"no neuron in the group of {root!r} is scored (classifiers, attention "
                "projections and gates never are); groups like this are left unpruned",
            )
            return None
        broken = self._breaks(group)
        if broken:
            self._say_once(
                "broken",
                f"without channels of {next(members(group))[0]!r} the network does not run "
                f"({broken}); groups like this are left unpruned",
            )
            return None
        last = float(len(self.scores.flat))
        values = [
            self._reduce(ranks) if ranks else last + position
            for position, ranks in enumerate(found.values())
        ]
        return torch.tensor(values, dtype=torch.float64)

    def _breaks(self, group: tp.dependency.Group) -> str:
        if self._example is None:
            return ""
        root = group[0].dep.target.module
        if root not in self._broken:
            self._broken[root] = breaks(group, self._example, self._shape)
        return self._broken[root]

    def _ranks_by_root(self, group: tp.dependency.Group) -> dict[int, list[float]]:
        """Root channel -> ranks of the scored neurons that would go with it."""
        found: dict[int, list[float]] = {int(root): [] for root in group[0].idxs}
        graph = group._DG
        for name, dependency, channels, roots in members(group):
            ranks = self._ranks.get(dependency.target.module)
            if ranks is None or not graph.is_out_channel_pruning_fn(dependency.handler):
                continue
            alive = self._ledger.alive(dependency.target.module)
            width = graph.get_out_channels(dependency.target.module)
            if len(alive) != width:
                raise UnsupportedModelError(
                    f"{name!r} has {width} channels where {len(alive)} were expected: it was cut "
                    "by other means than Torch-Pruning's groups. Score the model again"
                )
            for channel, root in zip(channels, roots, strict=True):
                if root is not None:
                    found[root].append(ranks[alive[channel]])
        return found

    def _say_once(self, what: str, message: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(message, stacklevel=3)


def _shape_of_logits(model: nn.Module, example: Tensor) -> torch.Size:
    with torch.no_grad():
        logits: Tensor = frozen_copy(model)(example)
    return logits.shape


def _ranks(scores: ChannelScores) -> list[list[float]]:
    """For each site the ranks (C,) of its neurons, 0 = prune first.

    Where scores tie, every site gives its first channels before any gives its last: were ties to
    fall to site order, a global pruner would ask for whole layers, and Torch-Pruning silently
    drops such a group.

    A random fraction of far less than one is added: Torch-Pruning averages over channel groups
    (grouped convolutions, heads) and `mean` over sites, and averages of whole numbers do tie.
    """
    sizes = [site.channels for site in scores.sites]
    spread = torch.cat([(torch.arange(size) + 0.5) / size for size in sizes]).argsort(stable=True)
    order = spread[scores.flat[spread].argsort(stable=True)]
    ranks = torch.empty(len(order), dtype=torch.float64)
    ranks[order] = torch.arange(len(order), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    ranks += _JITTER * torch.rand(len(ranks), dtype=torch.float64, generator=generator)
    return [piece.tolist() for piece in ranks.split(sizes)]


# --- one class a criterion ---


class CriterionImportance(GroupImportance):
    """Scores the model by a registered criterion when it is made.

    Args:
        model: the very model that will be pruned; scoring works on a copy.
        clean_loader: clean images, as for `purify`.
        reduction: see `GroupImportance`.
        seed: same seed, same machine, same scores.
        progress: bars on a terminal.
        **hyperparameters: of the criterion.

    Raises:
        UnknownNameError: no such hyper-parameter.
        DataError, UnsupportedModelError, ScoringError: see there.
    """

    criterion: ClassVar[str]  # its registered name

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
        super().__init__(model, scores, reduction, example=data.images[:1].to(**placement(model)))


def importance_class(name: str) -> type[CriterionImportance]:
    """The importance of the registered criterion `name`: "rnp" -> RNPImportance.

    Raises:
        UnknownNameError: no such criterion; the message names the close ones.
    """
    cls = criterion_class(name)
    if cls not in _CLASSES:
        body = {
            "criterion": name,
            "__doc__": f"{cls.reference}.\n\n{CriterionImportance.__doc__}",
            "__module__": __name__,
        }
        _CLASSES[cls] = type(importance_name(cls), (CriterionImportance,), body)
    return _CLASSES[cls]


_CLASSES: dict[type[Criterion], type[CriterionImportance]] = {}


def importance_name(cls: type[Criterion]) -> str:
    """`RNP` -> "RNPImportance"."""
    return f"{cls.__name__}Importance"
