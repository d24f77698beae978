"""Read clean images, and labels if there are any, from whatever loader the user has."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError

_IMAGE_KEYS = ("image", "images", "pixel_values", "x", "input", "inputs", "data")
_LABEL_KEYS = ("label", "labels", "target", "targets", "y")
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST = 100_000  # images, and batches, empty ones too: a loader that gives more may have no end
_WRAP = "wrap the data set in a loader: torch.utils.data.DataLoader(dataset, batch_size=64)"


def read_batches(loader: Iterable[Any]) -> tuple[Tensor, Tensor | None]:
    """All images (N, C, H, W) and labels (N,) of a loader, copied to the CPU.

    Args:
        loader: batches (images, labels, ...), (images,), images alone, or dictionaries or objects
            with one of the usual keys (image, pixel_values, label, target, ...). Images:
            (B, C, H, W).

    Raises:
        DataError: nothing in it, no end to it, shapes that differ, labels that are no integers.
            What the loader itself raises is let through, with a note that names the batch.
    """
    images: list[Tensor] = []
    labels: list[Tensor] = []
    count = size = 0
    room = _room()
    for number, batch in enumerate(_batches(loader)):
        x, y = _unpack(batch, number)
        if images and x.shape[1:] != images[0].shape[1:]:
            raise DataError(
                f"expected images of shape {tuple(images[0].shape[1:])} as in batch 0, got "
                f"{tuple(x.shape[1:])} in batch {number}; resize them to one size"
            )
        if (y is None) != (not labels) and images:
            raise DataError(f"batch {number}: some batches have labels and some have none")
        count, size = count + len(x), size + x.numel() * x.element_size()
        if count > _MOST or number >= _MOST or size > room:
            raise _too_much(count, size, number)
        images.append(own(x))
        if y is not None:
            labels.append(own(y).reshape(-1))
    if not images:
        used = " (an iterator gives its batches once)" if isinstance(loader, Iterator) else ""
        raise DataError(f"the clean loader is empty{used}; give at least a few images per class")
    with torch.inference_mode(False):
        return torch.cat(images), torch.cat(labels).long() if labels else None


def own(tensor: Tensor) -> Tensor:
    """A copy on the CPU that shares no memory with `tensor`, which a loader may fill again.

    It has no gradient, and can be differentiated also where `tensor` is of inference mode.
    """
    with torch.inference_mode(False):
        return tensor.detach().to("cpu", copy=True)


def check_images(images: object, where: str = "") -> None:
    """Raise DataError unless these are ordinary floating-point images (N, C, H, W).

    Args:
        where: the beginning of the message.
    """
    if not isinstance(images, Tensor):
        raise DataError(f"{where}expected images as a tensor, got {type(images).__name__}")
    check_ordinary(images, f"{where}the images")
    if images.ndim != 4:
        hint = f"; for single images, {_WRAP}" if images.ndim < 4 else ""
        raise DataError(
            f"{where}expected images (B, C, H, W), got shape {tuple(images.shape)}{hint}"
        )
    if images.dtype not in _FLOATING:
        raise DataError(
            f"{where}expected floating-point images, normalised as the model expects, got "
            f"{images.dtype}"
        )


def check_ordinary(tensor: Tensor, what: str) -> None:
    """Raise DataError for a tensor that is nested, sparse or without values."""
    if tensor.is_meta:
        raise DataError(
            f'{what} are on the device "meta" and have no values; make them on a real device'
        )
    if tensor.is_nested:
        raise DataError(
            f"{what} are a nested tensor; resize them to one size and stack them: torch.stack"
        )
    if tensor.layout is not torch.strided:
        raise DataError(f"{what} are of layout {tensor.layout}; make them dense: .to_dense()")


def check_integer_labels(labels: object, count: int) -> None:
    """Raise DataError unless these are `count` integers."""
    if not isinstance(labels, Tensor):
        raise DataError(
            f"expected {count} integer labels as a tensor, got {type(labels).__name__}; make one: "
            "torch.tensor(labels)"
        )
    check_ordinary(labels, "the labels")
    if labels.is_floating_point() or labels.is_complex() or labels.numel() != count:
        raise DataError(
            f"expected {count} integer labels, one an image, got shape {tuple(labels.shape)} of "
            f"{labels.dtype}; class indices are needed, not one-hot rows or probabilities. "
            "Multi-label classifiers are not purified: a trigger adds a label to others there, and "
            "here it is judged by the one label that an image gets"
        )


def _batches(loader: Any) -> Iterator[Any]:
    """The loader's batches; an exception of its own gets a note of where that was."""
    _refuse_other_things(loader)
    given = 0
    try:
        for batch in loader:
            yield batch
            given += 1
    except Exception as error:
        error.add_note(f"The clean loader raised this where batch {given} was to come.")
        raise


