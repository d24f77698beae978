"""Clean images from a data set that torchvision knows by name, already on disk.

Nothing is downloaded. torchvision's readers have none of the limits of `images`, so `root` must be
one's own; what they unpickle (CIFAR) they first hold against MD5 sums of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core.data import CleanData
from ..errors import DataError, unknown_name
from ..utils.progress import progress_bar
from .images import FolderImages
from .preprocessing import Preprocessing

_TRAIN_FLAG = {"train": {"train": True}, "test": {"train": False}}

_SPLIT = {"train": {"split": "train"}, "test": {"split": "test"}}

# name -> class in torchvision.datasets, and its arguments for a split
_KNOWN: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "cifar10": ("CIFAR10", _TRAIN_FLAG),
    "cifar100": ("CIFAR100", _TRAIN_FLAG),
    "fashion_mnist": ("FashionMNIST", _TRAIN_FLAG),
    "gtsrb": ("GTSRB", _SPLIT),
    "mnist": ("MNIST", _TRAIN_FLAG),
    "stl10": ("STL10", _SPLIT),
    "svhn": ("SVHN", _SPLIT),
}


def list_datasets() -> list[str]:
    """Names that `read_dataset` takes."""
    return sorted(_KNOWN)


def read_dataset(
    name: str,
    root: str | os.PathLike[str],
    preprocessing: Preprocessing,
    *,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> FolderImages:
    """Labelled images of a data set, in its own order; labels are its own.

    Args:
        root: folder where torchvision keeps it, laid out as torchvision does.
        split: "test" or "train"; images that the model was trained on say less.
        limit: most images to take, drawn at random over the whole split.

    Raises:
        UnknownNameError: no such data set here.
        DataError: it is not in `root`, or damaged; no such split; a package that it needs is
            missing.
    """
    if name not in _KNOWN:
        raise unknown_name("data set", name, _KNOWN)
    kind, splits = _KNOWN[name]
    if split not in splits:
        raise DataError(f"expected the split 'test' or 'train', got {split!r}")
    if limit is not None and limit < 1:
        raise DataError(f"expected at least one image, got a limit of {limit}")
    images = _opened(name, kind, Path(root), splits[split])
    chosen = np.random.default_rng(seed).permutation(len(images))[:limit]
    transform, mode = preprocessing.transform(), "L" if preprocessing.channels == 1 else "RGB"
    pixels, labels, files = [], [], []
    with progress_bar(len(chosen), "reading images", progress) as bar:
        for index in sorted(chosen.tolist()):
            try:
                image, label = images[index]
                pixels.append(transform(image.convert(mode)))
            except (OSError, ValueError, IndexError, TypeError) as error:
                raise DataError(f"{root}: {name!r}, image {index}: damaged ({error})") from error
            labels.append(int(label))
            files.append(f"{split}/{index}")
            bar.update()
    data = CleanData(torch.stack(pixels), torch.tensor(labels))
    return FolderImages(data, tuple(files), _classes(images, name), len(images), ())


def _opened(name: str, kind: str, root: Path, arguments: dict[str, Any]) -> Any:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the one that holds {name!r}")
    from torchvision import datasets

    make: Callable[..., Any] = getattr(datasets, kind)
    try:
        found = make(os.fspath(root), **arguments, download=False)
    except Exception as error:  # whatever its reader makes of these files
        raise DataError(
            f"{root}: no {name!r} as torchvision lays it out, or it is damaged "
            f"({str(error).splitlines()[0][:150] if str(error) else type(error).__name__}); get it "
            f"where there is a network by torchvision.datasets.{kind}, or give a folder of images"
        ) from error
    if len(found) == 0:
        raise DataError(f"{root}: {name!r} has no images in this split")
    return found


def _classes(images: Any, name: str) -> tuple[str, ...]:
    """Names by label where the data set has them, else the numbers."""
    names = getattr(images, "classes", None)
    if names is not None:
        return tuple(map(str, names))
    count = {"gtsrb": 43, "svhn": 10}[name]
    return tuple(map(str, range(count)))
