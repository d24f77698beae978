"""Read clean images from one of torchvision's data sets that is already on disk.

Nothing is downloaded. torchvision's readers do not limit sizes as `read_images` does, so the files
must come from a source you trust. Pickles (CIFAR) are checked by torchvision against known MD5 sums
before they are loaded.
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

_LOOKED_AT = 20  # images whose size is looked at

# name -> class in torchvision.datasets, and split -> arguments of that class
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
    """Names of the data sets that `read_dataset` reads, sorted."""
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
    """Read and preprocess labelled images of a data set, in the order of the data set.

    Args:
        name: one of `list_datasets()`.
        root: folder in which torchvision keeps the data set.
        preprocessing: how images are prepared for the model.
        split: "test" or "train". Test images are better, since the model was not trained on them.
        limit: most images to read; they are drawn at random from the split.
        seed: of the draw.
        progress: show a progress bar on a terminal.

    Raises:
        UnknownNameError: no data set has that name.
        DataError: the data set is not in `root`, is damaged or has no such split, or a package that
            its reader needs is missing.
    """
    if name not in _KNOWN:
        raise unknown_name("data set", name, _KNOWN)
    kind, splits = _KNOWN[name]
    if split not in splits:
        raise DataError(f"expected the split 'test' or 'train', got {split!r}")
    if limit is not None and limit < 1:
        raise DataError(f"expected a limit of at least one image, got {limit}")
    images = _open(name, kind, Path(root), splits[split])
    chosen = np.random.default_rng(seed).permutation(len(images))[:limit]
    transform, mode = preprocessing.transform(), "L" if preprocessing.channels == 1 else "RGB"
    pixels, labels, files = [], [], []
    with progress_bar(len(chosen), "reading images", progress) as bar:
        for index in sorted(chosen.tolist()):
            try:
                image, label = images[index]
                pixels.append(transform(image.convert(mode)))
            except (OSError, ValueError, IndexError, TypeError) as error:
                raise DataError(
                    f"{root}: {name!r}, image {index}: damaged ({error}); download it again"
                ) from error
            labels.append(int(label))
            files.append(f"{split}/{index}")
            bar.update()
    data = CleanData(torch.stack(pixels), torch.tensor(labels))
    return FolderImages(data, tuple(files), _classes(images, name), len(images), ())


def size_of_dataset(
    name: str, root: str | os.PathLike[str], split: str = "test"
) -> tuple[int, int] | None:
    """Height and width of the images of a data set, if its first ones have the same; else None.

    Nothing is raised for what `read_dataset` refuses.
    """
    kind, splits = _KNOWN.get(name, ("", {}))
    if split not in splits:
        return None
    try:
        images = _open(name, kind, Path(root), splits[split])
        sizes = {images[i][0].size[::-1] for i in range(min(_LOOKED_AT, len(images)))}
    except (DataError, OSError, ValueError, IndexError, TypeError):
        return None
    return sizes.pop() if len(sizes) == 1 else None


def _open(name: str, kind: str, root: Path, arguments: dict[str, Any]) -> Any:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the one that holds {name!r}")
    from torchvision import datasets

    make: Callable[..., Any] = getattr(datasets, kind)
    try:
        images = make(os.fspath(root), **arguments, download=False)
    except Exception as error:  # torchvision's readers raise many kinds
        raise DataError(
            f"{root}: no {name!r} as torchvision lays it out, or it is damaged "
            f"({str(error).splitlines()[0][:150] if str(error) else type(error).__name__}); "
            f"download it with torchvision.datasets.{kind}, or give a folder of images"
        ) from error
    if len(images) == 0:
        raise DataError(f"{root}: {name!r} has no images in this split; download it again")
    return images


def _classes(images: Any, name: str) -> tuple[str, ...]:
    """Names of the classes by label; numbers if the data set has no names."""
    names = getattr(images, "classes", None)
    if names is not None:
        return tuple(map(str, names))
    count = {"gtsrb": 43, "svhn": 10}[name]
    return tuple(map(str, range(count)))