def _refuse_other_things(loader: Any) -> None:
    """Raise DataError for what is no iterable of batches; it says how to make one."""
    kind = type(loader).__name__
    if isinstance(loader, Tensor):
        kind, advice = "a tensor", "wrap it: CleanData(images, labels)"
    elif isinstance(loader, np.ndarray):
        kind = "an array"
        advice = "make tensors (torch.from_numpy) and wrap them: CleanData(images, labels)"
    elif isinstance(loader, (str, os.PathLike)):
        kind, advice = "a path", "read it: read_images(folder, preprocessing).data"
    elif isinstance(loader, Mapping):
        kind = "a dictionary"
        advice = "for one batch, give a list of it: [batch]; for several loaders, give one of them"
    elif type(loader) in (tuple, list) and _is_one_batch(loader):
        kind = "images and labels"
        advice = "wrap them: CleanData(images, labels), or a list of one batch, [(images, labels)]"
    elif isinstance(loader, type):
        kind, advice = f"the class {loader.__name__}", "make one and give that"
    elif not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        advice = "give a torch.utils.data.DataLoader, a list of batches, or CleanData"
        if hasattr(loader, "data"):
            advice = f"give its images: {kind}.data"
        elif callable(loader):
            advice = "give what it returns"
    else:
        return
    raise DataError(f"expected a loader (an iterable of batches), got {kind}; {advice}")


def _is_one_batch(pair: tuple[Any, ...] | list[Any]) -> bool:
    """Whether these are images and their labels, rather than batches of images."""
    if len(pair) < 2 or getattr(pair[0], "ndim", None) != 4:
        return False
    if isinstance(labels := pair[1], (Tensor, np.ndarray)):
        return labels.ndim <= 2
    if isinstance(labels, (tuple, list)):  # the next batch has images in it
        return all(np.ndim(label) == 0 for label in labels)
    return labels is None


