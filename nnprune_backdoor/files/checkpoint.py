"""Read weights from untrusted files. Only tensors are read, and no code from the file runs.

What a file is, is told by its content (`file_kinds`). Pickles are read without running them
(`torch_file`, `unpickling`), and so the weights among all that a training script saved are found
(`state_dicts`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from .file_kinds import JSON, SAFETENSORS, kind_of
from .limits import MAX_BYTES, size_of
from .pickle_objects import StandIn
from .safetensors_file import PURIFIED, read_with_texts
from .shards import hub_config, read_index, refuse_shard, usual_file
from .state_dicts import LEAF, Found, Kind, listed, short, unwrap
from .tensor_names import Chosen, choose
from .torch_file import read_torch_file

_MAX_ENTRIES = 100_000  # tensors and others in the entry that holds the weights

_MAX_NAME = 1000  # characters

_MAX_SHARING = 64  # times that the tensors of a file may take its size, as layers that are one do


class Weights(dict[str, Tensor]):
    """Tensors by name.

    Attributes:
        notes: What was unwrapped, renamed or left out while reading, a sentence each.
        arch: The architecture that the file, or config.json beside it, names; None if none does.
        config: What a hub's config.json beside the file says (see `shards.hub_config`).
        purified: Whether `save_purified` wrote the file, so that layers may be smaller.
        mapping: The same as plain data: which entry, prefix and names of the file were taken.
    """

    notes: tuple[str, ...] = ()
    arch: str | None = None
    config: Mapping[str, Any] = MappingProxyType({})
    purified: bool = False
    mapping: dict[str, Any]

    def __init__(self, tensors: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        super().__init__(tensors)
        self.mapping = {}

    def with_tensors(self, tensors: Mapping[str, Tensor], *notes: str) -> Weights:
        """Other tensors out of these, with further notes."""
        other = Weights(tensors)
        other.notes, other.arch = (*self.notes, *notes), self.arch
        other.config, other.purified = self.config, self.purified
        other.mapping = dict(self.mapping)
        return other

    def leave_out(self, names: list[str]) -> None:
        """Add to the mapping what was left out."""
        self.mapping["left_out"] = [*self.mapping.get("left_out", ()), *names]


@dataclass
class _Opened:
    """A file, before its tensors are read.

    Attributes:
        content: As the file has it.
        size: Of the file or files, in bytes.
        named: What became stand-ins.
        purified: Whether `save_purified` wrote it.
    """

    content: Any
    size: int
    notes: list[str] = field(default_factory=list)
    named: set[str] = field(default_factory=set)
    purified: bool = False


def load_weights(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    prefix: str | None = None,
    drop: Sequence[str] = (),
    weights: Kind | None = None,
    max_bytes: int = MAX_BYTES,
) -> Weights:
    """Read the tensors of a file that PyTorch or safetensors wrote, or of a hub's folder.

    What the file is, is told by its content, not by its name. Weights nested in entries such as
    "state_dict", "model" or "net" are unwrapped, prefixes that wrappers put before all names
    ("module.", "_orig_mod.", "model.") are removed, and what is no tensor is left out; `notes`
    lists all of this. NaN and inf are not refused here, but by `purify`.

    Args:
        path: a file; the index of a model in several files; or a folder with model.safetensors,
            pytorch_model.bin, or such an index.
        key: entry of the file that holds the weights; by default the first of the usual names.
        prefix: take the tensors whose names begin so, and take it off; all others are left out.
        drop: leave out tensors whose names in the file match, such as "head_dist.*".
        weights: which to take where the file holds both: "plain", as they were trained (default),
            or "ema", their moving average.
        max_bytes: largest file, and largest sum of tensors, that is read.

    Returns:
        Name -> tensor: on the CPU, contiguous, not shared with the file or one another.

    Raises:
        CheckpointError: the file does not exist, is of another kind, damaged or too large, holds
            no weights, or tensors that claim to be larger than the file; or it is a pickle that
            asks for a function that runs code.
    """
    if weights not in (None, "plain", "ema"):
        raise CheckpointError(f"weights={weights!r}: expected 'plain' or 'ema'")
    path = Path(path)
    path = usual_file(path) if path.is_dir() else path
    opened = _open(path, max_bytes)
    try:
        found = unwrap(opened.content, key, weights)
        _check_names(found.entries)
        leaves = {name: v for name, v in found.entries.items() if _is_tensor(name, v)}
        chosen = choose(leaves, found, prefix=prefix, drop=drop, weights=weights)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    notes = _notes(opened, found, [name for name in found.entries if name not in leaves])
    if not chosen.names:
        raise CheckpointError(
            f"{path}: no weights in it ({'; '.join(notes) or 'it is empty'}); give a file that "
            "holds a state dict"
        )
    taken = {name: leaves[name] for name in chosen.names}
    tensors = _read(path, taken, opened.size, max_bytes)
    result = Weights({new: tensors[old] for old, new in chosen.names.items()})
    result.notes, result.purified = (*notes, *chosen.notes), opened.purified
    _set_architecture(result, found.arch, path)
    result.mapping = _mapping(found, chosen, leaves)
    return result


def _mapping(found: Found, chosen: Chosen, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """See `Weights`."""
    return {
        "entry": found.path,
        "averaged": found.averaged or chosen.averaged,
        "prefix": chosen.prefix,
        "left_out": [short(name) for name in leaves if name not in chosen.names],
    }


def _set_architecture(weights: Weights, named: Any, path: Path) -> None:
    """What the entry "arch" names, else config.json beside a hub's file."""
    if isinstance(named, str):
        weights.arch = named
    elif path.name.startswith(("model.safetensors", "pytorch_model.bin")):
        weights.config = hub_config(path.parent)
        weights.arch = weights.config.get("architecture")
        weights.notes += ("took the architecture from config.json",) if weights.config else ()


