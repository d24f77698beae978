"""*photo-patches*: a small set of real photographs that comes with two wheels and needs no network.

A class is a photograph; an image is a 32 x 32 crop of it. The photographs ship with
scikit-image (astronaut, chelsea, coffee, rocket, retina, hubble_deep_field, ihc,
motorcycle_left) and scikit-learn (china, flower); install the extra `demo` to have both.
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

_CROP, _STRIDE, _BLOCK = 32, 8, 64

_FLAT = 6.0  # crops whose pixel values (0-255) have a smaller standard deviation show nothing

_TRAIN_PER_CLASS, _TEST_PER_CLASS = 1200, 300


@dataclass(frozen=True)
class Photos:
    """Images (N, 3, 32, 32) with float pixels in [0, 1] and labels (N,) in [0, 10)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]


def photo_patches(seed: int = 0) -> Photos:
    """Cut the ten photographs into crops; about 11,900 for training and 2,900 for testing.

    Each 64-pixel block of a photograph goes wholly to training (80 %) or to testing (20 %), and
    a crop belongs to a part only if it lies inside blocks of that part: no test pixel is ever
    seen in training. `seed` decides which blocks and, where there are too many, which crops.

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
    spec = importlib.util.find_spec(package)  # found, not imported: only its pictures are needed
    if spec is None or spec.origin is None:
        raise DataError(
            "the photo-patches pictures come with scikit-image and scikit-learn, and "
            f"{package!r} is not installed; run: pip install 'nnprune-backdoor[demo]'"
        )
    with Image.open(Path(spec.origin).parent / file) as image:
        return np.asarray(image.convert("RGB"))


def _crops(picture: np.ndarray, generator: np.random.Generator) -> dict[bool, list[np.ndarray]]:
    height, width = picture.shape[:2]
    rows, columns = -(-height // _BLOCK), -(-width // _BLOCK)
    blocks = np.zeros(rows * columns, dtype=bool)
    blocks[generator.permutation(blocks.size)[: max(1, round(0.2 * blocks.size))]] = True
    blocks = blocks.reshape(rows, columns)
    found: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for top in range(0, height - _CROP + 1, _STRIDE):
        for left in range(0, width - _CROP + 1, _STRIDE):
            touched = blocks[
                top // _BLOCK : (top + _CROP - 1) // _BLOCK + 1,
                left // _BLOCK : (left + _CROP - 1) // _BLOCK + 1,
            ]
            if touched.any() != touched.all():
                continue  # lies across the border of the two parts
            crop = picture[top : top + _CROP, left : left + _CROP]
            if crop.std() > _FLAT:
                found[bool(touched.all())].append(crop)
    return found


def _to_pixels(crops: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float().div_(255).contiguous()
