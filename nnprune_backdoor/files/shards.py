"""Folders as hubs have them: a weights file, or several with an index, beside config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .file_kinds import JSON, kind_of

# what a folder may hold, most wanted first
_USUAL = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

_SHARD = re.compile(r".+-\d{5}-of-(\d{5})\.(safetensors|bin|pt|pth)", re.IGNORECASE)

# entries of timm's configuration that say how images are prepared -> whether a value is one
_PREPROCESSING: dict[str, Callable[[Any], bool]] = {
    "input_size": lambda v: _numbers(v, int) and len(v) == 3,
    "mean": lambda v: _numbers(v, int, float) and all(-1e6 < n < 1e6 for n in v),
    "std": lambda v: _numbers(v, int, float) and all(0 < n < 1e6 for n in v),
    "interpolation": lambda v: v in ("bilinear", "bicubic", "nearest"),
    "crop_pct": lambda v: type(v) in (int, float),
}

_MAX_JSON = 64 * 2**20  # bytes

_MAX_SHARDS = 1000


@dataclass(frozen=True)
class Index:
    """Which file of several holds a tensor.

    Attributes:
        files: In the order of their names.
        places: Name of a tensor -> the file that holds it.
    """

    files: tuple[Path, ...]
    places: Mapping[str, Path]


def usual_file(folder: Path) -> Path:
    """The weights file, or the index of several, in a folder; CheckpointError if there is none."""
    for name in _USUAL:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        f"{folder}: a folder without {', '.join(_USUAL[:3])}; give the file that holds the weights"
    )


def files_of(path: Path) -> list[Path]:
    """The files that hold the weights of a model: one, or those of an index after it."""
    path = usual_file(path) if path.is_dir() else path
    return [path, *read_index(path).files] if kind_of(path)[0] == JSON else [path]


def hub_config(folder: Path) -> dict[str, Any]:
    """What the config.json of a timm model on a hub says; empty where there is none.

    Returns:
        "architecture", its timm name; "model_args" of `timm.create_model`; and "pretrained_cfg",
        the preprocessing; each only if it is there and has the right form.
    """
    path = folder / "config.json"
    if not path.is_file() or path.stat().st_size > _MAX_JSON:
        return {}
    try:
        given = _json(path)
    except CheckpointError:  # it lies beside the weights, and need not be timm's
        return {}
    if not isinstance(given.get("architecture"), str):
        return {}
    config: dict[str, Any] = {"architecture": given["architecture"]}
    for name in ("model_args", "pretrained_cfg"):
        config[name] = entries if isinstance(entries := given.get(name), dict) else {}
    config["pretrained_cfg"] = {
        name: value
        for name, value in config["pretrained_cfg"].items()
        if name in _PREPROCESSING and _PREPROCESSING[name](value)
    }
    return config


def read_index(path: Path) -> Index:
    """The index of a model in several files.

    Raises:
        CheckpointError: it is no such index, or names files that do not lie beside it.
    """
    if path.stat().st_size > _MAX_JSON:
        raise CheckpointError(f"{path}: over {_MAX_JSON:,} bytes, more than any index needs")
    given = _json(path).get("weight_map")
    if not isinstance(given, dict) or not given:
        raise CheckpointError(
            f"{path}: JSON, not the weights; if it is an error message, get the file again, and if "
            "it is a configuration, give the weights beside it"
        )
    places = {name: path.parent / _plain_name(path, file) for name, file in given.items()}
    files = tuple(sorted(set(places.values())))
    if len(files) > _MAX_SHARDS:
        raise CheckpointError(f"{path}: {len(files):,} files, over the limit of {_MAX_SHARDS:,}")
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{path}: {file.name!r} is missing; get all files of the model")
    return Index(files, places)


def refuse_shard(path: Path) -> None:
    """Raise CheckpointError for one of several files of a model."""
    match = _SHARD.fullmatch(path.name)
    if match and int(match[1]) > 1:
        raise CheckpointError(
            f"{path}: one of {int(match[1])} files that hold a model; give the folder, or the "
            "file ending in .index.json beside it"
        )


def _numbers(value: Any, *kinds: type) -> bool:
    return isinstance(value, list) and all(type(item) in kinds for item in value)


def _plain_name(path: Path, name: Any) -> str:
    if type(name) is not str or name != Path(name).name or not _SHARD.fullmatch(name):
        raise CheckpointError(
            f"{path}: it names {str(name)[:100]!r}, which is no part of a model beside it"
        )
    return name


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: no readable JSON ({str(error)[:100]})") from error
    return content if isinstance(content, dict) else {}
