"""Remove silent attention heads: what computes them, and the columns that read them.

What belongs to a head alone is observed. A slice of a weight, of a table of position biases or of
any other tensor goes if it influences what the silent heads read out, and neither the other heads
nor the logits: by its gradient, which is then zero exactly.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..core.heads import find_heads
from ..core.scores import Selection
from ..core.sites import Neuron, Site
from ..core.trace import LAYERS, NORMS, Trace, channel_axis
from ..utils.hooks import hooked
from .probing import is_depthwise
from .recipe import ATTRIBUTES, HEAD_COUNTS, HEAD_WIDTHS, Cut, Recipe
from .recipes import compose, stay_of

NOT_SILENT = "it is not silent in the model; run silence_ on it before"

LAST_HEAD = "it is the last head of its attention"


def remove_heads(
    model: nn.Module,
    selection: Selection,
    example: Tensor,
    problem: Callable[[Recipe], str],
) -> tuple[Recipe, dict[Neuron, str]]:
    """The recipe that removes the selected heads, and the reasons why some of them stay.

    Args:
        model: a frozen copy in which they are silent.
        selection: other neurons than heads are left alone.
        example: images (N, C, H, W), N >= 2.
        problem: why a recipe cannot be applied; empty if it can.
    """
    going, reasons = _going(model, selection)
    if not going:
        return Recipe(), reasons
    influence = _Influence(model, example[:2], going)
    cuts = {site: influence.recipe(site, heads) for site, heads in going.items()}
    whole = functools.reduce(compose, cuts.values())
    if not problem(whole):
        return whole, reasons
    recipe = Recipe()
    for site, cut in cuts.items():
        larger = compose(recipe, cut)
        if why := problem(larger):
            reasons |= {Neuron(site.name, head): why for head in going[site]}
        else:
            recipe = larger
    return recipe, reasons


def _going(
    model: nn.Module, selection: Selection
) -> tuple[dict[Site, list[int]], dict[Neuron, str]]:
    """The selected heads that are silent, of each site all but one, and why others stay."""
    going: dict[Site, list[int]] = {}
    reasons: dict[Neuron, str] = {}
    selected = selection.by_site()
    for site in selection.sites:
        if site.kind != "heads" or site.name not in selected:
            continue
        weights = site.weights_of(model.get_submodule(site.name))
        heads = [head for head in selected[site.name] if not weights[head].any()]
        stay = set(selected[site.name]) - set(heads)
        reasons |= {Neuron(site.name, head): NOT_SILENT for head in stay}
        if len(heads) == site.channels:
            reasons[Neuron(site.name, heads.pop())] = LAST_HEAD
        if heads:
            going[site] = heads
    return going, reasons


class _Influence:
    """What influences the heads of a model and its logits, on some images."""

    def __init__(self, model: nn.Module, example: Tensor, sites: Iterable[Site]) -> None:
        # a conversion makes modules forget what they keep of earlier passes
        self._model = model = copy.deepcopy(model).float()
        self._generator = torch.Generator().manual_seed(0)
        names = {module: name for name, module in model.named_modules()}
        self._heads = {names[h.layer]: h for h in find_heads(Trace.of(model, example.float()))}
        self._names = names
        model.float()
        within = [m for site in sites for m in self._heads[site.name].module.modules()]
        self._tensors = {
            f"{names[module]}.{name}": tensor.detach().clone().requires_grad_()
            for module in dict.fromkeys(within)
            for name, tensor in {**module._parameters, **_float_buffers(module)}.items()
            if tensor is not None
        }
        self._reads: dict[str, list[Tensor]] = {site.name: [] for site in sites}

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], _: object) -> None:
            self._reads[names[module]].append(inputs[0])

        layers = [model.get_submodule(name) for name in self._reads]
        with torch.enable_grad(), hooked(layers, keep):
            logits = torch.func.functional_call(
                model, self._tensors, (example.float(),), tie_weights=False
            )
        self._needed = self._influencing(logits, self._tensors)

    def _influencing(self, output: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """Name -> bool, in the shape of the tensor: which elements influence an output."""
        noise = torch.randn(output.shape, generator=self._generator).to(output)
        tensors = {name: self._tensors[name] for name in names}
        found = torch.autograd.grad(
            (output * noise).sum(),
            list(tensors.values()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        # a gradient of NaN counts as influence
        return {name: grad != 0 for name, grad in zip(tensors, found, strict=True)}

    def recipe(self, site: Site, heads: list[int]) -> Recipe:
        """What removes these heads of a site, as far as it can be told."""
        attention = self._heads[site.name].module
        names = [
            name
            for name in self._tensors
            if any(name.rpartition(".")[0] == self._names[m] for m in attention.modules())
        ]
        layer = self._model.get_submodule(site.name)
        marks = torch.zeros(site.channels, dtype=torch.bool)
        marks[heads] = True
        marks = marks.repeat_interleave(site.width)
        of_silent = self._read_from(site, marks, names)
        of_others = self._read_from(site, ~marks, names)
        found: dict[nn.Module, dict[str, tuple[int, Tensor]]] = {layer: {"weight": (1, marks)}}
        for name in names:
            holder, _, tensor = name.rpartition(".")
            own = _own_slices(of_silent[name], of_others[name] | self._needed[name])
            if own is not None:
                found.setdefault(self._model.get_submodule(holder), {})[tensor] = own
        cuts = {self._names[module]: _cut_of(module, slices) for module, slices in found.items()}
        for module in dict.fromkeys([attention, *found]):
            name = self._names[module]
            widths = _head_attributes(module, site.channels, site.channels - len(heads))
            if widths:
                cut = cuts.get(name, Cut())
                cuts[name] = dataclasses.replace(cut, attributes={**cut.attributes, **widths})
        return Recipe(cuts)

    def _read_from(self, site: Site, marks: Tensor, names: list[str]) -> dict[str, Tensor]:
        """What influences the marked inputs of a site's layer."""
        layer = self._model.get_submodule(site.name)
        read = [
            x.movedim(channel_axis(layer, x.ndim), 0)[marks.to(x.device)].flatten()
            for x in self._reads[site.name]
        ]
        return self._influencing(torch.cat(read), names)


