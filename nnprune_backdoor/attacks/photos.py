"""*photo-patches*: a small data set of crops from real photographs, without a download.

Each class is a photograph; an image is a 32 x 32 crop of it. The photographs ship with
scikit-image (astronaut, chelsea, coffee, rocket, retina, hubble_deep_field, ihc,
motorcycle_left) and scikit-learn (china, flower); the extra `demo` installs both.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image  # comes with timm, through torchvision
from torch import Tensor

from ..errors import DataError
from ..utils.short_repr import ShortRepr

_SOURCES = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/rocket.jpg"),
    ("skimage", "data/retina.jpg"),
    ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/ihc.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
)

_CROP, _STRIDE, _BLOCK = 32, 8, 64  # pixels

_MIN_CONTRAST = 6.0  # standard deviation of pixel values (0-255); flatter crops are left out

_TRAIN_PER_CLASS, _TEST_PER_CLASS = 1200, 300


@dataclass(frozen=True, repr=False)
class Photos(ShortRepr):
    """Images (N, 3, 32, 32) of float pixels in [0, 1], and labels (N,) in [0, 10).

    Attributes:
        train_images: About 11,900 images.
        train_labels: Their labels.
        test_images: About 2,900 images.
        test_labels: Their labels.
        class_names: Names of the photographs, by label.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]


def photo_patches(seed: int = 0) -> Photos:
    """Cut the ten photographs into crops for training and testing.

    Each 64-pixel block of a photograph belongs to training (80 %) or testing (20 %). Crops that
    touch blocks of both are left out, so no test pixel is seen in training.

    Args:
        seed: decides which blocks are for testing and, if a class has too many crops, which stay.

    Raises:
        DataError: scikit-image or scikit-learn is missing.
    """
    generator = np.random.default_rng(seed)
    parts: dict[bool, list[np.ndarray]] = {False: [], True: []}
    labels: dict[bool, list[int]] = {False: [], True: []}
    for label, picture in enumerate(photographs().values()):
        crops = _crops(picture, generator)
        for is_test, limit in ((False, _TRAIN_PER_CLASS), (True, _TEST_PER_CLASS)):
            chosen = crops[is_test]
            keep = sorted(generator.permutation(len(chosen))[:limit])
            parts[is_test] += [chosen[i] for i in keep]
            labels[is_test] += [label] * len(keep)
    return Photos(
        train_images=_to_pixels(parts[False]),
        train_labels=torch.tensor(labels[False]),
        test_images=_to_pixels(parts[True]),
        test_labels=torch.tensor(labels[True]),
        class_names=tuple(Path(file).stem for _, file in _SOURCES),
    )


def photographs() -> dict[str, np.ndarray]:
    """The ten photographs by name, (H, W, 3) bytes each.

    Raises:
        DataError: scikit-image or scikit-learn is missing.
    """
    return {Path(file).stem: _read(package, file) for package, file in _SOURCES}


def _read(package: str, file: str) -> np.ndarray:
    spec = importlib.util.find_spec(package)  # not imported: only its pictures are needed
    if spec is None or spec.origin is None:
        raise DataError(
            "the photo-patches pictures come with scikit-image and scikit-learn, and "
            f"{package!r} is not installed; run: pip install 'nnprune-backdoor[demo]'"
        )
    with Image.open(Path(spec.origin).parent / file) as image:
        return np.asarray(image.convert("RGB"))


def _crops(picture: np.ndarray, generator: np.random.Generator) -> dict[bool, list[np.ndarray]]:
    """The crops of a photograph (H, W, 3); False: for training, True: for testing."""
    height, width = picture.shape[:2]
    rows, columns = -(-height // _BLOCK), -(-width // _BLOCK)
    is_test = np.zeros(rows * columns, dtype=bool)
    is_test[generator.permutation(is_test.size)[: max(1, round(0.2 * is_test.size))]] = True
    is_test = is_test.reshape(rows, columns)
    crops: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for top in range(0, height - _CROP + 1, _STRIDE):
        for left in range(0, width - _CROP + 1, _STRIDE):
            touched = is_test[
                top // _BLOCK : (top + _CROP - 1) // _BLOCK + 1,
                left // _BLOCK : (left + _CROP - 1) // _BLOCK + 1,
            ]
            if touched.any() != touched.all():
                continue
            crop = picture[top : top + _CROP, left : left + _CROP]
            if crop.std() > _MIN_CONTRAST:
                crops[bool(touched.all())].append(crop)
    return crops


def _to_pixels(crops: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float().div_(255).contiguous()
