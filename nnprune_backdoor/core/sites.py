"""Find the neurons of any network by watching one forward pass.

Nothing is inferred from names or from the order of registration: a norm layer belongs to the
convolution whose very output it was given, the classifier is what runs last, and attention is
where activations are multiplied with activations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedModelError


@dataclass(frozen=True)
class Site:
    """A layer whose output channels can be switched off.

    `kind` is "norm" (a norm layer standing for itself and the convolution or linear layer,
    `producer`, that feeds it directly) or "layer" (a convolution or linear layer without one).
    """

    name: str
    channels: int
    kind: Literal["norm", "layer"]
    producer: str


class Neuron(NamedTuple):
    """One output channel of one site."""

    site: str
    channel: int


LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)


def find_sites(model: nn.Module, example: Tensor) -> tuple[Site, ...]:
    """Every site of the model, in the order in which the layers run.

    Left out, because silencing them would not switch a neuron off: the classifier; projections
    inside attention (a module that multiplies activations with activations, or calls softmax
    attention); gates (convolutions and linear layers inside a module that multiplies its own input
    by what it computes, as squeeze-and-excitation does); layers that the forward pass never calls.

    Args:
        model: any classifier in eval mode; it is left as it was.
        example: images (N, C, H, W) on the model's device; two are enough.

    Raises:
        UnsupportedModelError: there is no site (the message lists the layer types seen), or the
            affine weights of a norm layer are frozen into buffers (FrozenBatchNorm).
    """
    record = _Recorder(model)
    with torch.no_grad(), record, record.hooks():
        output = model(example)
    return record.sites(output)


def find_classifiers(model: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Names of the layers that give the logits, last to run first.

    One, or several where heads are averaged.

    Args:
        model: any classifier in eval mode; it is left as it was.
        example: images (N, C, H, W) on the model's device; two are enough.

    Raises:
        UnsupportedModelError: the last layer does not have one channel a class.
    """
    record = _Recorder(model)
    with torch.no_grad(), record, record.hooks():
        output = model(example)
    return record.classifiers(output)


