"""Split images class by class, and shift them at random."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import DataError


def stratified(
    labels: Tensor | None, count: int, shares: tuple[float, ...], seed: int
) -> list[Tensor]:
    """Indices of disjoint parts of `count` images, class by class where labels (N,) are known.

    Raises:
        DataError: the shares do not sum to 1, or a part would be empty.
    """
    if any(share <= 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise DataError(f"expected positive shares that sum to 1, got {shares}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    groups = [order]
    if labels is not None:
        classes, shuffled = labels.unique(), labels[order]
        turns = torch.randperm(len(classes), generator=generator)
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
        raise DataError(f"{count} clean images are too few to split into {shares}")
    return [part.sort().values for part in parts]


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
