"""Read weights from untrusted files. Only tensors are read, and no code from the file runs.

Pickles are read with PyTorch's restricted unpickler only. It honours a list that belongs to the
whole process, so the names that a pickle asks for are first compared with a list of our own.
Tensors are mapped from the file, and copied only after their sizes have been compared with the size
of the file, so that a small file cannot fill the memory.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import pickletools
import re
import reprlib
import struct
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import CheckpointError

MAX_BYTES = 8 * 2**30  # limit for a file, and for all its tensors together

_MAX_PICKLE = 32 * 2**20  # bytes of the pickle inside an archive, which holds names and shapes only

_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".tar")  # .tar: as in model_best.pth.tar

# entries that hold the weights, most usual first, averaged weights last
_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "weights",
    "params",
    "state_dict_ema",
    "ema_state_dict",
    "model_ema",
    "params_ema",
)

_PREFIXES = ("module.", "_orig_mod.", "model.")

_MAX_NESTING = 5

_LEGACY_PICKLES = 5  # in a file of PyTorch before 1.6: magic, protocol, system, content, keys

_NAMESPACE = "argparse Namespace"  # attributes only; timm's training script stores one

# what a pickle may ask for, "module name": containers, and what PyTorch makes tensors with
_ALLOWED = re.compile(
    r"collections (OrderedDict|Counter)|(builtins|__builtin__) (bytearray|complex|set)"
    rf"|_codecs encode|{_NAMESPACE}|torch (Size|Tensor|device)|torch\.nn\.parameter Parameter"
    r"|torch(\.cuda|\.sparse|\.cuda\.sparse)? \w+(Storage|Tensor)|torch\.storage \w+Storage"
    r"|torch (bool|per_\w+|b?complex\d+|b?float\d\w*|bits\d\w*|q?u?int\d\w*)"
    r"|torch\.serialization _get_layout|torch\._tensor _rebuild_from_type_v2"
    r"|torch\._utils _rebuild_\w+",
    re.ASCII,
)

_BLOCK = 2**20  # bytes read at once for a checksum


class Weights(dict[str, Tensor]):
    """Tensors by name.

    Attributes:
        notes: What was unwrapped, renamed or skipped while reading, a sentence each.
        arch: The file's entry "arch", a timm name; None if there is none.
    """

    notes: tuple[str, ...] = ()
    arch: str | None = None


def load_weights(
    path: str | os.PathLike[str], *, key: str | None = None, max_bytes: int = MAX_BYTES
) -> Weights:
    """Read the tensors of a `.safetensors`, `.pt`, `.pth`, `.bin`, `.ckpt` or `.pth.tar` file.

    Weights nested in entries such as "state_dict", "model" or "net" are unwrapped, prefixes that
    all names share ("module.", "_orig_mod.", "model.") are removed, and entries that are not
    tensors are skipped; `notes` lists all of this. NaN and inf are not refused here, but by
    `purify`.

    Args:
        key: entry of the file that holds the weights, such as "state_dict_ema"; by default the
            first of the usual names that is there, averaged weights last.
        max_bytes: largest file, and largest sum of tensors, that is read.

    Returns:
        Name -> tensor: on the CPU, contiguous, not shared with the file or one another.

    Raises:
        CheckpointError: the file does not exist, is of another kind, damaged or too large, holds
            no weights, or tensors that claim to be larger than the file; or it is a pickle of more
            than weights, such as a whole module, since loading that would run code from the file.
    """
    path = Path(path)
    size = _size(path, max_bytes)
    notes: list[str] = []
    arch: Any = None
    if path.suffix == ".safetensors":
        tensors = read_safetensors(path, max_bytes=max_bytes)
    elif path.suffix in _PICKLES:
        entries, notes, arch = _unwrap(path, _unpickle(path, size), key)
        tensors, skipped = _tensors(path, entries, size, max_bytes)
        notes += [f"skipped, no tensors: {_listed(skipped)}"] if skipped else []
    else:
        raise CheckpointError(
            f"{path}: expected a file .safetensors, {', '.join(_PICKLES)}, got {path.suffix!r}"
        )
    if not tensors:
        raise CheckpointError(
            f"{path}: no weights in it ({'; '.join(notes) or 'it is empty'}); give a file that "
            "holds a state dict"
        )
    prefix = _shared_prefix(tensors)
    notes += [f"removed the prefix {prefix!r}"] if prefix else []
    weights = Weights({name[len(prefix) :]: tensor for name, tensor in tensors.items()})
    weights.notes = tuple(notes)
    weights.arch = arch if isinstance(arch, str) else None
    return weights


def read_safetensors(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, by the names in the file; raises CheckpointError."""
    _size(path, max_bytes)
    try:
        # safe_open checks that shapes, dtypes and offsets of all tensors fit the file exactly
        with safe_open(path, framework="pt") as file:
            return {name: _copy(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged, or no safetensors file ({error})") from error


def _size(path: Path, max_bytes: int) -> int:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; check the path")
    size = path.stat().st_size
    if size > max_bytes:
        raise CheckpointError(
            f"{path}: {size:,} bytes, over the limit of {max_bytes:,}; raise max_bytes if the "
            "file is meant to be that large"
        )
    return size


def _copy(tensor: Tensor) -> Tensor:
    """A copy that does not depend on the file any more."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _unpickle(path: Path, size: int) -> Any:
    with path.open("rb") as file:
        archive = file.read(4) == b"PK\x03\x04"  # the test that torch.load makes
    if archive:
        _check_archive(path, size)
    asked = _names_asked(path, archive)
    with _NAMESPACES.allowed() if _NAMESPACE in asked else contextlib.nullcontext():
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
        except Exception as error:  # a hostile file may cause any kind
            raise CheckpointError(f"{path}: {_reason(error)}") from None


class _Namespaces:
    """Lets PyTorch's unpickler read `argparse.Namespace` while some thread needs it.

    Nothing but this name is ever added to PyTorch's list or removed from it, and it is removed by
    the last reader only. It stays where the program itself had allowed it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self._added = False

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        kinds: list[Any] = [argparse.Namespace]
        with self._lock:
            if self._readers == 0:
                self._added = kinds[0] not in torch.serialization.get_safe_globals()
                if self._added:
                    torch.serialization.add_safe_globals(kinds)
            self._readers += 1
        try:
            yield
        finally:
            with self._lock:
                self._readers -= 1
                if self._readers == 0 and self._added:
                    # PyTorch's only way to take one name off the list is the end of this context
                    with torch.serialization.safe_globals(kinds):
                        pass


_NAMESPACES = _Namespaces()


def _names_asked(path: Path, archive: bool) -> set[str]:
    """The names "module name" that the pickles of a file ask for.

    The only opcode that PyTorch's unpickler looks up a name for is GLOBAL; it refuses the others.

    Raises:
        CheckpointError: a name is not allowed, or what is there is no pickle.
    """
    asked: set[str] = set()
    try:
        with contextlib.ExitStack() as stack:
            if archive:
                parts = stack.enter_context(zipfile.ZipFile(path))
                pickles: list[IO[bytes]] = []
                for member in parts.infolist():
                    if member.filename.endswith(".pkl"):
                        member.CRC = None  # type: ignore[assignment]  # compared before
                        pickles.append(stack.enter_context(parts.open(member)))
            else:
                pickles = [stack.enter_context(path.open("rb"))] * _LEGACY_PICKLES
            for file in pickles:
                for opcode, argument, _ in pickletools.genops(file):
                    if opcode.name == "GLOBAL":
                        _check_allowed(path, str(argument))
                        asked.add(str(argument))
    except CheckpointError:
        raise
    except Exception as error:  # a hostile file may cause any kind
        reason = _TAR if not archive and tarfile.is_tarfile(path) else _reason(error)
        raise CheckpointError(f"{path}: {reason}") from None
    return asked


def _check_allowed(path: Path, name: str) -> None:
    if not _ALLOWED.fullmatch(name):
        raise CheckpointError(f"{path}: {_runs_code(name.replace(' ', '.', 1))}")


def _check_archive(path: Path, size: int) -> None:
    """Refuse damaged archives, and those that torch.save does not write.

    These are compressed, overlapping, or hold a huge pickle.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_members(path, members, size)
            _check_sums(archive, members)
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, RuntimeError, struct.error) as error:
        raise CheckpointError(
            f"{path}: damaged archive ({error or 'it ends too early'}); check that it was copied "
            "completely"
        ) from error


def _check_members(path: Path, members: list[zipfile.ZipInfo], size: int) -> None:
    names = {member.filename.rsplit("/", 1)[-1] for member in members}
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path}: a TorchScript archive, which carries code; ask its author for "
            "model.state_dict() instead"
        )
    for member in members:
        packed = member.compress_type != zipfile.ZIP_STORED
        if packed or member.file_size != member.compress_size:
            raise CheckpointError(
                f"{path}: {member.filename!r} is compressed, {member.compress_size:,} bytes for "
                f"{member.file_size:,}; torch.save does not compress, so it may be a zip bomb"
            )
        if member.filename.endswith(".pkl") and member.file_size > _MAX_PICKLE:
            raise CheckpointError(
                f"{path}: {member.filename!r} is {member.file_size:,} bytes, over the limit of "
                f"{_MAX_PICKLE:,} for names and shapes; it may be a zip bomb"
            )
    if (claimed := sum(member.file_size for member in members)) > size:
        raise CheckpointError(
            f"{path}: its parts claim {claimed:,} bytes in a file of {size:,}; it may be a zip bomb"
        )


def _check_sums(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo]) -> None:
    """Read all parts once, since torch.load skips their checksums; raises BadZipFile and others.

    The names and places of the parts are compared too. Where no part has a checksum, the file was
    written with `torch.serialization.set_crc32_options(False)`, and only those are.
    """
    summed = any(member.CRC for member in members)
    for member in members:
        with archive.open(member) as part:  # compares with the header before the part
            while summed and part.read(_BLOCK):
                pass  # the last read compares the checksum


def _reason(error: Exception) -> str:
    """Why the unpickler stopped, and what the user can do."""
    text = str(error)
    refused = re.search(r"(?:GLOBAL|[Uu]nsupported class|reduce for unrecognized \w+) (\S+)", text)
    if refused:
        return _runs_code(refused[1])
    if "legacy .tar" in text:
        return _TAR
    if isinstance(error, pickle.UnpicklingError):  # its text advises to switch the check off
        inner = re.search(r"WeightsUnpickler error: (.*)", text)
        text = inner[1] if inner else "not a pickle that the restricted reader knows"
    first_line = next(iter(text.strip().splitlines()), type(error).__name__)
    return f"damaged, or no PyTorch checkpoint ({first_line[:200]}); get the file again"


_TAR = (
    "a checkpoint of PyTorch before 0.1.10, which cannot be read without running code; load it in "
    "a container without network and secrets, and save model.state_dict() there"
)


def _runs_code(name: str) -> str:
    return (
        f"not plain weights: the pickle asks for {name[:100]!r}. Loading a pickle imports and "
        "calls whatever it names, also when it holds a whole module, so it is not loaded. Ask for "
        "a .safetensors file or a state dict; or load it in a container without network and "
        "secrets with torch.load(..., weights_only=False), and save the weights there with "
        "safetensors.torch.save_file(model.state_dict(), ...)"
    )


def _unwrap(path: Path, content: Any, key: str | None) -> tuple[Mapping[Any, Any], list[str], Any]:
    """The innermost dictionary of weights, notes on the way there, and the last entry "arch"."""
    notes: list[str] = []
    arch = None
    keys = _KEYS if key is None else (key,)
    for _ in range(_MAX_NESTING):
        if not isinstance(content, Mapping):
            break
        arch = content.get("arch", arch)
        inner = next((name for name in keys if isinstance(content.get(name), Mapping)), None)
        if inner is None and keys == (key,):
            raise CheckpointError(
                f"{path}: no weights under the key {key!r}; it holds {_listed(content)}"
            )
        if inner is None:
            return content, notes, arch
        notes.append(f"took {inner!r} of {_listed(content)}")
        content, keys = content[inner], _KEYS
    raise CheckpointError(
        f"{path}: expected a dictionary of tensors, got {type(content).__name__}"
        f" ({'; '.join(notes) or 'at the top'})"
    )


def _tensors(
    path: Path, entries: Mapping[Any, Any], size: int, max_bytes: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Copies of the tensors, and the names of all other entries."""
    views: dict[str, Tensor] = {}
    skipped = []
    total = 0
    for name, value in entries.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            skipped.append(_short(name))
            continue
        view = _dense(path, name, value)
        claimed = view.numel() * view.element_size()
        total += claimed
        # tensors may share memory (tied weights), so their sum may exceed the file, but none alone
        if claimed > size or total > max_bytes:
            raise CheckpointError(
                f"{path}: {name!r} claims shape {tuple(view.shape)}, {claimed:,} bytes ({total:,} "
                f"so far) in a file of {size:,} (limit {max_bytes:,}); it may be there to exhaust "
                "memory"
            )
        views[name] = view
    return {name: _copy(view) for name, view in views.items()}, skipped


def _dense(path: Path, name: str, value: Tensor) -> Tensor:
    """The tensor without gradient; raises CheckpointError unless it is plain and dense."""
    plain = type(value) in (Tensor, nn.Parameter)
    if plain:
        value = Tensor.detach(value)  # without attributes that the file may have added
        plain = value.layout == torch.strided and value.device.type == "cpu"
    if not plain or value.is_quantized:
        raise CheckpointError(
            f"{path}: {name!r} is no plain dense tensor ({type(value).__name__}); save the "
            "weights unquantised and dense"
        )
    return value


def _shared_prefix(names: Mapping[str, Any]) -> str:
    """The longest sequence of `_PREFIXES` with which all names begin."""
    shared = ""
    while True:
        for prefix in _PREFIXES:
            if all(name.startswith(shared + prefix) for name in names):
                shared += prefix
                break
        else:
            return shared


def _listed(names: Any) -> str:
    listed = [_short(name) for name in names]
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    return ", ".join(listed[:8]) + more


def _short(name: Any) -> str:
    """A key for a message; a hostile pickle may have a tuple of endless length as key."""
    return name[:60] if isinstance(name, str) else reprlib.repr(name)[:60]
