"""Read and write safetensors files, which hold nothing but tensors and text."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from .limits import MAX_BYTES, size_of

PURIFIED = "nnprune_backdoor"  # key of the text beside the tensors that `save_purified` writes


def read_safetensors(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, by the names in the file; raises CheckpointError."""
    return read_with_texts(path, max_bytes=max_bytes)[0]


def read_with_texts(
    path: Path, *, max_bytes: int = MAX_BYTES
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a `.safetensors` file, and the text beside them; raises CheckpointError."""
    size_of(path, max_bytes)
    try:
        # safe_open checks that shapes, dtypes and offsets of all tensors fit the file exactly
        with safe_open(path, framework="pt") as file:
            tensors = {name: _copy(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged, or no safetensors file ({error})") from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    """Write tensors and text beside them; the same give the same bytes.

    The library writes several texts in an order that changes from file to file.
    """
    save_file(dict(tensors), os.fspath(path), dict(texts))
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(ordered) == size:  # else the library writes JSON in another way than it does now
            file.seek(8)
            file.write(ordered)


def _copy(tensor: Tensor) -> Tensor:
    """A copy that does not depend on the file any more."""
    return tensor.clone(memory_format=torch.contiguous_format)
