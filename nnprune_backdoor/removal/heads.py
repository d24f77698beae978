"""Remove silent attention heads: what computes them, and the columns that read them.

What belongs to a head alone is observed. A slice of a weight, of a table of position biases or of
any other tensor goes if it influences what the silent heads read out, and neither the other heads
nor the logits: by its gradient, which is then zero exactly.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from ..core.heads import find_heads
from ..core.scores import Selection
from ..core.sites import Neuron, Site
from ..core.trace import LAYERS, NORMS, Trace, channel_axis
from ..utils.hooks import hooked
from .probing import is_depthwise
from .recipe import ATTRIBUTES, HEAD_COUNTS, HEAD_WIDTHS, Cut, Recipe, compose
from .recipes import stay_of

NOT_SILENT = "it is not silent in the model; run silence_ on it before"

LAST_HEAD = "it is the last head of its attention"


def remove_heads(
    model: nn.Module,
    selection: Selection,
    example: Tensor,
    problem: Callable[[Recipe], str],
    seconds: float,
) -> tuple[Recipe, dict[Neuron, str]]:
    """The recipe that removes the selected heads, and the reasons why some of them stay.

    Args:
        model: a frozen copy in which they are silent.
        selection: other neurons than heads are left alone.
        example: images (N, C, H, W), N >= 2.
        problem: why a recipe cannot be applied; empty if it can.
        seconds: time limit; heads that are not decided by then stay.
    """
    deadline = time.monotonic() + seconds
    going, reasons = _going(model, selection)
    if not going:
        return Recipe(), reasons
    influence = _Influence(model, example[:2], going)
    plain = {site: influence.recipe(site, heads) for site, heads in going.items()}
    inferred = {site: influence.inferring(site, recipe) for site, recipe in plain.items()}
    ways = [plain, inferred]
    for recipes in ways:
        whole = functools.reduce(compose, recipes.values())
        if not problem(whole):
            return whole, reasons
    recipe = Recipe()
    for site, heads in going.items():
        why = f"not decided within {seconds:g} s"
        for recipes in list(ways) if time.monotonic() < deadline else []:
            larger = compose(recipe, recipes[site])
            why = problem(larger)
            if not why:
                recipe = larger
                ways.sort(key=lambda way: way is not recipes)  # first what worked last
                break
        if why:
            reasons |= {Neuron(site.name, head): why for head in heads}
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


# of the weights inside attention; small ones keep activations and softmax from saturating, where
# gradients vanish
_SCALES = (1.0, 0.1)


@dataclass(frozen=True)
class _Pass:
    """One forward pass.

    Attributes:
        tensors: Those of attention, by name, to differentiate by.
        reads: What the layers that read heads were given, by their name.
        logits: What the model returned.
    """

    tensors: dict[str, Tensor]
    reads: dict[str, list[Tensor]]
    logits: Tensor

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example: Tensor,
        inside: Iterable[str],
        readers: list[str],
        scale: float,
    ) -> Self:
        """Run the model, with the weights of the modules `inside` times a scale."""
        tensors = {}
        for holder in inside:
            module = model.get_submodule(holder)
            held = {**module._parameters, **_float_buffers(module)}
            for name, tensor in held.items():
                if tensor is not None:
                    by = scale if name in module._parameters else 1.0
                    leaf = (tensor.detach() * by).requires_grad_()
                    tensors[f"{holder}.{name}" if holder else name] = leaf
        reads: dict[str, list[Tensor]] = {name: [] for name in readers}
        layers = {model.get_submodule(name): name for name in readers}

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], _: object) -> None:
            reads[layers[module]].append(inputs[0])

        model.float()  # modules forget what they keep of earlier passes where they are converted
        with torch.enable_grad(), hooked(list(layers), keep):
            logits = torch.func.functional_call(model, tensors, (example,), tie_weights=False)
        return cls(tensors, reads, logits)

    def influencing(self, output: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """Name -> bool, in the shape of the tensor: which elements influence an output."""
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        tensors = {name: self.tensors[name] for name in names}
        found = torch.autograd.grad(
            (output * noise).sum(),
            list(tensors.values()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        # a gradient of NaN counts as influence
        return {name: grad != 0 for name, grad in zip(tensors, found, strict=True)}


class _Influence:
    """What influences the heads of a model and its logits, on some images."""

    def __init__(self, model: nn.Module, example: Tensor, sites: Iterable[Site]) -> None:
        self._model = model = copy.deepcopy(model).float()
        example = example.float()
        self._names = names = {module: name for name, module in model.named_modules()}
        self._heads = {names[h.layer]: h for h in find_heads(Trace.of(model, example))}
        readers = [site.name for site in sites]
        within = [m for name in readers for m in self._heads[name].module.modules()]
        inside = dict.fromkeys(names[module] for module in within)
        self._passes = [_Pass.of(model, example, inside, readers, scale) for scale in _SCALES]
        everything = list(self._passes[0].tensors)
        self._needed = _either(p.influencing(p.logits, everything) for p in self._passes)

    def recipe(self, site: Site, heads: list[int]) -> Recipe:
        """What removes these heads of a site, as far as it can be told."""
        attention = self._heads[site.name].module
        names = [
            name
            for name in self._needed
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
        for module in attention.modules():
            if module is not attention and not found.keys() & set(module.modules()):
                continue
            name = self._names[module]
            widths = _head_attributes(module, site.channels, site.channels - len(heads))
            if widths:
                cut = cuts.get(name, Cut())
                cuts[name] = dataclasses.replace(cut, attributes={**cut.attributes, **widths})
        return Recipe(cuts)

    def inferring(self, site: Site, recipe: Recipe) -> Recipe:
        """The recipe for attention that takes the width of its heads from its input."""
        name = self._names[self._heads[site.name].module]
        cut = dataclasses.replace(recipe.layers.get(name, Cut()), inferred=True)
        # not of the whole model, whose class is the user's
        return Recipe({**recipe.layers, name: cut}) if name else recipe

    def _read_from(self, site: Site, marks: Tensor, names: list[str]) -> dict[str, Tensor]:
        """What influences the marked inputs of a site's layer."""
        layer = self._model.get_submodule(site.name)

        def marked(x: Tensor) -> Tensor:
            return x.movedim(channel_axis(layer, x.ndim), 0)[marks.to(x.device)].flatten()

        return _either(
            each.influencing(torch.cat([marked(x) for x in each.reads[site.name]]), names)
            for each in self._passes
        )


def _either(found: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What is marked in any of them."""
    first, *others = found
    for other in others:
        first = {name: marks | other[name] for name, marks in first.items()}
    return first


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
