"""The record beside the weights of a purified model: plain JSON, checked when it is read."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, DataError
from ..removal.recipe import Recipe
from ..removal.report import RemovalReport
from ..reports.plain import plain
from ..reports.purified import Purified
from ..reports.report import Report
from .strict_json import read_json
from .transformers_models import CONFIG, PROCESSOR

FORMAT = 2  # of the records written; records of lower formats, without heads, can be read too

LIBRARY = "nnprune_backdoor"

RECORD = "record.json"  # file name

WEIGHTS = "model.safetensors"  # file name

REPORT = "report.json"  # file name; the report's pages are made from it

CARD = "README.md"  # file name

FILES = (WEIGHTS, RECORD, REPORT, CARD, CONFIG, PROCESSOR)  # transformers reads the last two

_WHOSE = "a folder that save_purified wrote"

# entries of a record and their types
_ENTRIES: dict[str, tuple[type, ...]] = {
    "architecture": (dict,),  # "name" or null, and "arguments"; see `architecture.create`
    "weights": (dict,),  # "sha256" of the weights file
    "recipe": (dict,),  # see `Recipe.to_dict`
    "silenced": (dict,),  # site -> channels, or attention heads, of the original model
    "silencing": (str,),
    "criterion": (dict,),
    "selector": (dict,),
    "seed": (int,),
    "accuracy": (dict, type(None)),
    "removal": (dict, type(None)),
    "input": (list, type(None)),  # (C, H, W)
    "sha256": (dict,),  # of the original model's tensors, and of the clean images
    "versions": (dict,),
    "seconds": (dict,),
    "source": (dict,),
    "repair": (str,),
    "shares": (list,),  # of the clean images: scoring, selecting, measuring
    "compute": (dict,),  # see `Compute`; "threads", number of CPU threads, is missing in old ones
}


def read_record(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The record that `save_purified` wrote beside the weights, as plain data.

    docs/saving.md describes its entries.

    Args:
        folder: the folder that `save_purified` wrote.

    Raises:
        CheckpointError: there is no record, it is not strict JSON, an entry is missing or has the
            wrong type, or its format is newer than this version of the library.
    """
    path = Path(folder) / RECORD
    record = read_json(path, _WHOSE)
    if record.get("library") != LIBRARY:
        raise CheckpointError(
            f"{path}: not a record of a purified model; give a folder that save_purified wrote"
        )
    version = record.get("format")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path}: expected a format number, got {version!r}")
    if version > FORMAT:
        raise CheckpointError(
            f"{path}: format {version}, but this version reads up to {FORMAT}; upgrade {LIBRARY}"
        )
    for name, types in _ENTRIES.items():
        _check_entry(path, record, name, types)
    _check_entry(path, record["architecture"], "name", (str, type(None)))
    _check_entry(path, record["architecture"], "arguments", (dict,))
    _check_entry(path, record["weights"], "sha256", (str,))
    return record


def hashes_in(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of the files that `save_purified` writes, those that are there."""
    return {name: sha256_of(folder / name) for name in FILES if (folder / name).is_file()}


def sha256_of(path: Path) -> str:
    """Of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def purified_folder(path: Path) -> Path | None:
    """The folder of a purified model, given it or the weights in it; None for all else."""
    folder = path if path.is_dir() else path.parent
    if path not in (folder, folder / WEIGHTS) or not (folder / RECORD).is_file():
        return None
    if path == folder:
        return folder
    try:
        return folder if read_json(folder / RECORD, _WHOSE).get("library") == LIBRARY else None
    except CheckpointError:
        return None


def read_report(folder: str | os.PathLike[str]) -> Report:
    """The report that `save_purified` wrote beside the weights.

    Args:
        folder: the folder that `save_purified` wrote.

    Raises:
        CheckpointError: there is no report, because an older version wrote the folder; it is not
            strict JSON; or this version cannot read it.
    """
    path = Path(folder) / REPORT
    try:
        return Report.from_dict(read_json(path, _WHOSE))
    except DataError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_entry(path: Path, holder: dict[str, Any], name: str, types: tuple[type, ...]) -> None:
    if name not in holder or type(holder[name]) not in types:
        expected = " or ".join(t.__name__ for t in types)
        given = type(holder[name]).__name__ if name in holder else "nothing"
        raise CheckpointError(f"{path}: expected {name!r} to be {expected}, got {given}")


def record_of(
    purified: Purified,
    report: dict[str, Any],
    arch: str | None,
    arguments: dict[str, Any],
    *,
    sha256: str,
    recipe: Recipe,
) -> dict[str, Any]:
    """The record of a purified model; see `_ENTRIES`.

    Args:
        report: `Purified.to_dict()`.
        arch: name of the original architecture, or None.
        arguments: what it was made with.
        sha256: of the weights file.
        recipe: from that architecture to the purified model.
    """
    entries = {
        "architecture": {"name": arch, "arguments": arguments},
        "weights": {"sha256": sha256},
        "recipe": recipe.to_dict(),
        "silenced": purified.selection.by_site(),
        "silencing": purified.silencing,
        "criterion": report["criterion"],
        "selector": report["selection"],
        "seed": purified.seed,
        "accuracy": report["accuracy"],
        "removal": None if purified.removal is None else _removal_data(purified.removal),
        "input": report["given"]["shape"],
        "sha256": report["given"]["sha256"],
        "versions": report["versions"],
        "seconds": report["seconds"],
        "source": report["source"],
        "repair": purified.given.repair if purified.repaired else "none",  # what was done
        "shares": report["given"]["shares"],
        "compute": {**report["given"]["compute"], "threads": report["given"]["threads"]},
    }
    assert entries.keys() == _ENTRIES.keys()
    date = report["given"]["date"]  # records written before have none
    return {"library": LIBRARY, "format": FORMAT, "date": date, **plain(entries)}


def to_json(record: dict[str, Any]) -> str:
    """The text of a record or report, one line for each entry."""
    lines = (f"{json.dumps(name)}: {json.dumps(e, allow_nan=False)}" for name, e in record.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _removal_data(report: RemovalReport) -> dict[str, Any]:
    """Sizes before and after, and neurons that were only silenced: reason -> site -> channels."""
    only_silenced: dict[str, dict[str, list[int]]] = {}
    for (site, channel), reason in report.silenced.items():
        only_silenced.setdefault(reason, {}).setdefault(site, []).append(channel)
    return {
        "removed": len(report.removed),
        "channels": report.channels,
        "only_silenced": only_silenced,
        "drift": report.drift,
        "before": report.before,
        "after": report.after,
    }
