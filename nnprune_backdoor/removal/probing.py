"""Run a network with its dense layers disconnected, to observe how channels pass between them.

Each dense layer (a linear layer or convolution) reads its input, but emits what an analysis gives
it. What lies between two dense layers (norms, activations, sums, gates, reshapes, attention) runs
as usual, so that its effect on channels is observed on any architecture.
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

from ..core.trace import LAYERS, channel_axis
from ..utils.hooks import hooked

# noise is drawn at each of these scales, in units of what a channel emits on the example: large
# scales overcome any bias, small ones do not saturate a gate
_SCALES = (1.0, 8.0, 64.0, 4096.0)

_CONSTANT = 1e-6  # relative range up to which an input counts as constant


_RESERVE = 1 / 3  # of the time

Marks = dict[nn.Module, Tensor]  # layer -> bool (channels,)


class OutOfTime(Exception):
    """The time limit is over; the message is a reason for the report."""


@dataclass
class Reach:
    """Where some outputs of dense layers arrive before another dense layer reads them.

    Attributes:
        inputs: Inputs of dense layers.
        between: Inputs and outputs of the layers between dense layers.
        unconfined: Whether they reach all channels of a layer, or the logits.
    """

    inputs: Marks = field(default_factory=dict)
    between: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    unconfined: bool = False


@dataclass(frozen=True)
class Call:
    """One call of a dense layer on the example.

    Attributes:
        shape: Of the output.
        dtype: Of the output.
        mean: Of each output channel; it broadcasts against the output.
        scale: Standard deviation plus absolute mean of each output channel, in the same shape.
    """

    shape: torch.Size
    dtype: torch.dtype
    mean: Tensor
    scale: Tensor

    def at_mean(self) -> Tensor:
        """An output with every channel at its mean."""
        return self.mean.to(self.dtype).expand(self.shape).clone()


class ProbedNetwork:
    """A model whose dense layers can be disconnected for a forward pass.

    Args:
        model: a copy in eval mode that nothing else uses. A `forward` that was set on an instance
            of a dense layer is removed.
        example: two images (N, C, H, W) or more on its device.
        seconds: time limit of all passes together; after it, `OutOfTime` is raised. A third of it
            is kept until `use_reserve` is called.
    """

    def __init__(self, model: nn.Module, example: Tensor, seconds: float = 1e9) -> None:
        self.model = model
        self.example = example
        self.generator = torch.Generator().manual_seed(0)
        self._seconds = seconds
        self._deadline = time.monotonic() + (1 - _RESERVE) * seconds
        self._calls: dict[nn.Module, list[Call]] = {}
        self._record_calls()
        self.dense = list(self._calls)

    def _record_calls(self) -> None:
        def record(module: nn.Module, _: Any, output: Tensor) -> None:
            axis = channel_axis(module, output.ndim)
            others = [other for other in range(output.ndim) if other != axis]
            deviation, mean = torch.std_mean(output.float(), others, correction=0, keepdim=True)
            scale = deviation + mean.abs()
            scale = torch.where(scale > 0, scale, scale.new_ones(()))
            call = Call(output.shape, output.dtype, mean, scale)
            self._calls.setdefault(module, []).append(call)

        with hooked([m for m in self.model.modules() if is_dense(m)], record), torch.no_grad():
            self.model(self.example)

    def run(
        self,
        emit: Callable[[nn.Module, Call], Tensor],
        read: Callable[[nn.Module, Tensor], None],
    ) -> Tensor:
        """The logits of a pass with disconnected dense layers.

        Args:
            emit: gives the output of a dense layer in a call.
            read: receives the input of a dense layer.
        """
        self.check_time()
        calls = {module: iter(calls) for module, calls in self._calls.items()}

        def disconnected(module: nn.Module) -> Callable[..., Tensor]:
            def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
                read(module, x)
                return emit(module, next(calls[module]))

            return forward

        for module in self.dense:
            module.__dict__["forward"] = disconnected(module)
        try:
            logits: Tensor = self.model(self.example)
        finally:
            for module in self.dense:
                del module.__dict__["forward"]
        return logits

    def unmarked(self, module: nn.Module) -> Tensor:
        """False for each output channel of a dense layer."""
        mean = self._calls[module][0].mean
        return torch.zeros(mean.numel(), dtype=torch.bool, device=mean.device)

    def check_time(self) -> None:
        """Raise `OutOfTime` after the time limit."""
        if time.monotonic() > self._deadline:
            raise OutOfTime(f"not decided within {self._seconds:g} s")

    def use_reserve(self) -> None:
        """Allow the time that is kept for what comes after the passes."""
        self._deadline = time.monotonic() + _RESERVE * self._seconds

    def noise(self, call: Call, scale: float) -> Tensor:
        """Random output of a layer, around the mean and in units of the scale of each channel."""
        noise = torch.randn(call.shape, generator=self.generator).abs_()
        # positive in half of the images, negative in the others: no activation clips both
        noise[len(noise) // 2 :] *= -1
        return (noise.to(call.mean) * (scale * call.scale) + call.mean).to(call.dtype)


def constant_inputs(network: ProbedNetwork) -> tuple[Marks, dict[nn.Module, Tensor]]:
    """Inputs of dense layers that depend on silent channels only, and their values (channels,).

    An input with a value other than zero is only marked if the layer's bias can replace it.
    """
    low: dict[nn.Module, Tensor] = {}
    high: dict[nn.Module, Tensor] = {}
    silent = {module: _silent_rows(module) for module in network.dense}

    def emit(scale: float, module: nn.Module, call: Call) -> Tensor:
        noise = network.noise(call, scale)
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
        for scale in _SCALES:
            network.run(functools.partial(emit, scale), read)
    constant: Marks = {}
    values = {}
    for module, least in low.items():
        most = high[module]
        size = torch.maximum(least.abs(), most.abs())
        same = (most - least <= _CONSTANT * size) & torch.isfinite(size)
        constant[module] = same if _bias_can_replace(module) else same & (size == 0)
        values[module] = torch.where(constant[module], (least + most) / 2, 0.0)
    return constant, values


def without_influence(network: ProbedNetwork, ignored: Marks, *, logits: bool = True) -> Marks:
    """Outputs of dense layers that influence no input of a dense layer, except `ignored` inputs.

    Args:
        logits: whether outputs that influence the logits are excluded too.
    """
    influential: Marks = {}
    for scale in _SCALES:
        for module, marks in _influential(network, ignored, logits, scale):
            influential[module] = marks | influential.get(module, marks)
    return {module: ~marks for module, marks in influential.items()}


def _influential(
    network: ProbedNetwork, ignored: Marks, logits: bool, scale: float
) -> Iterator[tuple[nn.Module, Tensor]]:
    """Outputs of each call with a gradient of a random weighted sum of what is read."""
    emitted: list[tuple[nn.Module, Tensor]] = []
    terms: list[Tensor] = []

    def add(x: Tensor, weight: Tensor | float = 1.0) -> None:
        noise = torch.randn(x.shape, generator=network.generator).to(x)
        terms.append((x * (noise * weight)).sum())

    def emit(module: nn.Module, call: Call) -> Tensor:
        leaf = network.noise(call, scale).requires_grad_(True)
        emitted.append((module, leaf))
        return leaf * 1  # not a leaf, since a network may change it in place

    def read(module: nn.Module, x: Tensor) -> None:
        if x.requires_grad and not ignored[module].all():
            add(x, _broadcast(~ignored[module], module, x.ndim).to(x))

    with torch.enable_grad():
        output = network.run(emit, read)
        if logits:
            add(output)
        leaves = [leaf for _, leaf in emitted]
        gradients = torch.autograd.grad(torch.stack(terms).sum(), leaves, allow_unused=True)
    for (module, leaf), gradient in zip(emitted, gradients, strict=True):
        # a gradient of NaN counts as influence
        yield module, (per_channel(leaf * 0 if gradient is None else gradient, module) != 0).any(1)


def reach_of(network: ProbedNetwork, sources: Marks) -> Reach:
    """Where the marked outputs of dense layers arrive, followed as NaN."""
    reach = Reach()

    def emit(module: nn.Module, call: Call) -> Tensor:
        output = call.at_mean()
        marks = sources.get(module)
        if marks is None or not marks.any():
            return output
        return output.masked_fill(_broadcast(marks, module, output.ndim), float("nan"))

    def read(module: nn.Module, x: Tensor) -> None:
        marks = per_channel(x, module).sum(1).isnan()
        reach.inputs[module] = marks | reach.inputs.get(module, marks)

    def observe(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor) or not output.sum().isnan():
            return
        if not output.isnan().any():
            return  # the sum was inf - inf
        after = _nan_channels(output)
        if after is None:
            reach.unconfined = True
            return
        before = _nan_channels(inputs[0]) if inputs and isinstance(inputs[0], Tensor) else None
        before = after if before is None else before
        old = reach.between.get(module, (before, after))
        if old[0].shape != before.shape or old[1].shape != after.shape:
            reach.unconfined = True  # called on tensors of different widths
            return
        reach.between[module] = before | old[0], after | old[1]

    between = [m for m in network.model.modules() if not is_dense(m)]
    with hooked([m for m in between if m._parameters or m._buffers], observe), torch.no_grad():
        logits = network.run(emit, read)
    reach.unconfined |= bool(logits.isnan().any())
    return reach


def _nan_channels(tensor: Tensor) -> Tensor | None:
    """Channels with NaN, along the second or last axis; None if all or none have it on both.

    Of two possible axes, the one where fewer channels have NaN is taken.
    """
    is_nan = tensor.isnan()
    best: Tensor | None = None
    for axis in {min(1, is_nan.ndim - 1), is_nan.ndim - 1}:
        marks = is_nan.movedim(axis, 0).flatten(1).any(1)
        confined = bool(marks.any() and not marks.all())
        if confined and (best is None or marks.float().mean() < best.float().mean()):
            best = marks
    return best


def _silent_rows(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (weight.detach().flatten(1) == 0).all(1)


def _bias_can_replace(module: nn.Module) -> bool:
    """Whether a bias can replace constant inputs; padding and computed weights prevent it."""
    if type(module) is nn.Linear:
        return True
    if not isinstance(module, nn.modules.conv._ConvNd) or module.groups > 1:
        return False
    plain = type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return plain and isinstance(module.padding, tuple) and not any(module.padding)


@contextlib.contextmanager
def zeros_as_ones(model: nn.Module) -> Iterator[None]:
    """Zeros among the parameters between dense layers are ones inside the block."""
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


def per_channel(tensor: Tensor, module: nn.Module) -> Tensor:
    """What a convolution or linear layer reads or emits, as (channels, everything else)."""
    return tensor.detach().movedim(channel_axis(module, tensor.ndim), 0).flatten(1)


def _broadcast(values: Tensor, module: nn.Module, dimensions: int) -> Tensor:
    """Values (channels,), reshaped to broadcast against what a layer reads or emits."""
    shape = [1] * dimensions
    shape[channel_axis(module, dimensions)] = -1
    return values.reshape(shape)
