"""Prune copies of a network first, to see whether it still runs.

A view with a fixed number of heads, a split of fixed sizes, a layer that Torch-Pruning prunes
wrongly: none of them is seen in the graph, all of them stop the forward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from ..core.copies import frozen_copy
from ..core.originals import refuse_originals
from ..errors import UnsupportedModelError
from ..utils.tensors import placement
from .graph import members, one_channel, out_of_range

Mend = Callable[[nn.Module], object]

_PIXELS = 64  # a side of the images that are run, where the network takes smaller ones

# where a tensor of channels lies, what cuts it, and along which of its dimensions
_Cut = tuple[str, Any, Any]


class Trial:
    """Copies of one network, which lose channels in place of it.

    Args:
        model: gives the logits. The pruned network may be this one, a part of it, or hold it.
        example: images (N, C, H, W) on the model's device; one is enough.
        mend: called on a copy of the pruned network after each cut, to mend what the caller's own
            script mends after pruning.

    Raises:
        UnsupportedModelError: the model cannot be copied.
    """

    def __init__(self, model: nn.Module, example: Tensor, mend: Mend | None = None) -> None:
        self._model, self._example, self._mend = model, example, mend
        frozen = frozen_copy(model)
        refuse_originals(model, frozen, example)
        with torch.no_grad():
            shape = shape_of_logits(frozen(example.clone()))
        small = example[..., :_PIXELS, :_PIXELS]
        if small.shape != example.shape and not _why_not(frozen, small, shape):
            self._example = small
        # what the networks that are run gave with all their channels
        self._shapes: weakref.WeakKeyDictionary[nn.Module, tuple[Any, ...]]
        self._shapes = weakref.WeakKeyDictionary({model: shape})
        self._kept: nn.Module | None = None
        self._tried: tuple[tp.DependencyGraph, int, dict[nn.Module, str]] | None = None

    def error_without(
        self, group: tp.dependency.Group, layers: Sequence[nn.Module], cuts: int
    ) -> str:
        """Why the network does not run without one channel of a group; empty if it runs.

        What is found is kept until channels go: the groups of all `layers` are tried at once.

        Args:
            group: with a layer of `layers`; it is not pruned.
            layers: whose output channels may be pruned.
            cuts: how often channels went; another number, and all is tried again.

        Raises:
            UnsupportedModelError: the network does not run with all channels either.
        """
        graph = group._DG
        if self._tried is None or self._tried[0] is not graph or self._tried[1] != cuts:
            self.forget()
            errors = self._broken(graph, [m for m in layers if m in graph.module2node])
            self._tried = graph, cuts, errors
        *_, errors = self._tried
        return next(filter(None, (errors.get(m, "") for m in _losing_outputs(group))), "")

    def _broken(
        self, graph: tp.DependencyGraph, layers: Sequence[nn.Module]
    ) -> dict[nn.Module, str]:
        """What is wrong without a channel of a layer, for each layer where something is.

        All are cut at once; only where that fails, halves of them are tried by themselves.
        """
        outer, _ = self._around(graph.model)
        if why := self._why_uncut(outer, graph.model):
            raise UnsupportedModelError(
                "the model itself, with nothing pruned, no longer does what it did when this "
                f"importance was made ({why}, expected logits of shape "
                f"{self._shapes.get(outer)}); mend it, or make the importance again, after all "
                "changes to the model"
            )
        groups: list[tuple[tp.dependency.Group, list[nn.Module]]] = []
        covered: set[nn.Module] = set()
        for layer in layers:
            if layer not in covered:
                group = one_channel(graph, layer)
                coupled = set(_losing_outputs(group)) - covered
                own = [module for module in layers if module in coupled]
                covered.update(own)
                if out_of_range(group) is None:
                    groups.append((group, own))
        errors: dict[nn.Module, str] = {}
        waiting = [groups] if groups else []
        while waiting:
            some = waiting.pop()
            error = self._without(frozen_copy(outer), [group for group, _ in some])
            if error and len(some) == 1:
                errors.update(dict.fromkeys(some[0][1], error))
            elif error:
                half = len(some) // 2
                waiting += [some[:half], some[half:]]
        return errors

    def breaks(self, group: tp.dependency.Group) -> str:
        """Why the network does not run without exactly these channels; empty if it runs.

        Also empty if it does not run with them either. A copy is kept without them, for the groups
        that are pruned after this one.
        """
        outer, _ = self._around(group._DG.model)
        if outer not in self._shapes and self._why_uncut(outer, group._DG.model):
            return ""
        kept, self._kept = self._kept, None
        fits = kept is not None and _sizes(kept) == _sizes(outer)
        if kept is not None and fits and not self._without(kept, [group]):
            self._kept = kept
            return ""
        copy = frozen_copy(outer)
        error = self._without(copy, [group])
        if not error:
            self._kept = copy
        elif self._why_uncut(outer, group._DG.model):
            return ""
        return error

    def forget(self) -> None:
        """Keep no copy: the next group is tried on a new one."""
        self._kept = None

    def _around(self, pruned: nn.Module) -> tuple[nn.Module, str]:
        """The network to run for the sake of the pruned one, and where that lies in it."""
        for name, module in self._model.named_modules():
            if module is pruned:
                return self._model, name
        return pruned, ""

    def _why_uncut(self, outer: nn.Module, pruned: nn.Module) -> str:
        """Why a network does not run, or gives other logits than before, as it is."""
        copy = frozen_copy(outer)
        if error := self._mended(copy, self._around(pruned)[1]):
            return error
        if outer in self._shapes:
            return _why_not(copy, self._example, self._shapes[outer])
        try:  # it holds the network that was scored, or parts of it
            with torch.no_grad():
                output = copy(self._example.to(**placement(copy), copy=True))
        except Exception as error:  # a network may raise anything
            return f"{type(error).__name__}: {error}"
        self._shapes[outer] = shape_of_logits(output)
        return ""

    def _without(self, copy: nn.Module, groups: Sequence[tp.dependency.Group]) -> str:
        """Why a copy does not run once it has lost all these groups; empty if it runs."""
        outer, place = self._around(groups[0]._DG.model)
        inner = copy.get_submodule(place)
        try:
            with torch.no_grad():
                _cut(inner, _together(groups))
        except Exception as error:  # whatever Torch-Pruning raises on indices that do not fit
            return f"{type(error).__name__}: {error}"
        return self._mended(copy, place) or _why_not(copy, self._example, self._shapes[outer])

    def _mended(self, copy: nn.Module, place: str) -> str:
        if self._mend is None:
            return ""
        try:
            self._mend(copy.get_submodule(place))
        except Exception as error:  # whatever a function of the caller's raises
            return f"mending it raised {type(error).__name__}: {error}"
        return ""


def shape_of_logits(output: Any) -> tuple[Any, ...]:
    """Shape of the logits in what a classifier gives: a tensor, or something with `logits` in it.

    Of another tuple or list: the shapes of the matrices in it.
    """
    if isinstance(output, Mapping):
        output = output.get("logits")
    output = getattr(output, "logits", output)
    if isinstance(output, Tensor):
        return tuple(output.shape)
    many = output if isinstance(output, (tuple, list)) else ()
    return tuple(tuple(t.shape) for t in many if isinstance(t, Tensor) and t.ndim == 2)


def _losing_outputs(group: tp.dependency.Group) -> list[nn.Module]:
    """The layers of a group that lose output channels, not only those that read them."""
    is_output = group._DG.is_out_channel_pruning_fn
    return [d.target.module for _, d, *_ in members(group) if is_output(d.handler)]


def _why_not(model: nn.Module, example: Tensor, shape: tuple[Any, ...]) -> str:
    """Why a model does not give logits of this shape for an example; empty if it does."""
    try:
        with torch.no_grad():
            result = shape_of_logits(model(example.to(**placement(model), copy=True)))
    except Exception as error:  # a network may raise anything on shapes that it does not expect
        return f"{type(error).__name__}: {error}"
    return "" if result == shape else f"logits of shape {result}"


def _sizes(model: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, parameter.shape) for name, parameter in model.named_parameters()]


def _together(groups: Iterable[tp.dependency.Group]) -> dict[_Cut, set[int]]:
    """All that the groups take, so that no cut moves the channels that another one means."""
    cuts: dict[_Cut, set[int]] = {}
    for group in groups:
        for name, dependency, channels, _ in members(group):
            where = (name, dependency.handler, dependency.target.pruning_dim)
            cuts.setdefault(where, set()).update(channels)
    return cuts


def _cut(model: nn.Module, cuts: Mapping[_Cut, set[int]]) -> None:
    """Prune a model that has the names of the groups' own."""
    for (name, handler, dimension), channels in cuts.items():
        handler.__self__.pruning_dim = dimension
        holder, _, attribute = name.rpartition(".")
        module = model.get_submodule(holder)
        target = getattr(module, attribute)
        smaller = handler(target, sorted(channels))
        if isinstance(target, nn.Parameter):
            setattr(module, attribute, smaller)
