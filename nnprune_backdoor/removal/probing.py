"""A network with its dense layers cut loose, and what single passes through it tell.

Every dense layer (convolution, linear) reads its input, and emits whatever an analysis wants in
place of its output. What lies between two dense layers (norms, activations, sums, gates, reshapes,
attention) runs as it is, so what it does to channels is seen and need not be known.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.sites import LAYERS
from ..utils.hooks import hooked

# noise is drawn at each of these scales, in units of what a channel does on the example: large
# enough to get past any bias, small enough not to saturate a gate
_SPREADS = (1.0, 8.0, 64.0, 4096.0)

_FLAT = 1e-6  # relative range below which an input counts as constant


Marks = dict[nn.Module, Tensor]  # layer -> bool (channels,)


class OutOfTime(Exception):
    """The analysis has run for longer than it may; the message says so to people."""


@dataclass
class Taint:
    """Where the channels of some dense layers arrive."""

    inputs: Marks = field(default_factory=dict)  # of dense layers
    along: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    astray: bool = False  # in all channels of something, or in the logits


@dataclass(frozen=True)
class Call:
    """One call of a dense layer on the example: form of its output, and its channels' scale."""

    shape: torch.Size
    dtype: torch.dtype
    mean: Tensor  # broadcasts against the output
    spread: Tensor

    def quiet(self) -> Tensor:
        """Every channel at its mean."""
        return self.mean.to(self.dtype).expand(self.shape).clone()


