"""Weights from files that somebody else wrote: tensors come out, and no code runs.

Pickles are read by PyTorch's restricted unpickler alone. What a file claims is held against its
size before memory is taken: tensors are mapped from the file, checked, and only then copied.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import reprlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import CheckpointError

MAX_BYTES = 8 * 2**30  # of a file, and of the tensors that it claims to hold

_MAX_PICKLE = 32 * 2**20  # of the pickle inside an archive, which holds names and shapes only


_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".tar")  # .tar: as in model_best.pth.tar

_NESTS = (
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


class Weights(dict[str, Tensor]):
    """Tensors by name. `notes` says in lines for people how they were found.

    `arch` is the architecture's name, where the file held one beside the weights.
    """

    notes: tuple[str, ...] = ()
    arch: str | None = None


def load_weights(
    path: str | os.PathLike[str], *, key: str | None = None, max_bytes: int = MAX_BYTES
) -> Weights:
    """Read the tensors of a `.safetensors`, `.pt`, `.pth`, `.bin`, `.ckpt` or `.pth.tar` file.

    Nestings ("state_dict", "model", "net", ...) are unwrapped and prefixes that all names share
    ("module.", "_orig_mod.", "model.") are taken off; `notes` says which, and what was skipped
    because it is no tensor. Values are not judged here; `purify` refuses NaN and inf.

    Args:
        key: entry of the file that holds the weights, such as "state_dict_ema"; by default the
            first of the usual ones, averaged weights last.
        max_bytes: largest file, and largest sum of tensors, that is read.

    Returns:
        Name -> tensor on the CPU, contiguous, in memory of its own, without gradient.

    Raises:
        CheckpointError: no such file, another kind of file, damaged, too large, tensors larger
            than the file, no weights in it, or a pickle of more than plain weights (a whole
            module), which is not loaded because that would run code of the file's choice.
    """
    path = Path(path)
    size = _size(path, max_bytes)
    notes: list[str] = []
    arch: Any = None
    if path.suffix == ".safetensors":
        found = read_safetensors(path, max_bytes=max_bytes)
    elif path.suffix in _PICKLES:
        entries, notes, arch = _unwrap(path, _unpickle(path, size), key)
        found, skipped = _tensors(path, entries, size, max_bytes)
        notes += [f"skipped, no tensors: {_few(skipped)}"] if skipped else []
    else:
        raise CheckpointError(
            f"{path}: expected a file .safetensors, {', '.join(_PICKLES)}, got {path.suffix!r}"
        )
    if not found:
        raise CheckpointError(f"{path}: no weights in it ({'; '.join(notes) or 'it is empty'})")
    prefix = _shared_prefix(found)
    notes += [f"took off the prefix {prefix!r}"] if prefix else []
    weights = Weights({name[len(prefix) :]: tensor for name, tensor in found.items()})
    weights.notes = tuple(notes)
    weights.arch = arch if isinstance(arch, str) else None
    return weights


def read_safetensors(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Tensor]:
    """The tensors of one `.safetensors` file, names untouched; raises CheckpointError."""
    _size(path, max_bytes)
    try:
        # checks on opening that shapes, types and offsets of all tensors fit the file exactly
        with safe_open(path, framework="pt") as file:
            return {name: _own(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged, or no safetensors file ({error})") from error


def _size(path: Path, max_bytes: int) -> int:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    size = path.stat().st_size
    if size > max_bytes:
        raise CheckpointError(
            f"{path}: {size:,} bytes, over the limit of {max_bytes:,}; raise max_bytes if you "
            "trust it to be that large"
        )
    return size


def _own(tensor: Tensor) -> Tensor:
    """A copy that does not change, or vanish, when the file does."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _unpickle(path: Path, size: int) -> Any:
    with path.open("rb") as file:
        archive = file.read(4) == b"PK\x03\x04"  # the test that torch.load makes
    if archive:
        _check_archive(path, size)
    allowed = torch.serialization.get_safe_globals()
    try:
        torch.serialization.clear_safe_globals()  # the user may have allowed more for other files
        # plain holders of attributes, which timm's training script stores beside the weights
        torch.serialization.add_safe_globals([argparse.Namespace])
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:  # a hostile file may cause any
        raise CheckpointError(f"{path}: {_reason(error)}") from None
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


