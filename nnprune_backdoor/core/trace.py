"""Watch one forward pass: which layer ran on what, and where activations were multiplied.

Nothing is inferred from names or from the order of registration. What depends on what is read
from the autograd graph of the pass, which is therefore run with gradients for the images.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from ..errors import PurifyError, UnsupportedModelError

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)

# what PyTorch says of passes that only work without gradients
_NO_GRADIENT = re.compile(r"grad|in-?place|inference|derivative|differentia", re.IGNORECASE)

Key = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer or norm.

    Attributes:
        module: What was called.
        given: Identifies its input (see `_key`).
        gave: Identifies its output as it was when the layer returned.
        shape: Of the output.
        read: Shape of the input.
        edges: The output in the autograd graph, one or, where the pass has no gradient, none.
        inputs: What it was given, in the autograd graph.
    """

    module: nn.Module
    given: Key
    gave: Key
    shape: torch.Size
    read: torch.Size
    edges: tuple[GradientEdge, ...]
    inputs: tuple[GradientEdge, ...]

    def is_output(self, tensor: Tensor) -> bool:
        """Whether the tensor is what the layer gave, or a view of all of it."""
        return self.gave == key_of(tensor)


@dataclass(frozen=True, eq=False)
class Product:
    """A product or difference of tensors, outside of any layer.

    Attributes:
        module: In whose own forward it was computed.
        given: What that module was given, in the autograd graph.
        factors: The factors, in the autograd graph.
        edges: The result in the autograd graph.
        shape: Of the result.
        elementwise: Whether it works element by element.
        mixes: Whether it is a matrix product, attention, or a gate on what the module was given,
            and no factor is a parameter.
    """

    module: nn.Module
    given: tuple[GradientEdge, ...]
    factors: tuple[tuple[GradientEdge, ...], ...]
    edges: tuple[GradientEdge, ...]
    shape: torch.Size
    elementwise: bool
    mixes: bool


@dataclass(eq=False)
class Trace:
    """What one forward pass did.

    Attributes:
        output: What the model returned.
        calls: Calls of layers and norms, in the order in which they returned.
        products: Products outside of layers.
        start: The node of the images in the autograd graph; None without gradients.
        types: Types of the modules without children that ran.
    """

    output: Any = None
    calls: list[Call] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    start: Node | None = None
    types: set[str] = field(default_factory=set)

    @cached_property
    def output_edges(self) -> tuple[GradientEdge, ...]:
        """The model's output in the autograd graph."""
        return edges_of(self.output)

    @cached_property
    def _dependent(self) -> set[Node]:
        factors = [edge for p in self.products for edges in p.factors for edge in edges]
        return _images_reach([*self.output_edges, *factors], self.start)

    def activations(self, product: Product) -> list[GradientEdge]:
        """The factors that depend on the images."""
        edges = [edge for factor in product.factors for edge in factor]
        return [edge for edge in edges if edge.node in self._dependent]

    @classmethod
    def of(cls, model: nn.Module, images: Tensor) -> Self:
        """Run the model (in eval mode) on images (N, C, H, W); it is left as it was.

        The pass has gradients if the model can run with them.

        Raises:
            UnsupportedModelError: the affine weights of a norm layer are buffers.
        """
        images = images.detach()
        with torch.inference_mode(False):
            leaf = images.clone().requires_grad_()
            try:
                # a model may write into what it is given, but not into a leaf
                with torch.enable_grad():
                    return cls._run(model, leaf.clone())
            except RuntimeError as error:
                if isinstance(error, PurifyError) or not _NO_GRADIENT.search(str(error)):
                    raise
        with torch.no_grad():
            return cls._run(model, images.clone())

    @classmethod
    def _run(cls, model: nn.Module, images: Tensor) -> Self:
        trace = cls(start=images.grad_fn)
        recorder = _Recorder(model, trace)
        with recorder, recorder.hooks():
            trace.output = model(images)
        return trace