def _room() -> int:
    """Bytes for images: a quarter of the memory, as joining them takes the same again."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on Windows
        memory = 16 << 30
    with contextlib.suppress(OSError, ValueError):  # no limit: no file, or "max" in it
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory // 4


def _too_much(count: int, size: int, number: int) -> DataError:
    found = f"{count:,} images ({size / 2**30:.1f} GiB) in {number + 1:,} batches"
    return DataError(
        f"the clean loader gave {found} and may have no end; a few hundred images are usual: give "
        "its first batches, itertools.islice(loader, 10), or a loader of some images, "
        "torch.utils.data.Subset"
    )


def _unpack(batch: Any, number: int) -> tuple[Tensor, Tensor | None]:
    """Images (B, C, H, W) and labels of a batch, checked."""
    where = f"batch {number}: "
    fields = _fields(batch)
    labels: Any = None
    if fields is not None:
        images = _image_field(fields, where)
    elif isinstance(batch, (tuple, list)) and batch:
        images, labels = batch[0], batch[1] if len(batch) > 1 else None
    else:
        images = batch
    if not isinstance(images, Tensor):
        raise DataError(
            f"{where}expected (images, labels), images, or a dictionary with one of "
            f"{_IMAGE_KEYS}, got {_described(batch, images)}"
        )
    check_images(images, where)
    if fields is not None:
        labels = _label_field(fields, len(images), where)
    if labels is None:
        return images, None
    labels = _as_labels(labels, len(images), where)
    check_integer_labels(labels, len(images))
    return images, labels


def _fields(batch: Any) -> Mapping[str, Any] | None:
    """What a batch holds by name: a dictionary, an object, or a tuple whose names say enough."""
    if isinstance(batch, Mapping):
        return batch
    if isinstance(batch, (Tensor, np.ndarray)):
        return None
    images, labels = (
        {key: getattr(batch, key) for key in keys if hasattr(batch, key)}
        for keys in (_IMAGE_KEYS, _LABEL_KEYS)
    )
    needed = 2 if isinstance(batch, tuple) else 1  # the place says it where one name is missing
    return images | labels if images and len(images | labels) >= needed else None


def _image_field(fields: Mapping[str, Any], where: str) -> Any:
    """The images; of two that could be them neither is taken, one may not be normalised."""
    given = {key: fields[key] for key in _IMAGE_KEYS if fields.get(key) is not None}
    fitting: dict[str, Tensor] = {}
    for key, value in given.items():
        with contextlib.suppress(DataError):
            check_images(value)
            fitting[key] = value
    _check_alike(fitting, where, "images")
    return next(iter((fitting or given).values()), None)


def _label_field(fields: Mapping[str, Any], count: int, where: str) -> Any:
    """The labels; of two that could be them and differ neither is taken."""
    given = {key: fields[key] for key in _LABEL_KEYS if fields.get(key) is not None}
    fitting: dict[str, Tensor] = {}
    for key, value in given.items():
        with contextlib.suppress(DataError):
            labels = _as_labels(value, count, where)
            check_integer_labels(labels, count)
            fitting[key] = labels.reshape(-1).long()
    _check_alike(fitting, where, "labels")
    return next(iter((fitting or given).values()), None)


def _check_alike(fitting: dict[str, Tensor], where: str, what: str) -> None:
    if len(fitting) < 2:
        return
    first, *others = (own(value) for value in fitting.values())
    if any(other.dtype != first.dtype or not torch.equal(first, other) for other in others):
        raise DataError(
            f"{where}{' and '.join(map(repr, fitting))} could each be the {what}, and differ; "
            "leave out all but those that the model expects, or give (images, labels)"
        )


def _as_labels(labels: Any, count: int, where: str) -> Tensor:
    if isinstance(labels, Tensor):
        return labels
    try:
        return torch.as_tensor(labels)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"{where}expected {count} integer labels, one an image ({error}); "
            "class indices are needed, not names"
        ) from error


def _described(batch: Any, images: Any) -> str:
    """A batch without images, and what may help, for a message."""
    kind = type(batch).__name__
    if isinstance(batch, Mapping) and images is None:
        return f"{kind} with keys {sorted(map(str, batch))}"
    found = kind if images is batch else f"{kind} with {type(images).__name__} in place of images"
    one = images[0] if isinstance(images, (tuple, list)) and images else images
    advice = ""
    if isinstance(one, Tensor):
        advice = "; stack them: torch.stack(images)"
    elif isinstance(one, np.ndarray):
        advice = "; make a tensor of the array: torch.from_numpy(images)"
        if one.ndim == 3:
            advice = f"; {_WRAP}"
    elif isinstance(one, (str, os.PathLike)):
        advice = "; read the files: read_images(folder, preprocessing).data"
    elif hasattr(one, "convert") and hasattr(one, "size"):  # Pillow's
        advice = f"; have the data set make normalised tensors, and {_WRAP}"
    return f"{found}{advice}"