def _notes(opened: _Opened, found: Found, skipped: list[Any]) -> list[str]:
    """What was read and unwrapped, a sentence each."""
    notes = [*opened.notes, *found.notes]
    if skipped:
        notes.append(f"skipped, no tensors: {listed(skipped)}")
    if opened.purified:
        notes.append("these are weights of a purified model")
    if opened.named:
        names = listed(sorted(opened.named))
        notes.append(f"read as inert stand-ins, nothing of them was run: {names}")
    return notes


def _open(path: Path, max_bytes: int) -> _Opened:
    size = size_of(path, max_bytes)
    kind, instead = kind_of(path)
    if kind is None:
        raise CheckpointError(f"{path}: {instead}")
    if kind == JSON:
        return _open_shards(path, max_bytes)
    refuse_shard(path)
    return _open_one(path, kind, size, max_bytes)


def _open_one(path: Path, kind: str, size: int, max_bytes: int) -> _Opened:
    if kind == SAFETENSORS:
        tensors, texts = read_with_texts(path, max_bytes=max_bytes)
        opened = _Opened(tensors, size, purified=PURIFIED in texts)
    else:
        file = read_torch_file(path, kind, size)
        opened = _Opened(file.content, size, named=file.named)
    if (kind == SAFETENSORS) != (path.suffix.lower() == ".safetensors"):
        what = "a safetensors file" if kind == SAFETENSORS else "a file of PyTorch's"
        opened.notes.append(f"it is {what}, whatever its name says")
    return opened


def _open_shards(path: Path, max_bytes: int) -> _Opened:
    index = read_index(path)
    whole = _Opened({}, 0, [f"read {len(index.files)} files that {path.name} names"])
    wanted: dict[Path, list[str]] = {file: [] for file in index.files}
    for name, file in index.places.items():
        wanted[file].append(name)
    for file in index.files:
        size = size_of(file, max_bytes - whole.size)
        kind, instead = kind_of(file)
        if kind is None or kind == JSON:
            raise CheckpointError(f"{file}: {instead or 'JSON, not the weights'}")
        part = _open_one(file, kind, size, max_bytes)
        for name in wanted[file]:
            if not isinstance(part.content, dict) or name not in part.content:
                raise CheckpointError(
                    f"{file}: {name[:100]!r} is not in it, although {path.name} says so"
                )
            whole.content[name] = part.content[name]
        whole.size += size
        whole.named |= part.named
    return whole


def _is_tensor(name: Any, value: Any) -> bool:
    """Also for tensors of other kinds, which `_read` refuses by name."""
    odd = (
        isinstance(value, StandIn) and value.name.startswith("torch._") and "_rebuild" in value.name
    )
    return isinstance(name, str) and (odd or isinstance(value, LEAF))


def _check_names(entries: Mapping[Any, Any]) -> None:
    """Refuse more names, or longer ones, than a network has: to compare them would take hours."""
    if len(entries) > _MAX_ENTRIES:
        raise CheckpointError(f"{len(entries):,} names, over the limit of {_MAX_ENTRIES:,}")
    for name in entries:
        if isinstance(name, str) and len(name) > _MAX_NAME:
            raise CheckpointError(
                f"a name of {len(name):,} characters, which begins {short(name)!r}"
            )


def _read(path: Path, leaves: Mapping[str, Any], size: int, max_bytes: int) -> dict[str, Tensor]:
    """The tensors; nothing is read before all sizes were compared with that of the file."""
    total = spans = 0
    limit = min(max_bytes, _MAX_SHARING * size)
    for name, leaf in leaves.items():
        if isinstance(leaf, StandIn):
            raise CheckpointError(
                f"{path}: {short(name)!r} is no plain dense tensor ({leaf.name}); save the weights "
                "unquantised and dense by torch.save"
            )
        if isinstance(leaf, Tensor):
            continue
        total += leaf.bytes
        spans += leaf.span
        # tensors may share memory (tied weights), so their sum may exceed the file, but none alone
        if leaf.bytes > size or max(total, spans) > limit:
            raise CheckpointError(
                f"{path}: {short(name)!r} claims shape {leaf.size}, {leaf.bytes:,} bytes "
                f"({total:,} so far) in a file of {size:,} (limit {limit:,}); it may be there "
                "to exhaust memory"
            )
    return {
        name: leaf if isinstance(leaf, Tensor) else leaf.read() for name, leaf in leaves.items()
    }
