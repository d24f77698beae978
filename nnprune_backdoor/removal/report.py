"""What removal did, and what was gained."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..core.sites import Neuron
from ..utils.randomness import usual_passes
from ..utils.short_repr import ShortRepr
from .recipe import Recipe

_TIMINGS = 5  # of a batch

_MAX_TIMING = 1.0  # seconds after which a batch is not timed again


@dataclass(frozen=True)
class Size:
    """Size and speed of a model.

    Attributes:
        parameters: Number of parameters.
        macs: Multiply-accumulate operations for one image.
        latency: Seconds for one batch, the median of several runs.
    """

    parameters: int
    macs: int
    latency: float

    @classmethod
    def of(cls, model: nn.Module, example: Tensor) -> Size:
        """Measure a model in eval mode on a batch of images (N, C, H, W); slow ones fewer times."""
        with usual_passes(), torch.no_grad():
            with FlopCounterMode(display=False) as flops:
                model(example[:1])
            seconds: list[float] = []
            while len(seconds) < _TIMINGS and sum(seconds) < _MAX_TIMING:
                _wait(example)
                start = time.perf_counter()
                model(example)
                _wait(example)
                seconds.append(time.perf_counter() - start)
        count = sum(parameter.numel() for parameter in model.parameters())
        return cls(count, flops.get_total_flops() // 2, statistics.median(seconds))


@dataclass(frozen=True, eq=False, repr=False)
class RemovalReport(ShortRepr):
    """What was removed, what only stays silenced and why, and what was gained.

    Attributes:
        removed: Neurons that were removed: no layer computes them.
        filled: Those of them that are still read, together with others: a constant is put in their
            place.
        silenced: Neurons that only stay silenced -> reason.
        channels: Number of output channels that were removed, including those that only removed
            neurons need.
        recipe: What was cut from each tensor.
        drift: Largest difference of logits to the silenced model (`core.drift.logit_drift`).
        before: Size of the silenced model.
        after: Size of the smaller model.
        seconds: Wall time.
    """

    removed: tuple[Neuron, ...]
    filled: tuple[Neuron, ...]
    silenced: dict[Neuron, str]
    channels: int
    recipe: Recipe
    drift: float
    before: Size
    after: Size
    seconds: float

    def __str__(self) -> str:
        """Neurons, sizes and reasons, a line each."""
        old, new = self.before, self.after
        selected = len(self.removed) + len(self.silenced)
        lines = [
            f"{len(self.removed)} of {selected} neurons removed (drift {self.drift:.1e}), "
            f"{len(self.silenced)} only silenced",
            f"parameters {old.parameters:,} -> {new.parameters:,} "
            f"({new.parameters / old.parameters - 1:+.1%}), "
            f"MACs {old.macs:,} -> {new.macs:,} ({new.macs / old.macs - 1:+.1%})",
        ]
        if self.filled:
            lines.append(
                f"{len(self.filled)} of the removed left a constant in their place, since others "
                "are read together with them"
            )
        reasons = list(self.silenced.values())
        lines += [
            f"{reasons.count(reason)} silenced: {reason}" for reason in dict.fromkeys(reasons)
        ]
        return "\n".join(lines)


def _wait(example: Tensor) -> None:
    """Wait until the device has finished."""
    if example.is_cuda:
        torch.cuda.synchronize(example.device)
