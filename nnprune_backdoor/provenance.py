"""What a purified model was made from, as plain data: settings and hashes, for the record."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .criteria import Criterion
from .data import CleanData
from .selection import Selector


def provenance(
    model: nn.Module, clean: CleanData, criterion: Criterion, selector: Selector
) -> dict[str, Any]:
    """Settings of criterion and selector, the images' shape, hashes of weights and clean data."""
    data = {"images": clean.images, "labels": clean.labels}
    return {
        "criterion": {"class": type(criterion).__name__, "settings": plain(criterion)},
        "selector": {"class": type(selector).__name__, "settings": plain(selector)},
        "input": list(clean.images.shape[1:]),
        "sha256": {"weights": fingerprint(model.state_dict()), "clean": fingerprint(data)},
    }


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


def plain(value: Any) -> Any:
    """As JSON can hold it: dataclasses become dictionaries of their fields, tensors their hash."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "sha256": fingerprint({"": value})}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list, set, frozenset)):
        return [plain(entry) for entry in value]
    return getattr(value, "__name__", type(value).__name__)  # repr may hold an address
