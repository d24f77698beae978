"""Where a model and images came from, as records and documents say it."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.shards import files_of

if TYPE_CHECKING:
    from ..files.images import FolderImages
    from ..files.preprocessing import Preprocessing
    from .inputs import Model


def shown_path(path: Path) -> str:
    """A path as others may see it: from here on down, else the name alone."""
    inside = not path.is_absolute() and ".." not in path.parts
    return path.as_posix() if inside else path.resolve().name


def weights_sha256(path: Path) -> str:
    """SHA-256 of a weights file; of several files, over their bytes in order."""
    sums = hashlib.sha256()
    for part in files_of(path):
        with part.open("rb") as file:
            while block := file.read(2**20):
                sums.update(block)
    return sums.hexdigest()


def source_of(
    options: argparse.Namespace,
    path: Path,
    model: Model,
    images: FolderImages,
    preprocessing: Preprocessing,
) -> dict[str, Any]:
    """Where model and images came from, for the record.

    Args:
        path: of the checkpoint.
    """
    return {
        "checkpoint": shown_path(path),
        "checkpoint sha256": weights_sha256(path),
        **({"architecture": model.arch} if model.arch else {}),
        **({"weights": model.mapping} if model.mapping else {}),
        "images": options.clean.resolve().name,
        "classes": list(images.classes),
        "preprocessing": preprocessing.to_dict(),
        "skipped": len(images.skipped),
    }