def _images_reach(start: Iterable[GradientEdge], images: Node | None) -> set[Node]:
    """The nodes before `start` that depend on the images."""
    reached: set[Node] = set()
    done: set[Node] = set()
    waiting = [(edge.node, False) for edge in start]
    while waiting:
        node, earlier_done = waiting.pop()
        earlier = [n for n, _ in node.next_functions if n is not None]
        if earlier_done:
            if node == images or any(n in reached for n in earlier):
                reached.add(node)
        elif node not in done:
            done.add(node)
            waiting.append((node, True))
            waiting += [(n, False) for n in earlier]
    return reached


def nodes_before(start: Iterable[GradientEdge], stops: Set[Node] = frozenset()) -> set[Node]:
    """The nodes of the autograd graph that these depend on, themselves included.

    What is only reached through `stops` does not count, but these do.
    """
    seen: set[Node] = set()
    waiting = [edge.node for edge in start]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            if node not in stops:
                waiting += [earlier for earlier, _ in node.next_functions if earlier is not None]
    return seen


def last_before(start: Iterable[GradientEdge], stops: set[Node]) -> list[Node]:
    """Of `stops` those from which `start` is reached without passing another one."""
    seen: set[Node] = set()
    reached: list[Node] = []
    waiting = [edge.node for edge in start]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in stops:
            reached.append(node)
        else:
            waiting += [earlier for earlier, _ in node.next_functions if earlier is not None]
    return reached


def edges_of(*tensors: Any) -> tuple[GradientEdge, ...]:
    """Where tensors stand in the autograd graph; those without gradient nowhere."""
    return tuple(
        get_gradient_edge(tensor)
        for tensor in tensors
        if isinstance(tensor, Tensor) and tensor.requires_grad
    )