class Network:
    """A model whose dense layers are cut loose from each other, one forward pass at a time.

    Args:
        model: a copy in eval mode for this alone: a forward of a layer's own, which somebody set on
            the instance, is gone afterwards.
        example: two or more images on its device.
        seconds: what all passes together may take; then `OutOfTime` is raised.
    """

    def __init__(self, model: nn.Module, example: Tensor, seconds: float = 1e9) -> None:
        self.model = model
        self.example = example
        self.generator = torch.Generator().manual_seed(0)
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._calls: dict[nn.Module, list[Call]] = {}
        self._watch()
        self.dense = list(self._calls)

    def _watch(self) -> None:
        def note(module: nn.Module, _: Any, output: Tensor) -> None:
            axis = channel_axis(module, output.ndim)
            rest = [other for other in range(output.ndim) if other != axis]
            spread, mean = torch.std_mean(output.float(), rest, correction=0, keepdim=True)
            spread = spread + mean.abs()
            spread = torch.where(spread > 0, spread, spread.new_ones(()))
            call = Call(output.shape, output.dtype, mean, spread)
            self._calls.setdefault(module, []).append(call)

        with hooked([m for m in self.model.modules() if is_dense(m)], note), torch.no_grad():
            self.model(self.example)

    def run(
        self,
        emit: Callable[[nn.Module, Call], Tensor],
        read: Callable[[nn.Module, Tensor], None],
    ) -> Tensor:
        """The logits of one pass in which `emit` gives what a dense layer says in a call."""
        self.check_time()
        calls = {module: iter(calls) for module, calls in self._calls.items()}

        def loose(module: nn.Module) -> Callable[..., Tensor]:
            def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
                read(module, x)
                return emit(module, next(calls[module]))

            return forward

        for module in self.dense:
            module.__dict__["forward"] = loose(module)
        try:
            logits: Tensor = self.model(self.example)
        finally:
            for module in self.dense:
                del module.__dict__["forward"]
        return logits

    def channels(self, module: nn.Module) -> Tensor:
        """False for each output channel of a dense layer."""
        mean = self._calls[module][0].mean
        return torch.zeros(mean.numel(), dtype=torch.bool, device=mean.device)

    def check_time(self) -> None:
        """Raise `OutOfTime` if it is up."""
        if time.monotonic() > self._deadline:
            raise OutOfTime(f"not settled within {self._seconds:g} s")

    def noise(self, call: Call, draw: int) -> Tensor:
        """In the form of a layer's output, on the scale of what each channel does."""
        noise = torch.randn(call.shape, generator=self.generator).abs_()
        # one half of the images all up, the other all down: no activation flattens both
        noise[len(noise) // 2 :] *= -1
        return (noise.to(call.mean) * (_SPREADS[draw] * call.spread) + call.mean).to(call.dtype)


def constants(network: Network) -> tuple[Marks, dict[nn.Module, Tensor]]:
    """Inputs of dense layers that nothing alive reaches, and the value (channels,) they have.

    A value other than zero counts where the layer can take it into its bias.
    """
    low: dict[nn.Module, Tensor] = {}
    high: dict[nn.Module, Tensor] = {}
    silent = {module: _silent_rows(module) for module in network.dense}

    def emit(draw: int, module: nn.Module, call: Call) -> Tensor:
        noise = network.noise(call, draw)
        rows = _broadcast(silent[module], module, noise.ndim)
        bias = module._parameters.get("bias")
        if bias is None:
            return noise.masked_fill(rows, 0)
        return torch.where(rows, _broadcast(bias.detach(), module, noise.ndim), noise)

    def read(module: nn.Module, x: Tensor) -> None:
        flat = per_channel(x, module)
        least, most = flat.amin(1), flat.amax(1)
        low[module] = torch.minimum(least, low.get(module, least))
        high[module] = torch.maximum(most, high.get(module, most))

    with torch.no_grad():
        for draw in range(len(_SPREADS)):
            network.run(functools.partial(emit, draw), read)
    still: Marks = {}
    values = {}
    for module, least in low.items():
        most = high[module]
        size = torch.maximum(least.abs(), most.abs())
        same = (most - least <= _FLAT * size) & torch.isfinite(size)
        still[module] = same if _folds(module) else same & (size == 0)
        values[module] = torch.where(still[module], (least + most) / 2, 0.0)
    return still, values


def unheard(network: Network, ignored: Marks, *, logits: bool = True) -> Marks:
    """Outputs of dense layers without influence on any input that is not `ignored`.

    Args:
        logits: whether influence on the logits counts as well.
    """
    heard: Marks = {}
    for draw in range(len(_SPREADS)):
        for module, marks in _heard(network, ignored, logits, draw):
            heard[module] = marks | heard.get(module, marks)
    return {module: ~marks for module, marks in heard.items()}


def _heard(
    network: Network, ignored: Marks, logits: bool, draw: int
) -> Iterator[tuple[nn.Module, Tensor]]:
    said: list[tuple[nn.Module, Tensor]] = []
    total: list[Tensor] = []

    def count(x: Tensor, weight: Tensor | float = 1.0) -> None:
        noise = torch.randn(x.shape, generator=network.generator).to(x)
        total.append((x * (noise * weight)).sum())

    def emit(module: nn.Module, call: Call) -> Tensor:
        leaf = network.noise(call, draw).requires_grad_(True)
        said.append((module, leaf))
        return leaf * 1  # a network may write into it

    def read(module: nn.Module, x: Tensor) -> None:
        if x.requires_grad and not ignored[module].all():
            count(x, _broadcast(~ignored[module], module, x.ndim).to(x))

    with torch.enable_grad():
        output = network.run(emit, read)
        if logits:
            count(output)
        leaves = [leaf for _, leaf in said]
        gradients = torch.autograd.grad(torch.stack(total).sum(), leaves, allow_unused=True)
    for (module, leaf), gradient in zip(said, gradients, strict=True):
        # a gradient of NaN counts as one
        yield module, (per_channel(leaf * 0 if gradient is None else gradient, module) != 0).any(1)


def taint(network: Network, sources: Marks) -> Taint:
    """Where the marked outputs of dense layers arrive before another dense layer reads them."""
    found = Taint()

    def emit(module: nn.Module, call: Call) -> Tensor:
        said = call.quiet()
        marks = sources.get(module)
        if marks is None or not marks.any():
            return said
        return said.masked_fill(_broadcast(marks, module, said.ndim), float("nan"))

    def read(module: nn.Module, x: Tensor) -> None:
        marks = per_channel(x, module).sum(1).isnan()
        found.inputs[module] = marks | found.inputs.get(module, marks)

    def watch(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor) or not output.sum().isnan():
            return
        if not output.isnan().any():
            return  # inf - inf in the sum
        after = _confined(output)
        if after is None:
            found.astray = True
            return
        before = _confined(inputs[0]) if inputs and isinstance(inputs[0], Tensor) else None
        before = after if before is None else before
        old = found.along.get(module, (before, after))
        if old[0].shape != before.shape or old[1].shape != after.shape:
            found.astray = True  # called on tensors of different widths
            return
        found.along[module] = before | old[0], after | old[1]

    between = [m for m in network.model.modules() if not is_dense(m)]
    with hooked([m for m in between if m._parameters or m._buffers], watch), torch.no_grad():
        logits = network.run(emit, read)
    found.astray |= bool(logits.isnan().any())
    return found


def _confined(tensor: Tensor) -> Tensor | None:
    """Marks of NaN along the axis of channels, second or last, if it is not in all of them."""
    bad = tensor.isnan()
    best: Tensor | None = None
    for axis in {min(1, bad.ndim - 1), bad.ndim - 1}:
        marks = bad.movedim(axis, 0).flatten(1).any(1)
        some = bool(marks.any() and not marks.all())
        if some and (best is None or marks.float().mean() < best.float().mean()):
            best = marks
    return best


def _silent_rows(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (weight.detach().flatten(1) == 0).all(1)


def _folds(module: nn.Module) -> bool:
    """Whether a constant input is the same as a bias: no padding, no computed weight."""
    if type(module) is nn.Linear:
        return True
    if not isinstance(module, nn.modules.conv._ConvNd) or module.groups > 1:
        return False
    plain = type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return plain and isinstance(module.padding, tuple) and not any(module.padding)


@contextlib.contextmanager
def revived(model: nn.Module) -> Iterator[None]:
    """Zeros in whatever scales channels are ones inside: what would be heard if all spoke."""
    changed: list[tuple[nn.Parameter, Tensor]] = []
    with torch.no_grad():
        for module in model.modules():
            if not is_dense(module):
                for parameter in module._parameters.values():
                    if parameter is not None and (parameter == 0).any():
                        changed.append((parameter, parameter.clone()))
                        parameter[parameter == 0] = 1
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, old in changed:
                parameter.copy_(old)


def is_depthwise(module: nn.Module) -> bool:
    """A convolution in which each output channel reads one input channel."""
    groups = getattr(module, "groups", 1)
    return isinstance(module, nn.modules.conv._ConvNd) and groups == module.in_channels > 1


def is_dense(module: nn.Module) -> bool:
    """A linear layer or convolution that is not depthwise."""
    return isinstance(module, LAYERS) and not is_depthwise(module)


def channel_axis(module: nn.Module, dimensions: int) -> int:
    """Where a convolution or linear layer keeps its channels."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return dimensions - len(module.kernel_size) - 1
    return dimensions - 1


def per_channel(tensor: Tensor, module: nn.Module) -> Tensor:
    """(channels, everything else) of what a convolution or linear layer reads or emits."""
    return tensor.detach().movedim(channel_axis(module, tensor.ndim), 0).flatten(1)


def _broadcast(values: Tensor, module: nn.Module, dimensions: int) -> Tensor:
    """(channels,) in a form that broadcasts against what a layer reads or emits."""
    form = [1] * dimensions
    form[channel_axis(module, dimensions)] = -1
    return values.reshape(form)
