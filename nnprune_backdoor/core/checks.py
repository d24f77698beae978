"""Checks of a model against clean images, before anything is computed with them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..errors import DataError, UnsupportedModelError
from ..utils.tensors import placement
from .data import CleanData
from .drift import logit_drift
from .outputs import ONE_LABEL, run_once

_ENOUGH = 100  # labelled images that do, however many classes there are
_RENAMED = 0.3  # share of the images, and 1 / sqrt(images) more: guessing gains up to .34 of 50
_ALONE = 0.05  # of the logits' scale: more than any precision's rounding
_BESIDE = 4  # images in one pass, of which one is given alone as well


def validate_model(model: nn.Module, clean: CleanData, logits: object = None) -> int:
    """Check a model with clean images; return its number of classes.

    Args:
        model: in eval mode.
        logits: what it gave for two of the images; None: it is run on them.

    Raises:
        UnsupportedModelError: NaN or inf in its weights or logits; output not (N, classes).
        DataError: it does not accept these images; labels out of range, too few, all alike.
    """
    _check_finite_weights(model)
    classes = count_classes(model, clean.images) if logits is None else _classes_in(logits)
    if clean.labels is not None:
        _check_labels_fit(clean, classes)
    return classes


def count_classes(model: nn.Module, images: Tensor) -> int:
    """The number of classes, from a run on two of the images (N, C, H, W).

    Raises:
        UnsupportedModelError: NaN or inf in its logits; output not (N, classes).
        DataError: it does not accept these images.
    """
    return _classes_in(run_once(model, images[:2].to(**placement(model)).clone()))


def _classes_in(logits: object) -> int:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UnsupportedModelError(
            f"expected a classifier with output (N, classes), got {found}; have its forward return "
            f"the logits alone. {ONE_LABEL}"
        )
    if not torch.isfinite(logits).all():
        raise UnsupportedModelError("the model's logits hold NaN or inf on clean images")
    return int(logits.shape[1])


def _check_finite_weights(model: nn.Module) -> None:
    state = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    # a buffer may hold -inf, as the mask of causal attention does
    finite = [
        torch.isfinite(tensor).all() if name in weights else ~torch.isnan(tensor).any()
        for name, tensor in state.items()
    ]
    device = placement(model)["device"]
    # one wait for a GPU, not one a tensor
    sound = torch.stack([each.to(device) for each in finite]).tolist() if finite else []
    for name, good in zip(state, sound, strict=True):
        if not good:
            raise UnsupportedModelError(
                f"the model's {name!r} holds NaN or inf; it cannot be scored. Check how the "
                "checkpoint was loaded"
            )


def check_repeatable(model: nn.Module, images: Tensor) -> None:
    """The model, in eval mode, must give an image the same logits alone and beside another one.

    Args:
        images: (N, C, H, W); up to four are used.

    Raises:
        UnsupportedModelError: it does not, so that nothing measured on it would mean anything.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise UnsupportedModelError(
                f"{name!r} is a BatchNorm without running statistics, so that what the model "
                "says of an image depends on the images beside it; have it keep statistics "
                "(track_running_stats=True) and estimate them on training images first"
            )
    with torch.no_grad():
        images = images[:_BESIDE].to(**placement(model))
        beside, alone = model(images.clone()), model(images[:1].clone())
    gap = logit_drift(beside, torch.cat([alone, beside[1:]]))
    if not gap <= _ALONE:
        raise UnsupportedModelError(
            "what the model says of an image changes with chance, or with the images beside it "
            f"(logits by {gap:.0%}); make its forward pass repeatable in eval mode"
        )


def check_label_order(labels: Tensor, predicted: Tensor) -> None:
    """The labels must be in the order of the model's classes, not in another one.

    Each image is given the label that most *others* have of which the model says the same. If
    that is right far more often than what the model says, the classes only have other numbers,
    and whatever is done with these labels teaches the model wrong ones.

    Args:
        labels: of the images, (N,).
        predicted: what the model says of each image, (N,).

    Raises:
        DataError: they are in another order.
    """
    wrong = predicted != labels
    rows, row = predicted.unique(return_inverse=True)
    columns, column = labels.unique(return_inverse=True)
    table = torch.zeros(len(rows), len(columns) + 1)  # one more: a second best there always is
    table.index_put_((row, column), torch.ones(len(labels)), accumulate=True)
    (most, second), best = table.topk(2).values.T, table.argmax(1)
    # an image does not vouch for itself
    vouched = (best[row] == column) & (most[row] - 1 > second[row])
    right, renamed = 1 - wrong.float().mean(), vouched.float().mean()
    if renamed - right <= _RENAMED + len(labels) ** -0.5:
        return
    said = predicted[wrong].mode().values
    raise DataError(
        f"the model gets {right:.0%} of the clean images right, but would get {renamed:.0%} if "
        f"its classes had other numbers: what it calls {said} is mostly labelled "
        f"{labels[predicted == said].mode().values}. The labels are not in the order of the "
        "model's classes; give them in the order that it was trained with"
    )


def check_scoring_part(parts: Sequence[CleanData], classes: int) -> None:
    """The first part must do for scoring; the message counts what was given before the split.

    Args:
        parts: for scoring, selecting and measuring, of clean images that `validate_model` passed.

    Raises:
        DataError: there are labels, and too few images or a single label in that part.
    """
    labels = parts[0].labels
    if labels is None:
        return
    sizes, split = [len(part) for part in parts], _split_into(parts)
    needed = min(classes, _ENOUGH)
    if sizes[0] < needed:
        total = math.ceil(needed * sum(sizes) / sizes[0])
        raise DataError(
            f"{sum(sizes)} clean images are too few: {split}, and scoring needs at least {needed} "
            f"for {classes} classes; give at least {total}, a few hundred are usual"
        )
    if len(labels.unique()) == 1:
        raise DataError(
            f"the {sum(sizes)} clean images are too much of one class: {split}, and those to score "
            f"all have label {int(labels[0])}; give more images of other classes"
        )


@contextlib.contextmanager
def counting_what_was_given(parts: Sequence[CleanData]) -> Iterator[None]:
    """A DataError inside, which may count the images of one part, gets the sizes of all.

    Args:
        parts: for scoring, selecting and measuring.
    """
    try:
        yield
    except DataError as error:
        given = sum(map(len, parts))
        raise DataError(f"{error} (of {given} clean images {_split_into(parts)})") from error


def _split_into(parts: Sequence[CleanData]) -> str:
    return "the split leaves {} to score, {} to select and {} to measure".format(*map(len, parts))


def _check_labels_fit(clean: CleanData, classes: int) -> None:
    labels = clean.targets
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"expected labels in [0, {classes}), got {low if low < 0 else high}; "
            "is the loader's dataset the one that the model was trained on?"
        )
    if low == high:
        raise DataError(
            f"all clean images have label {low}; give images of several classes, or the "
            "score would only say what that one class needs"
        )
    if len(clean) < min(classes, _ENOUGH):
        raise DataError(
            f"expected at least one clean image per class ({classes}), or {_ENOUGH} where "
            f"there are more classes, got {len(clean)}; a few hundred in all is usual"
        )
