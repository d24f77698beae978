"""How large a file may be."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError

MAX_BYTES = 8 * 2**30  # limit for a file, and for all its tensors together


def size_of(path: Path, max_bytes: int) -> int:
    """Size of a file in bytes; CheckpointError where it is not there, or over the limit."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; check the path")
    size = path.stat().st_size
    if size > max_bytes:
        raise CheckpointError(
            f"{path}: {size:,} bytes, over the limit of {max_bytes:,}; raise max_bytes if the "
            "file is meant to be that large"
        )
    return size