class _Recorder(TorchFunctionMode):
    """Fills a trace; hooks see modules, the mode sees functions."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        super().__init__()
        self._trace = trace
        self._names = {module: name for name, module in model.named_modules()}
        self._thread = threading.get_ident()  # hooks see the calls of all threads
        self._running: list[tuple[nn.Module, tuple[Any, ...]]] = []  # innermost call last
        # inputs and outputs are kept alive, so that their addresses stay their own during the
        # pass: an input that is freed makes room for the output of another layer
        self._kept: list[Any] = []
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
            with torch.no_grad():
                for module, name, buffer, version, before in buffers:
                    module._buffers[name] = buffer
                    if buffer._version != version:
                        buffer.copy_(before)

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if threading.get_ident() != self._thread:
            return
        self._running.append((module, tuple(i for i in inputs if isinstance(i, Tensor))))

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        self._running.pop()
        if not any(True for _ in module.children()):
            self._trace.types.add(type(module).__name__)
        tensors = [tensor for tensor in inputs if isinstance(tensor, Tensor)]
        if not isinstance(output, Tensor) or not tensors:
            return
        if _is_frozen_norm(module):
            raise UnsupportedModelError(
                f"layer {self._names[module]!r} is a {type(module).__name__}: its weights are "
                "buffers, so no criterion can learn on them. Convert it first, for example with "
                "timm.layers.unfreeze_batch_norm_2d(model)"
            )
        if isinstance(module, LAYERS + NORMS):
            given, gave = key_of(tensors[0]), key_of(output)
            shapes = output.shape, tensors[0].shape
            edges = edges_of(output), edges_of(*tensors)
            self._trace.calls.append(Call(module, given, gave, *shapes, *edges))
            self._kept += [inputs, output]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        module, given = self._running[-1] if self._running else (None, ())
        if module is None or isinstance(module, LAYERS + NORMS) or name not in _NOTED:
            return func(*args, **(kwargs or {}))
        factors = [arg for arg in _flat(args) if isinstance(arg, Tensor)]
        mixes = self._mixes(name, factors, given)
        # before the call, which may write into a factor
        before = edges_of(*given), tuple(map(edges_of, factors))
        result = func(*args, **(kwargs or {}))
        elementwise = name in _ELEMENTWISE
        shape = getattr(result, "shape", torch.Size())
        product = Product(module, *before, edges_of(result), shape, elementwise, mixes)
        self._trace.products.append(product)
        return result

    def _mixes(self, name: str, factors: list[Tensor], given: tuple[Tensor, ...]) -> bool:
        if name == "scaled_dot_product_attention":
            return True
        if name not in _MIXING and name not in GATINGS:
            return False
        if len(factors) < 2 or any(self._is_held(factor) for factor in factors):
            return False
        if name in _MIXING:
            return True
        # what is the same for every image is a scale and no gate
        largest = max(factors, key=lambda factor: factor.ndim)
        if any(f.ndim < largest.ndim or f.shape[:1] != largest.shape[:1] for f in factors):
            return False
        keys = [key_of(tensor) for tensor in given]
        return any(key_of(factor) in keys for factor in factors)

    def _is_held(self, tensor: Tensor) -> bool:
        """Whether it is a parameter or buffer of the model, or a view of one."""
        return tensor.untyped_storage().data_ptr() in self._held


def _flat(args: Iterable[Any]) -> Iterator[Any]:
    """Arguments, those in lists too (einsum takes its operands either way)."""
    for arg in args:
        if isinstance(arg, (tuple, list)):
            yield from arg
        else:
            yield arg


_MIXING = {"matmul", "__matmul__", "bmm", "baddbmm", "einsum"}

GATINGS = {"mul", "mul_", "__mul__", "__imul__", "__rmul__", "multiply"}

PRODUCTS = _MIXING | {
    *("__rmatmul__", "mm", "addmm", "linear", "bilinear", "tensordot", "inner", "cdist"),
    *("conv1d", "conv2d", "conv3d", "cosine_similarity", "pairwise_distance"),
}

_ELEMENTWISE = GATINGS | {"sub", "__sub__", "__rsub__", "rsub", "subtract"}

_NOTED = PRODUCTS | _ELEMENTWISE | {"scaled_dot_product_attention"}


def key_of(tensor: Tensor) -> Key:
    """The same for a tensor and for views of all of it, until somebody writes into it."""
    return tensor.untyped_storage().data_ptr(), tensor._version, tensor.numel()


def channel_axis(module: nn.Module, dimensions: int) -> int:
    """Axis of the channels in what a convolution or linear layer reads or emits."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return dimensions - len(module.kernel_size) - 1
    return dimensions - 1


def _is_frozen_norm(module: nn.Module) -> bool:
    buffers = module._buffers
    return {"weight", "bias", "running_mean", "running_var"} <= buffers.keys()


def layers_without_effect(model: nn.Module, images: Tensor, trace: Trace) -> set[nn.Module]:
    """Layers that ran and do not change the output, as an auxiliary head's; tried, not guessed.

    Args:
        model: the traced model.
        images: what it was traced on.
        trace: of one forward pass.
    """
    before = nodes_before(trace.output_edges)
    reached: set[nn.Module] = {
        c.module for c in trace.calls if c.edges and c.edges[0].node in before
    }
    layers: set[nn.Module] = {
        c.module for c in trace.calls if isinstance(c.module, LAYERS) and c.edges
    }
    suspects = layers - reached if trace.output_edges else set()

    def changed(modules: set[nn.Module]) -> bool:
        thread = threading.get_ident()

        def shift(_: nn.Module, inputs: object, output: Tensor) -> Tensor:
            return output + output.abs().max() + 1 if threading.get_ident() == thread else output

        with contextlib.ExitStack() as hooks, torch.no_grad():
            for module in modules:
                hooks.enter_context(module.register_forward_hook(shift))
            return not torch.equal(model(images.clone()), trace.output)

    if not suspects or not changed(suspects):
        return suspects
    # a detached part of the network, perhaps
    return {module for module in suspects if not changed({module})}