def _float_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that may be differentiated: none of a norm."""
    held = {} if isinstance(module, NORMS) else module._buffers
    return {name: b for name, b in held.items() if b is not None and b.is_floating_point()}


def _own_slices(silent: Tensor, others: Tensor) -> tuple[int, Tensor] | None:
    """An axis, and marks along it: elements of the silent heads that no others share."""
    for axis, size in enumerate(silent.shape):
        own, shared = (m.movedim(axis, 0).reshape(size, -1).any(1) for m in (silent, others))
        if own.any() and not own.all() and not (own & shared).any():
            return axis, own.cpu()
    return None


def _cut_of(module: nn.Module, found: dict[str, tuple[int, Tensor]]) -> Cut:
    """The cut of a module that loses the marked slices of its tensors."""
    tensors = {n: t for n, t in {**module._parameters, **module._buffers}.items() if t is not None}
    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    attributes: dict[str, int] = {}
    for name, (axis, marks) in found.items():
        if isinstance(module, LAYERS):
            if name != "weight":
                continue
            together = ["weight", "bias"] if axis == 0 else ["weight"]
            together = [other for other in together if other in tensors]
            stay = stay_of(marks)
            attributes |= _widths(module, axis, len(stay))
        else:
            # what is added to keys, and the means of a norm, have no influence but by rounding
            together = [o for o, t in tensors.items() if t.shape == tensors[name].shape]
            together = [other for other in together if tensors[other].is_floating_point()]
            same = [found[o][1] for o in together if o in found and found[o][0] == axis]
            stay = stay_of(torch.stack(same).any(0))
            attributes |= {
                a: len(stay) for a in ATTRIBUTES if getattr(module, a, None) == len(marks)
            }
        kept |= {other: {axis: stay} for other in together}
    return Cut(kept, attributes)


def _widths(layer: nn.Module, axis: int, width: int) -> dict[str, int]:
    """The attributes of a layer that is left with `width` outputs (axis 0) or inputs (axis 1)."""
    if isinstance(layer, nn.Linear):
        return {"in_features" if axis else "out_features": width}
    if is_depthwise(layer):
        return dict.fromkeys(("in_channels", "out_channels", "groups"), width)
    return {"in_channels" if axis else "out_channels": width}


def _head_attributes(module: nn.Module, old: int, new: int) -> dict[str, int]:
    """Numbers of heads, and of channels of all heads, where attention has `new` heads left."""
    held = {name: getattr(module, name, None) for name in HEAD_COUNTS + HEAD_WIDTHS}
    numbers = {name: value for name, value in held.items() if type(value) is int}
    found = {n: new for n, value in numbers.items() if n in HEAD_COUNTS and value == old}
    return found | {
        name: value // old * new
        for name, value in numbers.items()
        if name in HEAD_WIDTHS and value % old == 0
    }
