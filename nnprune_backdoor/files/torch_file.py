"""Read files that `torch.save` wrote, without PyTorch's unpickler; no code from them runs.

The pickle in such a file holds names and shapes. It is read by `unpickling`. The bytes of a tensor
lie elsewhere in the file, and are read one tensor at a time, after its size was compared with the
place where they lie.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import CheckpointError
from .file_kinds import ZIP, kind_of_zip, text_like
from .pickle_objects import BadPickleError, ForbiddenNameError
from .stored_tensors import TENSOR_MAKERS, Storage, TorchFile, dtype_of_storage, whole
from .unpickling import MAX_BYTES, Unpickler

_MAGIC = 0x1950A86A20F9469CFC6C  # the first object of a file from before PyTorch 1.6

_BLOCK = 2**20  # bytes read at once for a checksum


def read_torch_file(path: Path, kind: str, size: int) -> TorchFile:
    """Read names and shapes.

    Args:
        kind: ZIP or PICKLE.
        size: of the file in bytes.

    Raises:
        CheckpointError: the file is damaged, of another kind, could exhaust memory, or asks for a
            function that no checkpoint needs.
    """
    found = TorchFile(path)
    try:
        (_read_archive if kind == ZIP else _read_legacy)(found, size)
    except ForbiddenNameError as error:
        raise CheckpointError(f"{path}: {_runs_code(str(error))}") from None
    except BadPickleError as error:
        begin = text_like(path)
        begins = "" if begin is None else f"; it begins with {begin!r}"
        raise CheckpointError(
            f"{path}: damaged, or no PyTorch checkpoint ({error}{begins}); get the file again"
        ) from None
    return found


def _runs_code(name: str) -> str:
    return (
        f"the pickle asks for {name[:100]!r}, which runs code and which no checkpoint needs: it is "
        "probably an attack, so it is not loaded. Nothing of it was run. Ask for a .safetensors "
        "file; or, if you trust its author, load it in a container without network and secrets, "
        "and save the weights there with safetensors.torch.save_file(model.state_dict(), ...)"
    )


def _unpickle(found: TorchFile, file: IO[bytes], persistent: Callable[[Any], Any]) -> Any:
    return Unpickler(file, makers=TENSOR_MAKERS, persistent=persistent, named=found.named).load()


# --- archives, since PyTorch 1.6 -------------------------------------------------------------


def _read_archive(found: TorchFile, size: int) -> None:
    try:
        with zipfile.ZipFile(found.path) as archive:
            members = archive.infolist()
            pickles = _check_members(found.path, members, size)
            _check_sums(archive, members)
            (top,) = {name.removesuffix("data.pkl") for name in pickles}
            data = archive.read(pickles[0])
            order = f"{top}byteorder"
            if order in archive.namelist() and archive.read(order) != b"little":
                raise CheckpointError(
                    f"{found.path}: written on a big-endian machine; save it as .safetensors there"
                )
            for name, place in _places(found.path, members).items():
                if name.startswith(f"{top}data/"):
                    found.places[name.removeprefix(f"{top}data/")] = place
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, RuntimeError, struct.error) as error:
        raise CheckpointError(
            f"{found.path}: damaged archive ({error or 'it ends too early'}); check that it was "
            "copied completely"
        ) from error

    def storage(identity: Any) -> Any:
        kind, name, key, _, _ = identity
        if kind != "storage":
            raise BadPickleError("an outside object that is no storage")
        return Storage(found, _text(key), dtype_of_storage(name))

    found.content = _unpickle(found, io.BytesIO(data), storage)


def _check_members(path: Path, members: list[zipfile.ZipInfo], size: int) -> list[str]:
    """The name of the pickle; refuses archives that torch.save does not write."""
    names = [member.filename for member in members]
    pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
    if any(name.rsplit("/", 1)[-1] == "constants.pkl" for name in names):
        raise CheckpointError(
            f"{path}: a TorchScript archive, which carries code; ask its author for "
            "model.state_dict() instead"
        )
    if not pickles:
        raise CheckpointError(f"{path}: {kind_of_zip(names)}")
    if len(pickles) > 1 or len(set(names)) < len(names):
        raise CheckpointError(
            f"{path}: several parts of one name, of which readers may take either; torch.save "
            "writes no such archive, so get the file from its author"
        )
    for member in members:
        packed = member.compress_type != zipfile.ZIP_STORED
        if packed or member.file_size != member.compress_size:
            raise CheckpointError(
                f"{path}: {member.filename!r} is compressed, {member.compress_size:,} bytes for "
                f"{member.file_size:,}; torch.save does not compress, so it may be a zip bomb"
            )
        if member.filename in pickles and member.file_size > MAX_BYTES:
            raise CheckpointError(
                f"{path}: {member.filename!r} is {member.file_size:,} bytes, over the limit of "
                f"{MAX_BYTES:,} for names and shapes; it may be a zip bomb"
            )
    if (claimed := sum(member.file_size for member in members)) > size:
        raise CheckpointError(
            f"{path}: its parts claim {claimed:,} bytes in a file of {size:,}; it may be a zip bomb"
        )
    return pickles


def _check_sums(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo]) -> None:
    """Read all parts once; raises BadZipFile and others where one is damaged.

    The names and places of the parts are compared too. Where no part has a checksum, the file was
    written with `torch.serialization.set_crc32_options(False)`, and only those are.
    """
    summed = any(member.CRC for member in members)
    for member in members:
        if not summed:
            member.CRC = None  # type: ignore[assignment]  # so that reading does not compare it
        with archive.open(member) as part:  # compares with the header before the part
            while summed and part.read(_BLOCK):
                pass  # the last read compares the checksum


def _places(path: Path, members: list[zipfile.ZipInfo]) -> dict[str, tuple[int, int]]:
    """Name -> first byte and length of its content; CheckpointError where two overlap."""
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for member in sorted(members, key=lambda member: member.header_offset):
        first = _first_byte(path, member)
        if member.header_offset < end:
            raise CheckpointError(
                f"{path}: {member.filename!r} overlaps another part; torch.save writes no such "
                "archive, so get the file from its author"
            )
        end = first + member.file_size
        places[member.filename] = (first, member.file_size)
    return places


def _first_byte(path: Path, member: zipfile.ZipInfo) -> int:
    """Where the content of a member begins, behind its own header."""
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
    return member.header_offset + 30 + int(name) + int(extra)


# --- before PyTorch 1.6: pickles one after another, then the numbers --------------------------


def _read_legacy(found: TorchFile, size: int) -> None:
    sizes: dict[str, torch.dtype] = {}

    def storage(identity: Any) -> Any:
        kind, name, key, *rest = identity
        if kind == "module":  # (kind, class, its file, its source)
            return name
        if kind != "storage":
            raise BadPickleError("an outside object that is no storage")
        view = rest[2] if len(rest) > 2 else None  # (key, first element, number of elements)
        dtype = dtype_of_storage(name)
        if dtype is None:
            raise BadPickleError(f"numbers of the kind {str(name)[:60]}, which is not read")
        sizes.setdefault(_text(key), dtype)
        return Storage(found, _text(key), dtype, 0 if view is None else whole(view[1]))

    with found.path.open("rb") as file:
        first = _unpickle(found, file, storage)
        if first != _MAGIC:  # pickle.dump
            found.content = first
            return
        protocol, system = (_unpickle(found, file, storage) for _ in range(2))
        if protocol != 1001 or not isinstance(system, dict) or not system.get("little_endian"):
            raise BadPickleError("an unknown version of the format, or a big-endian machine")
        found.content = _unpickle(found, file, storage)
        keys = _unpickle(found, file, storage)
        if not isinstance(keys, list):
            raise BadPickleError("no list of storages")
        for key in map(_text, keys):
            count = struct.unpack("<q", file.read(8).ljust(8, b"\xff"))[0]
            length = count * sizes.get(key, torch.uint8).itemsize
            start = file.tell()
            if count < 0 or start + length > size:
                raise BadPickleError("it ends too early")
            found.places[key] = (start, length)
            file.seek(length, io.SEEK_CUR)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise BadPickleError("a part of the file without a name")
    return value
