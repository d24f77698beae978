"""Tensors that are still in a file of PyTorch's: where they lie, and what rebuilds them.

The functions at the end stand for those by which PyTorch's pickles rebuild tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .pickle_objects import BadPickleError, Maker, Name

_MAX_DIMENSIONS = 64

_MAX_NUMBER = 2**63  # PyTorch counts elements and bytes below this

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
}


@dataclass(frozen=True, eq=False)
class Storage:
    """Where tensors have their numbers: elements from `first` on, of the part `key` of a file."""

    file: TorchFile
    key: str
    dtype: torch.dtype | None
    first: int = 0


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that is still in the file; sizes are what the file claims."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the tensor in memory."""
        return math.prod(self.size) * self.dtype.itemsize

    @property
    def span(self) -> int:
        """Bytes from its first element to its last one."""
        steps = sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        return (steps + 1) * self.dtype.itemsize if self.bytes else 0

    def read(self) -> Tensor:
        """The tensor, contiguous; CheckpointError where it does not lie in its place."""
        file = self.storage.file
        start, length = file.places.get(self.storage.key, (0, -1))
        begin = (self.storage.first + self.offset) * self.dtype.itemsize
        if begin + self.span > length:
            raise CheckpointError(
                f"{file.path}: damaged, a tensor of shape {self.size} lies outside of its "
                f"{max(length, 0):,} bytes; get the file again"
            )
        if not self.bytes:
            return torch.empty(self.size, dtype=self.dtype)
        content = bytearray(self.span)
        with file.path.open("rb") as stream:
            stream.seek(start + begin)
            if stream.readinto(content) != self.span:
                raise CheckpointError(f"{file.path}: it became shorter; get the file again")
        flat = torch.frombuffer(content, dtype=self.dtype)
        return flat.as_strided(self.size, self.stride).contiguous()


@dataclass
class TorchFile:
    """The content of a file that `torch.save` wrote.

    Attributes:
        content: Plain data, `StandIn` and `StoredTensor`, as `Unpickler.load` gives them.
        named: What became stand-ins.
        places: Part of the file -> its first byte and its length.
    """

    path: Path
    content: Any = None
    named: set[str] = field(default_factory=set)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None
) -> StoredTensor | None:
    """A tensor in a storage; None where there is another storage than of this file."""
    if not isinstance(storage, Storage) or dtype is None:
        return None
    if len(size) != len(stride) or len(size) > _MAX_DIMENSIONS:
        raise BadPickleError("a tensor with other strides than sizes")
    sizes = tuple(map(whole, size))
    if math.prod(n or 1 for n in sizes) * dtype.itemsize >= _MAX_NUMBER:  # also of empty tensors
        raise BadPickleError("a tensor with more elements than can be counted")
    return StoredTensor(storage, whole(offset), sizes, tuple(map(whole, stride)), dtype)


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> StoredTensor | None:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
    if any(rest[2:]):  # conjugated or negated: the numbers stored are others
        return None
    return _tensor(storage, offset, size, stride, getattr(storage, "dtype", None))


def _rebuild_v3(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    _grad: Any,
    _hooks: Any,
    dtype: Any,
    *rest: Any,
) -> StoredTensor | None:
    """torch._utils._rebuild_tensor_v3: the storage is of bytes, and the dtype stands beside it."""
    if any(rest) or not isinstance(dtype, Name) or dtype.module != "torch":
        return None
    return _tensor(storage, offset, size, stride, _DTYPES.get(dtype.name))


def _rebuild_typed(function: Any, kind: Any, arguments: Any, *_: Any) -> StoredTensor | None:
    """torch._tensor._rebuild_from_type_v2: a tensor with attributes, or of a subclass."""
    maker = TENSOR_MAKERS.get(str(function)) if isinstance(function, Name) else None
    plain = isinstance(kind, Name) and str(kind) in _PLAIN_TENSORS
    if maker is None or maker is _rebuild_typed or not plain:
        return None  # numbers of a subclass may mean anything
    made: StoredTensor | None = maker(*arguments)
    return made


def _first(tensor: Any, *_: Any) -> StoredTensor | None:
    """A parameter, or a tensor of another device, of this tensor."""
    return tensor if isinstance(tensor, StoredTensor) else None


_PLAIN_TENSORS = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter")

TENSOR_MAKERS: Mapping[str, Maker] = {
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch.nn.parameter.Parameter": _first,
    "torch._tensor._rebuild_from_type_v2": _rebuild_typed,
}


def dtype_of_storage(name: Any) -> torch.dtype | None:
    """The dtype of a class of storages; None for those of bytes and of quantised numbers."""
    if not isinstance(name, Name) or not name.module.startswith("torch"):
        raise BadPickleError("a storage of unknown kind")
    return _STORAGES.get(name.name)


def whole(value: Any) -> int:
    """The value if it is a number of elements; BadPickleError for all else."""
    if type(value) is not int or not 0 <= value < _MAX_NUMBER:
        raise BadPickleError(f"expected a size, got {type(value).__name__} that is none")
    return value
