"""Several processes share each batch (`torchrun`): gradients are averaged over all of them.

Every process holds the same model and the same clean data and draws the same random numbers; it
runs its share of the images. BatchNorm in batch-statistics mode takes the mean and variance of the
whole batch, so that the result is that of one process up to rounding. Rounding shows where noise
follows the sign of a gradient that is nothing else (docs/speed.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .data import wide
from .errors import DataError


class Processes:
    """The default group of `torch.distributed`.

    Raises:
        DataError: it was not initialised.
    """

    def __init__(self) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise DataError(
                "processes=True needs torch.distributed; start with torchrun and call "
                "torch.distributed.init_process_group first"
            )
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def share(self, total: int) -> Tensor:
        """Indices of this process's images of a batch; all of it where there are too few."""
        everything = torch.arange(total)
        return everything if total < self.count else everything.tensor_split(self.count)[self.rank]

    def shares(self, total: int) -> tuple[int, int]:
        """Images of the process that has fewest of a batch, and of that which has most."""
        if total < self.count:
            return total, total
        return total // self.count, -(-total // self.count)

    def mean(self, tensors: Sequence[Tensor], images: int) -> list[Tensor]:
        """Means over all processes, each weighted with its number of images."""
        weights = torch.tensor(float(images), device=tensors[0].device if tensors else "cpu")
        dist.all_reduce(weights)
        share = images / weights.item()
        found = [tensor * share for tensor in tensors]
        for tensor in found:
            dist.all_reduce(tensor)
        return found

    def together(self, rows: Tensor, mine: Tensor, total: int) -> Tensor:
        """Rows (total, ...) of the whole batch from those of each process's images."""
        if total < self.count:
            return rows  # each has them all
        whole = rows.new_zeros(total, *rows.shape[1:])
        whole[mine.to(rows.device)] = rows
        dist.all_reduce(whole)
        return whole

    @contextmanager
    def common_statistics(self) -> Iterator[None]:
        """BatchNorm in batch-statistics mode normalises by the images of all processes."""
        with _CommonStatistics():
            yield


class _CommonStatistics(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(  # noqa: PLR0917 - the signature of F.batch_norm
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm`, with mean and variance over all processes when training."""
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    axes = [axis for axis in range(x.ndim) if axis != 1]
    shape = (1, -1, *(1,) * (x.ndim - 2))
    values = wide(x)
    number = torch.tensor(float(x.numel() // x.shape[1]), device=x.device)
    dist.all_reduce(number)
    mean = _Sum.apply(values.sum(axes), len(x)) / number
    centred = values - mean.reshape(shape)
    variance = _Sum.apply(centred.square().sum(axes), len(x)) / number
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            unbiased = variance * number / (number - 1).clamp_min(1)
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_(unbiased.to(running_var), momentum)
    found: Tensor = centred * (variance + eps).rsqrt().reshape(shape)
    if weight is not None:
        found = found * weight.reshape(shape)
    if bias is not None:
        found = found + bias.reshape(shape)
    return found.to(x.dtype)


class _Sum(torch.autograd.Function):
    """Sum over processes.

    What each passes back comes from the mean loss of its own images and will be weighted with
    their number, so that is how the others' are weighted here against one's own.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, images: int) -> Tensor:
        ctx.images = images
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous() * ctx.images
        dist.all_reduce(total)
        return total / ctx.images, None
