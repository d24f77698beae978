"""How passes are run: precision, memory layout, images at a time.

None of it says what is computed. The effect on scores is rounding, except where `Compute` says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import DataError, ScoringError
from ..utils.tensors import placement
from .data import CleanData
from .drift import allowed_drift, logit_drift

Precision = Literal["float32", "bfloat16"]

Passes = Callable[[CleanData], tuple[Sequence[Tensor], Tensor | None]]


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How a criterion's passes are run; the defaults run them as the model is.

    When memory runs out (`torch.OutOfMemoryError`) the batch is cut in halves and the gradients of
    the parts are averaged, so that the step is that of the whole batch; parts stay that small
    until the criterion is done. Under BatchNorm's batch statistics each part is normalised by
    itself, and CNP then finds its noise for each part; both change scores by more than rounding.
    One image has no batch statistics where a layer has one value of it for each channel: one that
    is left over joins a part of two.

    Attributes:
        precision: "bfloat16" runs convolutions and matrix products under autocast.
        channels_last: Memory layout of convolutions; left alone where it does not work.
        micro_batch: Maximum number of images in a pass with gradients; None for no limit. Three
            where two would leave one over.
    """

    precision: Precision = "float32"
    channels_last: bool = False
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise DataError(f"expected precision 'float32' or 'bfloat16', got {self.precision!r}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise DataError(f"expected micro_batch of at least 1, got {self.micro_batch}")

    def lay_out_(self, model: nn.Module, images: Tensor) -> None:
        """Put the model's convolutions into this memory layout, if it then gives these logits.

        Args:
            images: a few (N, C, H, W), to see whether the model runs.
        """
        if not self.channels_last:
            return
        images = images.to(**placement(model))
        with torch.no_grad():
            before = model(images)
            model.to(memory_format=torch.channels_last)
            try:
                after = model(images)
                same = logit_drift(before, after) <= 10 * allowed_drift(before.dtype)
            except RuntimeError:  # a view of what is no longer contiguous
                same = False
        if not same:
            model.to(memory_format=torch.contiguous_format)

    @contextlib.contextmanager
    def applied(self, device: torch.device) -> Iterator[None]:
        """Passes inside the block run like this."""
        token = _RUN.set(_Run(self.micro_batch))
        cast: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self.precision == "bfloat16":
            # no cache: weights that are unlearned change inside the block
            cast = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
        try:
            with cast:
                yield
        finally:
            _RUN.reset(token)


@dataclass
class _Run:
    limit: int | None = None  # images a pass
    inside: bool = False  # a part of a batch is being worked on


_RUN: ContextVar[_Run | None] = ContextVar("compute", default=None)


def mean_gradients(batch: CleanData, passes: Passes) -> tuple[list[Tensor], Tensor | None]:
    """Gradients of a mean loss over a batch, in as many parts as memory needs.

    Args:
        passes: for some images, the gradients of their mean loss and, if wanted, a row for each
            image (N, ...), detached. It runs again, on fewer images, if memory runs out in it.

    Returns:
        the gradients for the whole batch and the rows of all its images.
    """
    run = _RUN.get() or _Run()
    if run.inside:
        gradients, rows = passes(batch)
        return list(gradients), rows
    run.inside = True
    try:
        return _in_parts(run, batch, passes)
    finally:
        run.inside = False


def _in_parts(run: _Run, batch: CleanData, passes: Passes) -> tuple[list[Tensor], Tensor | None]:
    """`passes` over a batch whose parts are as small as they must be."""
    total: list[Tensor] = []
    rows: list[Tensor] = []
    todo = list(_parts(run, batch))
    while todo:
        part = todo[0]
        found = _unless_out_of_memory(run, part, passes)
        if found is None:
            # three become one and one and one: of two and one, the one would join again
            run.limit = 1 if len(part) == 3 else -(-len(part) // 2)
            todo = [piece for each in todo for piece in _parts(run, each)]
            continue
        gradients, row = found
        if len(part) < len(batch):
            gradients = [gradient * (len(part) / len(batch)) for gradient in gradients]
        total = [a + b for a, b in zip(total, gradients, strict=True)] if total else [*gradients]
        if row is not None:
            rows.append(row)
        del todo[0]
    return total, torch.cat(rows) if rows else None


def _parts(run: _Run, batch: CleanData) -> Iterator[CleanData]:
    """About equal parts within the limit."""
    size = len(batch)
    if run.limit is None or size <= run.limit:
        yield batch
        return
    count = -(-size // run.limit)
    if run.limit > 1:
        count = min(count, size // 2)
    for indices in torch.arange(size).tensor_split(count):
        yield batch.take(indices)


def _unless_out_of_memory(
    run: _Run, part: CleanData, passes: Passes
) -> tuple[Sequence[Tensor], Tensor | None] | None:
    """None: memory ran out, and by now what filled it is gone."""
    try:
        return passes(part)
    except ValueError as error:
        if len(part) > 1 or "more than 1 value per channel" not in str(error):  # BatchNorm's words
            raise
        raise ScoringError(
            "a pass of one image (micro_batch=1, or no memory for two) has no batch statistics; "
            "give micro_batch=2 or more, or the criterion a setting with the statistics 'running'"
        ) from error
    except torch.OutOfMemoryError:
        if len(part) == 1:
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
