"""Read JSON from untrusted files: one object, finite numbers, no name twice."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

_MAX_BYTES = 64 * 2**20


def read_json(path: Path, whose: str) -> dict[str, Any]:
    """The object in a file of strict JSON.

    Args:
        path: the file.
        whose: what has such a file, for messages: "a folder that ... wrote".

    Raises:
        CheckpointError: there is no such file, it is too large, or no JSON of this kind.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give {whose}")
    if path.stat().st_size > _MAX_BYTES:
        raise CheckpointError(
            f"{path}: over {_MAX_BYTES:,} bytes, more than is ever needed; get the folder again"
        )
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"),
            parse_constant=_finite,
            parse_float=_finite,
            object_pairs_hook=_unique,
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: damaged, or no plain JSON ({error}); get the folder again"
        ) from error
    if type(content) is not dict:
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without names that stand twice, of which one would win unsaid."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"{twice[:100]!r} stands twice in one object")
    return entries


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value
