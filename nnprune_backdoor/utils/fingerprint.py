"""By which weights, images and date a record can be told from another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor


def fingerprint(tensors: Mapping[str, Any]) -> str:
    """SHA-256, in hex, over names, types, shapes and bytes of tensors; all else is passed over.

    The same for the same tensors wherever they are and whatever file they came from.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if isinstance(tensor := tensors[name], Tensor):
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def now() -> str:
    """The date and time in UTC, to the second, as ISO 8601 has it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