def _check_archive(path: Path, size: int) -> None:
    """Refuse what torch.save never writes: compressed, overlapping, or with a huge pickle."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: damaged archive ({error}); was it cut short?") from error
    names = {member.filename.rsplit("/", 1)[-1] for member in members}
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path}: a TorchScript archive, which carries code; where it was made, save "
            "model.state_dict() instead"
        )
    for member in members:
        packed = member.compress_type != zipfile.ZIP_STORED
        if packed or member.file_size != member.compress_size:
            raise CheckpointError(
                f"{path}: {member.filename!r} is compressed, {member.compress_size:,} bytes for "
                f"{member.file_size:,}; torch.save does not do that, so it may be a bomb"
            )
        if member.filename.endswith(".pkl") and member.file_size > _MAX_PICKLE:
            raise CheckpointError(
                f"{path}: {member.filename!r} is {member.file_size:,} bytes, over the limit of "
                f"{_MAX_PICKLE:,} for names and shapes"
            )
    if (claimed := sum(member.file_size for member in members)) > size:
        raise CheckpointError(
            f"{path}: its parts claim {claimed:,} bytes in a file of {size:,}; it may be a bomb"
        )


def _reason(error: Exception) -> str:
    """What stopped the unpickler, in words of ours."""
    text = str(error)
    asked = re.search(r"(?:GLOBAL|[Uu]nsupported class|reduce for unrecognized \w+) (\S+)", text)
    if asked:
        return (
            f"not plain weights: the pickle asks for {asked[1]!r}. Whatever a pickle names is "
            "imported and called with arguments of the file's choice, also when it holds a whole "
            "module, so it is not loaded. Ask for a .safetensors file or a state dict; or load it "
            "in a container without network and secrets by torch.load(..., weights_only=False), "
            "and bring out safetensors.torch.save_file(model.state_dict(), ...)"
        )
    if "legacy .tar" in text:
        return (
            "a checkpoint of PyTorch before 0.1.10, which cannot be read without running code; "
            "load it in a container without network and secrets, and save model.state_dict() anew"
        )
    if isinstance(error, pickle.UnpicklingError):  # whose text advises to switch the check off
        inner = re.search(r"WeightsUnpickler error: (.*)", text)
        text = inner[1] if inner else "not a pickle that the restricted reader knows"
    first = next(iter(text.strip().splitlines()), type(error).__name__)
    return f"damaged, or no PyTorch checkpoint ({first[:200]})"


def _unwrap(path: Path, content: Any, key: str | None) -> tuple[Mapping[Any, Any], list[str], Any]:
    """The innermost dictionary of weights, notes, and what stands as "arch" on the way."""
    notes: list[str] = []
    arch = None
    wanted = _NESTS if key is None else (key,)
    for _ in range(5):
        if not isinstance(content, Mapping):
            break
        arch = content.get("arch", arch)
        nest = next((name for name in wanted if isinstance(content.get(name), Mapping)), None)
        if nest is None and wanted == (key,):
            raise CheckpointError(f"{path}: no weights under {key!r}; it holds {_few(content)}")
        if nest is None:
            return content, notes, arch
        notes.append(f"took {nest!r} of {_few(content)}")
        content, wanted = content[nest], _NESTS
    raise CheckpointError(
        f"{path}: expected a dictionary of tensors, got {type(content).__name__}"
        f" ({'; '.join(notes) or 'at the top'})"
    )


def _tensors(
    path: Path, entries: Mapping[Any, Any], size: int, max_bytes: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Copies of the tensors, and the names of all else."""
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
        # names may share memory (tied weights), but none is larger than the whole file
        if claimed > size or total > max_bytes:
            raise CheckpointError(
                f"{path}: {name!r} claims shape {tuple(view.shape)}, {claimed:,} bytes ({total:,} "
                f"so far) in a file of {size:,} (limit {max_bytes:,}); it may be a bomb"
            )
        views[name] = view
    return {name: _own(view) for name, view in views.items()}, skipped


def _dense(path: Path, name: str, value: Tensor) -> Tensor:
    plain = type(value) in (Tensor, nn.Parameter)
    if plain:
        value = Tensor.detach(value)  # drops attributes that the file may have put on it
        plain = value.layout == torch.strided and value.device.type == "cpu"
    if not plain or value.is_quantized:
        raise CheckpointError(
            f"{path}: {name!r} is no plain dense tensor ({type(value).__name__}); save the "
            "weights unquantised and dense"
        )
    return value


def _shared_prefix(names: Mapping[str, Any]) -> str:
    """What of `_PREFIXES` all names begin with, one after another."""
    shared = ""
    while True:
        for prefix in _PREFIXES:
            if all(name.startswith(shared + prefix) for name in names):
                shared += prefix
                break
        else:
            return shared


def _few(names: Any) -> str:
    listed = [_short(name) for name in names]
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    return ", ".join(listed[:8]) + more


def _short(name: Any) -> str:
    """A key of a pickle, which may be a tuple that holds itself a million times over."""
    return name[:60] if isinstance(name, str) else reprlib.repr(name)[:60]
