"""Images to run networks on, and a folder in the format of MNIST."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from helpers.networks import PIXELS


def noise_images(count: int, seed: int = 0) -> Tensor:
    """(count, 3, 32, 32), standard normal."""
    return torch.randn(count, 3, PIXELS, PIXELS, generator=generator(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def write_mnist(root: Path, count: int = 30) -> Path:
    """Image number i is grey 5 i, of class i modulo 10."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        pixels = np.repeat(5 * np.arange(count, dtype=np.uint8), 28 * 28)
        head = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        head = struct.pack(">II", 0x801, count)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    return root