class _Recorder(TorchFunctionMode):
    """Which layer ran when, on what, and inside which module activations were multiplied."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[tuple[nn.Module, tuple[Any, ...]]] = []  # innermost call last
        self._mixers: set[nn.Module] = set()  # attention and gate modules
        # layer -> (key of input, key of output when it left, output)
        self._calls: dict[nn.Module, tuple[_Key, _Key, Tensor]] = {}
        self._given: list[tuple[Any, ...]] = []  # to layers
        self._seen_types: set[str] = set()
        held = [*model.parameters(), *model.buffers()]
        self._held = {tensor.untyped_storage().data_ptr() for tensor in held}

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Watch every module; all hooks are gone afterwards, also on error, and buffers as before.

        A forward pass may count in them.
        """
        handles = []
        buffers = [
            (module, name, buffer, buffer._version, buffer.clone())
            for module in self._names
            for name, buffer in module._buffers.items()
            if buffer is not None and not is_lazy(buffer) and not buffer.is_inference()
        ]
        for module in self._names:
            handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, name, buffer, version, before in buffers:
                module._buffers[name] = buffer
                if buffer._version != version:
                    buffer.copy_(before)

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        keys = tuple(_key(tensor) for tensor in inputs if isinstance(tensor, Tensor))
        self._running.append((module, keys))

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        _, keys = self._running.pop()
        if not any(True for _ in module.children()):
            self._seen_types.add(type(module).__name__)
        if not isinstance(output, Tensor) or not keys:
            return
        if _is_frozen_norm(module):
            raise UnsupportedModelError(
                f"layer {self._names[module]!r} is a {type(module).__name__}: its weights are "
                "buffers, so no criterion can learn on them. Convert it first, for example with "
                "timm.layers.unfreeze_batch_norm_2d(model)"
            )
        if isinstance(module, LAYERS + NORMS) and module not in self._calls:
            # inputs and outputs are kept alive, so that their addresses stay their own during the
            # pass: an input that is freed makes room for the output of another layer
            self._calls[module] = (keys[0], _key(output), output)
            self._given.append(inputs)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if self._running and self._mixes(name, args):
            self._mixers.add(self._running[-1][0])
        return func(*args, **(kwargs or {}))

    def _mixes(self, name: str, args: tuple[Any, ...]) -> bool:
        if name == "scaled_dot_product_attention":
            return True
        if name not in _PRODUCTS and name not in _GATINGS:
            return False
        factors = [arg for arg in args if isinstance(arg, Tensor)]
        if len(factors) < 2 or any(self._is_held(factor) for factor in factors):
            return False
        if name in _PRODUCTS:
            return True
        # what is the same for every image is a scale and no gate
        largest = max(factors, key=lambda factor: factor.ndim)
        if any(f.ndim < largest.ndim or f.shape[:1] != largest.shape[:1] for f in factors):
            return False
        given = self._running[-1][1]
        return any(_key(factor) in given for factor in factors)

    def _is_held(self, tensor: Tensor) -> bool:
        """Whether it is a parameter or buffer of the model, or a view of one."""
        return tensor.untyped_storage().data_ptr() in self._held

    def sites(self, output: Any) -> tuple[Site, ...]:
        classifiers = self._classifiers(output)
        left_out = classifiers | self._inside_mixers()
        producers = {
            given_on: module
            for module, (_, given_on, _) in self._calls.items()
            if isinstance(module, LAYERS)
        }
        found: dict[nn.Module, Site] = {}
        with_norm: set[nn.Module] = set()
        for module, (given, _, _) in self._calls.items():
            if not isinstance(module, NORMS) or module.weight is None:
                continue
            producer = producers.get(given)
            if producer is None or _width(producer) != _width(module):
                continue
            with_norm.add(producer)
            if producer not in left_out and module not in left_out:
                name, source = self._names[module], self._names[producer]
                found[module] = Site(name, _width(module), "norm", source)
        for module in producers.values():
            if module not in with_norm and module not in left_out:
                name = self._names[module]
                found[module] = Site(name, _width(module), "layer", name)
        if not found:
            types = ", ".join(sorted(self._seen_types)) or "none"
            raise UnsupportedModelError(
                "found no neuron to score: expected convolution or linear layers besides the "
                f"classifier, attention projections and gates; layer types seen: {types}"
            )
        return tuple(found[module] for module in self._calls if module in found)

    def classifiers(self, output: Any) -> tuple[str, ...]:
        found = self._classifiers(output)
        if not found:
            raise UnsupportedModelError(
                "found no classifier: expected the last convolution or linear layer to have one "
                "channel a class"
            )
        return tuple(self._names[module] for module in reversed(self._calls) if module in found)

    def _classifiers(self, output: Any) -> set[nn.Module]:
        """Trailing layers with one channel a class (several, where heads are averaged)."""
        classes = output.shape[-1] if isinstance(output, Tensor) else -1
        found: set[nn.Module] = set()
        like: tuple[int, int] | None = None
        for module, (given, _, out) in reversed(self._calls.items()):
            if not isinstance(module, LAYERS):
                continue
            sizes = given[2], out.numel()
            if _width(module) != classes or like not in (None, sizes):
                break
            like = sizes  # of the last one; others are averaged with it, not run before it
            found.add(module)
        return found

    def _inside_mixers(self) -> set[nn.Module]:
        inside: set[nn.Module] = set()
        for mixer in self._mixers:
            # a whole network that multiplies activations in its own forward is no attention block
            inside.update(mixer.children() if mixer is self._model else mixer.modules())
        return inside


_PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm", "einsum"}

_GATINGS = {"mul", "mul_", "__mul__", "__imul__", "__rmul__"}


_Key = tuple[int, int, int]


def _key(tensor: Tensor) -> _Key:
    """The same for a tensor and for views of all of it, until somebody writes into it."""
    return tensor.untyped_storage().data_ptr(), tensor._version, tensor.numel()


def _is_frozen_norm(module: nn.Module) -> bool:
    buffers = module._buffers
    return {"weight", "bias", "running_mean", "running_var"} <= buffers.keys()


def _width(module: nn.Module) -> int:
    """Number of output channels of a layer or norm."""
    for attribute in ("out_channels", "out_features", "num_features", "num_channels"):
        if hasattr(module, attribute):
            return int(getattr(module, attribute))
    raise AssertionError(f"{type(module).__name__} is neither a layer nor a norm")
