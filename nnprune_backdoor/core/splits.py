"""Split images class by class, find equal ones, and shift images at random."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from ..errors import DataError


def stratified(
    labels: Tensor | None, first: Tensor, shares: tuple[float, ...], seed: int
) -> list[Tensor]:
    """Indices of disjoint parts of images, class by class where labels (N,) are known.

    Args:
        first: from `equal_images`, (N,). Images that are equal come into the same part, since what
            is measured on one part must not have been seen in another.

    Raises:
        DataError: the shares do not sum to 1, or a part would be empty.
    """
    if any(share <= 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise DataError(f"expected positive shares that sum to 1, got {shares}")
    generator = torch.Generator().manual_seed(seed)
    different = first.unique()
    order = different[torch.randperm(len(different), generator=generator, device="cpu")]
    groups = [order]
    if labels is not None:
        classes, shuffled = labels[different].unique(), labels[order]
        turns = torch.randperm(len(classes), generator=generator, device="cpu")
        groups = [order[shuffled == label] for label in classes[turns]]
    # each class is cut by itself; what rounding leaves over goes to the part furthest behind
    owed = [0.0] * len(shares)
    pieces: list[list[Tensor]] = [[] for _ in shares]
    for group in groups:
        due = [share * len(group) for share in shares]
        sizes = [math.floor(wanted + 1e-6) for wanted in due]
        owed = [o + wanted - size for o, wanted, size in zip(owed, due, sizes, strict=True)]
        cut = [part for part in range(len(shares)) if due[part] - sizes[part] > 1e-6]
        cut.sort(key=lambda part: -owed[part])
        for part in cut[: len(group) - sum(sizes)]:
            sizes[part] += 1
            owed[part] -= 1
        for piece, indices in zip(pieces, group.split(sizes), strict=True):
            piece.append(indices)
    parts = [torch.cat(piece) for piece in pieces]
    if any(len(part) == 0 for part in parts):
        found = f"{len(first)} clean images"
        if len(different) < len(first):
            found += f", of which only {len(different)} differ,"
        raise DataError(f"{found} are too few to split into {shares}")
    return [with_equal_images(part, first).sort().values for part in parts]


def equal_images(images: Tensor) -> Tensor:
    """For each image (N, C, H, W) the number of the first that is equal to it: (N,), on the CPU.

    They are compared in single precision, in which most models see them.
    """
    first: dict[bytes, int] = {}
    numbers = []
    for number, image in enumerate(images.detach().cpu()):
        values = (image.float() + 0.0).contiguous()  # -0.0 becomes 0.0
        key = hashlib.sha256(values.numpy().data).digest()
        numbers.append(first.setdefault(key, number))
    return torch.tensor(numbers, device="cpu")


def with_equal_images(chosen: Tensor, first: Tensor) -> Tensor:
    """Numbers of the chosen images and of all that are equal to them, in the order of `chosen`.

    Args:
        chosen: numbers of different images, (K,), each the first of its kind.
        first: from `equal_images`, (N,).
    """
    place = torch.full((len(first),), len(first), device="cpu")
    place[chosen] = torch.arange(len(chosen), device="cpu")
    places = place[first]
    order = places.argsort(stable=True)
    return order[: int((places < len(first)).sum())]


def jittered(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W), moved by up to `shift` pixels and mirrored, both at random.

    Padded with zeros, which are grey under usual normalisations.
    """
    count, channels, height, width = images.shape
    padded = nn.functional.pad(images, (shift,) * 4)
    top = torch.randint(2 * shift + 1, (count, 1), generator=generator)
    left = torch.randint(2 * shift + 1, (count, 1), generator=generator)
    rows = (top + torch.arange(height))[:, None, :, None]
    columns = left + torch.arange(width)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)[:, None, None, :]
    every = torch.arange(channels)[None, :, None, None]
    return padded[torch.arange(count)[:, None, None, None], every, rows, columns]
