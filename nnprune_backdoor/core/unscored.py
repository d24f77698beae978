"""What computes with weights and is not scored, counted by kind: a backdoor there stays unseen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.utils.parametrize import ParametrizationList, type_before_parametrizations
from torch.overrides import TorchFunctionMode

from ..utils.hooks import hooked
from .copies import clone
from .heads import computing_only, find_heads
from .logits import find_logit_layers
from .products import layers_in_products
from .sites import Site
from .trace import GATINGS, LAYERS, PRODUCTS, Trace, edges_of, nodes_before

_MULTIPLYING = PRODUCTS | GATINGS | {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def unscored(model: nn.Module, example: Tensor, sites: Iterable[Site]) -> tuple[str, ...]:
    """What is not scored, a phrase for each kind; the classifier is not counted.

    Layers that only compute attention heads are scored with these.

    Kinds: projections inside attention, layers inside gates, and by class transposed convolutions,
    recurrent layers, and modules that multiply activations with a weight of their own of two or
    more dimensions. Only what ran and changes the logits counts.

    Args:
        model: any classifier in eval mode whose sites can be found; it is left as it was.
        example: images (N, C, H, W) on the model's device; two are enough.
        sites: as of `find_sites`.

    Raises:
        UnsupportedModelError: as `find_sites`.
    """
    copy = clone(model)
    trace = Trace.of(copy, example)
    logits = find_logit_layers(copy, example, trace)
    own = _Pass(copy)
    own.run(example, gradients=bool(trace.output_edges))
    if not logits.classifiers:
        own.forget_last()  # a bare product gives the logits
    scored = {copy.get_submodule(site.producer) for site in sites}
    scored |= computing_only(trace, [h for h in find_heads(trace) if h.layer in scored])
    known = scored | {*logits.classifiers, *logits.last}
    attention = layers_in_products(copy, _only(trace, elementwise=False))
    gates = layers_in_products(copy, _only(trace, elementwise=True))
    found: dict[str, list[int | None]] = {}
    for module in own.effective():
        if module in known:
            continue
        kind = f"{type_before_parametrizations(module).__name__} layer"
        if isinstance(module, nn.MultiheadAttention):
            kind = "attention layer"
        elif isinstance(module, LAYERS) and module in attention:
            kind = "projection layer inside attention"
        elif isinstance(module, LAYERS) and module in gates:
            kind = "layer inside gates"
        found.setdefault(kind, []).append(_channels(module))
    return tuple(_phrase(kind, channels) for kind, channels in found.items())


def _only(trace: Trace, *, elementwise: bool) -> Trace:
    return replace(trace, products=[p for p in trace.products if p.elementwise == elementwise])


def _phrase(kind: str, channels: list[int | None]) -> str:
    count = len(channels)
    if count > 1:
        kind = kind.replace("layer", "layers", 1)
    known = [number for number in channels if number is not None]
    what = f"{sum(known):,} channels" if len(known) == count else "the weights"
    return f"{what} of {count} {kind}"


def _channels(module: nn.Module) -> int | None:
    """Number of output channels; None where that cannot be told."""
    if isinstance(module, nn.MultiheadAttention):
        return int(4 * module.embed_dim)  # queries, keys, values, output
    if isinstance(module, nn.RNNBase):
        return int(module.hidden_size * module.num_layers * (1 + module.bidirectional))
    for attribute in ("out_channels", "out_features", "hidden_size"):
        if type(number := getattr(module, attribute, None)) is int:
            return number
    return None


class _Pass(TorchFunctionMode):
    """Watches a forward pass: which modules ran, and whose weights multiplied activations."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._ran: dict[nn.Module, list[GradientEdge]] = {}
        self._used: dict[nn.Module, None] = {}
        self._output: tuple[GradientEdge, ...] = ()
        self._kept: list[Tensor] = []  # alive, so that no other tensor gets their addresses
        # storage of a parameter or buffer, or of what is computed from these alone -> the modules
        # that hold the weights behind it
        self._held: dict[int, set[nn.Module]] = {}
        parents = dict(model.named_modules())
        for name, module in parents.items():
            owner = module
            if isinstance(module, ParametrizationList):
                owner = parents[name.rpartition(".parametrizations.")[0]]
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    weight = isinstance(tensor, nn.Parameter) and _is_weight(tensor)
                    self._held.setdefault(_address(tensor), set()).update({owner} if weight else ())

    def run(self, images: Tensor, *, gradients: bool) -> None:
        """Run the model; without gradients all that ran counts as changing the output."""
        watched = hooked(list(self._model.modules()), self._leave)
        with torch.inference_mode(False), torch.set_grad_enabled(gradients), watched, self:
            leaf = images.detach().clone().requires_grad_(gradients)
            self._output = edges_of(self._model(leaf.clone()))

    def forget_last(self) -> None:
        """Do not count the module whose weight multiplied last."""
        if self._used:
            self._used.popitem()

    def effective(self) -> list[nn.Module]:
        """Modules with weights of two dimensions or more that ran and change the output."""
        before = nodes_before(self._output)
        everything = not before
        counted = (*LAYERS, *_RECURRENT, nn.modules.conv._ConvTransposeNd, nn.MultiheadAttention)
        ran = {
            module: None
            for module, edges in self._ran.items()
            if isinstance(module, counted)
            and (everything or not edges or any(e.node in before for e in edges))
        }
        bare = (m for m in self._used if m not in self._ran or not isinstance(m, counted))
        return list(ran | dict.fromkeys(bare))

    def _leave(self, module: nn.Module, _: Any, output: Any) -> None:
        self._ran.setdefault(module, []).extend(edges_of(*_tensors([output])))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = list(_tensors([*args, *(kwargs or {}).values()]))
        held = [self._held[_address(t)] for t in given if _address(t) in self._held]
        if not held:
            return result
        owners = set().union(*held)
        if len(held) == len(given):  # no activation is involved
            for tensor in _tensors([result]):
                self._kept.append(tensor)
                self._held.setdefault(_address(tensor), set()).update(owners)
        elif getattr(func, "__name__", "") in _MULTIPLYING:
            for owner in owners:
                self._used.pop(owner, None)  # the last one stands last
                self._used[owner] = None
        return result


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors in arguments or results, those in lists too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_weight(tensor: Tensor) -> bool:
    """Whether it has two dimensions or more that are not 1, and is not the same for all images.

    Tokens and embeddings of positions have a first dimension of 1, to be added to a batch.
    """
    return sum(size > 1 for size in tensor.shape) > 1 and tensor.shape[0] > 1
