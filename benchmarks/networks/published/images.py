"""CIFAR-10 from class folders, an array file, or torchvision's copy, and the split of its test set.

    python -m benchmarks.networks.published.images FOLDER FILE.npz    # once: folders read slowly

All 50,000 training images train the networks. Of the test set, defences get their clean images
from half A; everything that a table shows is measured on half B.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class Images(NamedTuple):
    """Pixels (N, 3, 32, 32), 8 bits each, and labels (N,); sorted by label."""

    pixels: Tensor
    labels: Tensor

    def scaled(self) -> Tensor:
        """Pixels as floats in [0, 1]."""
        return self.pixels.float() / 255


def read(data: Path) -> tuple[Images, Images]:
    """Training and test images.

    Args:
        data: an array file (.npz) that `save` wrote; a folder with train/CLASS/* and test/CLASS/*;
            or the folder that holds torchvision's "cifar-10-batches-py".
    """
    if data.suffix == ".npz":
        arrays = np.load(data)
        return _images(arrays["train_pixels"], arrays["train_labels"]), _images(
            arrays["test_pixels"], arrays["test_labels"]
        )
    if (data / "cifar-10-batches-py").is_dir():
        from torchvision.datasets import CIFAR10

        parts = [CIFAR10(data, train=train) for train in (True, False)]
        train, test = (_images(part.data, np.array(part.targets)) for part in parts)
        return train, test
    return _folder(data / "train"), _folder(data / "test")


def save(train: Images, test: Images, file: Path) -> None:
    np.savez(
        file,
        train_pixels=train.pixels.permute(0, 2, 3, 1).numpy(),
        train_labels=train.labels.numpy(),
        test_pixels=test.pixels.permute(0, 2, 3, 1).numpy(),
        test_labels=test.labels.numpy(),
    )


def halves(test: Images) -> tuple[Images, Images]:
    """Half A and half B: of each class the first, third, fifth ... image, and the others."""
    in_a = torch.empty(len(test.labels), dtype=torch.bool)
    for label in test.labels.unique():
        members = (test.labels == label).nonzero().flatten()
        in_a[members] = torch.arange(len(members)) % 2 == 0
    a, b = (Images(test.pixels[part], test.labels[part]) for part in (in_a, ~in_a))
    return a, b


def _images(pixels: np.ndarray, labels: np.ndarray) -> Images:
    """Sorted by label, otherwise in the order given; `pixels` is (N, H, W, 3)."""
    order = np.argsort(labels, kind="stable")
    by_channel = torch.from_numpy(pixels[order]).permute(0, 3, 1, 2).contiguous()
    return Images(by_channel, torch.from_numpy(labels[order]).long())


def _folder(folder: Path) -> Images:
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    files = [(file, i) for i, entry in enumerate(classes) for file in sorted(entry.iterdir())]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file, _ in files])
    return _images(pixels, np.array([label for _, label in files]))


if __name__ == "__main__":
    save(*read(Path(sys.argv[1])), Path(sys.argv[2]))
