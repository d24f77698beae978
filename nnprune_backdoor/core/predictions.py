"""Run a classifier on images in batches, and check labels given by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..utils.progress import progress_bar
from ..utils.randomness import as_integer
from ..utils.tensors import at_least_float32, placement
from .copies import eval_mode
from .outputs import gives_logits, logits_alone, wants_name

_LARGEST_BATCH = 256  # images a forward pass


@torch.no_grad()
def predict_logits(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    *,
    run: Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
) -> Tensor:
    """Logits (N, classes) on the CPU, of images (N, C, H, W), in the modes that the model is in.

    Args:
        images: cut into batches by `images_per_pass`, or given in batches.
        run: what is run in place of the model, a masked view of it for example.
    """
    place, given = placement(model), run
    if isinstance(images, Tensor):
        images = images.split(max(16, images_per_pass(images, model)))
    batches = list(images)
    if run is None:
        run = logits_alone(model, batches[0]) if wants_name(model) else model
    found = []
    with progress_bar(sum(map(len, batches)), "predicting", progress) as bar:
        for batch in batches:
            copied = batch.to(**place, copy=True)  # a model may write into what it is given
            logits = run(copied)
            if not gives_logits(logits) and given is None:  # a model may give more than them
                run = logits_alone(model, batch)
                logits = run(batch.to(**place, copy=True))
            found.append(at_least_float32(logits).cpu())
            bar.update(len(batch))
    return torch.cat(found)


def predict_labels(model: nn.Module, images: Tensor | Iterable[Tensor], **how: Any) -> Tensor:
    """Labels (N,) that the model gives images (N, C, H, W), int64; see `predict_logits`."""
    if isinstance(images, Tensor) and not len(images):
        return torch.empty(0, dtype=torch.int64)  # some networks cannot reshape nothing
    return predict_logits(model, images, **how).argmax(1)


def predict(model: nn.Module, images: Tensor, *, progress: bool = False) -> Tensor:
    """Labels (N,) that the model gives images (N, C, H, W) in eval mode; its modes come back."""
    with eval_mode(model):
        return predict_labels(model, images, progress=progress)


def images_per_pass(images: Tensor, model: nn.Module) -> int:
    """Images (N, C, H, W) a forward pass, fewer of larger ones, so that memory stays in bounds.

    An accelerator is idle with so few as a processor is content with: there, 16 times as many.
    """
    height, width = images.shape[2:]
    pixels = _LARGEST_BATCH * 1024 * (1 if placement(model)["device"].type == "cpu" else 16)
    return max(1, min(_LARGEST_BATCH, pixels // (height * width)))


def check_labels(labels: Iterable[SupportsIndex], classes: int) -> list[int]:
    """The labels as plain integers; DataError if none, one not in [0, classes) or one twice."""
    try:
        some = itertools.islice(labels, classes + 1)  # more cannot differ, and might have no end
        found = [as_integer(label, "a label") for label in some]
    except TypeError:  # also a tensor without an axis
        raise DataError(f"expected a list of labels, got {labels!r}") from None
    good = all(0 <= label < classes for label in found)
    if not found or not good or len(set(found)) < len(found):
        raise DataError(f"expected different labels in [0, {classes}), got {found}")
    return found
