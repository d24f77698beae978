"""What is written down beside the weights of a purified model: plain JSON, checked on reading."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, DataError
from ..removal.compaction import RemovalReport
from ..reports.purified import Purified
from ..reports.report import Report, plain

FORMAT = 1  # readers take every format up to their own

LIBRARY = "nnprune_backdoor"

RECORD = "record.json"  # its name in the folder

REPORT = "report.json"  # what pages are laid out from

_MAX_RECORD = 64 * 2**20  # bytes


# what a record of format 1 holds, and of which type
_ENTRIES: dict[str, tuple[type, ...]] = {
    "architecture": (dict,),  # "name" of timm's, or null; "arguments" of timm.create_model
    "weights": (dict,),  # "sha256" of the file
    "recipe": (dict,),  # see `Recipe.to_dict`
    "silenced": (dict,),  # site -> channels of the original model
    "silencing": (str,),
    "criterion": (dict,),
    "selector": (dict,),
    "seed": (int,),
    "accuracy": (dict, type(None)),
    "removal": (dict, type(None)),
    "input": (list, type(None)),  # (C, H, W)
    "sha256": (dict,),  # of the tensors of the original model and of the clean data
    "versions": (dict,),
    "seconds": (dict,),
}

# entries that records may lack, written before there were any, and what is read in their place
_LATER: dict[str, tuple[type, ...]] = {
    "source": (dict,),
    "repair": (str,),
    "shares": (list, type(None)),  # of the images: scoring, selecting, measuring
    "compute": (dict, type(None)),  # how the criterion's passes were run, see `Compute`
}

_MISSING: dict[str, Any] = dict.fromkeys(_LATER) | {"source": {}, "repair": "none"}


def read_record(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save_purified` wrote down beside the weights, as plain data; see docs/saving.md.

    Raises:
        CheckpointError: no such record, not JSON, NaN in it, an entry that is missing or of the
            wrong type, or a format newer than this version of the library reads.
    """
    path = Path(folder) / RECORD
    record = _read_json(path)
    if record.get("library") != LIBRARY:
        raise CheckpointError(f"{path}: not a record of a purified model")
    form = record.get("format")
    if type(form) is not int or form < 1:
        raise CheckpointError(f"{path}: expected a format number, got {form!r}")
    if form > FORMAT:
        raise CheckpointError(
            f"{path}: format {form}, but this version reads up to {FORMAT}; upgrade {LIBRARY}"
        )
    for name, types in _ENTRIES.items():
        _check_entry(path, record, name, types)
    for name, types in _LATER.items():
        _check_entry(path, {**_MISSING, **record}, name, types)
    _check_entry(path, record["architecture"], "name", (str, type(None)))
    _check_entry(path, record["architecture"], "arguments", (dict,))
    _check_entry(path, record["weights"], "sha256", (str,))
    return record


def read_report(folder: str | os.PathLike[str]) -> Report:
    """The report that `save_purified` wrote beside the weights, for `to_html` and `to_markdown`.

    Raises:
        CheckpointError: there is none (the folder was written by an older version), it is no
            strict JSON, or not a report that this version reads.
    """
    path = Path(folder) / REPORT
    try:
        return Report.from_dict(_read_json(path))
    except DataError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """An object of strict JSON; raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; is the folder one that save_purified wrote?")
    if path.stat().st_size > _MAX_RECORD:
        raise CheckpointError(f"{path}: over {_MAX_RECORD:,} bytes, which no record needs")
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"), parse_constant=_finite, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged, or no plain JSON ({error})") from error
    if type(content) is not dict:
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _check_entry(path: Path, holder: dict[str, Any], name: str, types: tuple[type, ...]) -> None:
    if name not in holder or type(holder[name]) not in types:
        wanted = " or ".join(t.__name__ for t in types)
        found = type(holder[name]).__name__ if name in holder else "nothing"
        raise CheckpointError(f"{path}: expected {name!r} to be {wanted}, got {found}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def record_of(
    purified: Purified,
    report: dict[str, Any],
    arch: str | None,
    arguments: dict[str, Any],
    sha256: str,
) -> dict[str, Any]:
    """The record of a model whose weights file has this SHA-256; see `_ENTRIES`.

    `report` is what `Purified.to_dict` gives.
    """
    entries = {
        "architecture": {"name": arch, "arguments": arguments},
        "weights": {"sha256": sha256},
        "recipe": purified.recipe.to_dict(),
        "silenced": purified.selection.by_site(),
        "silencing": purified.silencing,
        "criterion": report["criterion"],
        "selector": report["selection"],
        "seed": purified.seed,
        "accuracy": report["accuracy"],
        "removal": None if purified.removal is None else _removal_of(purified.removal),
        "input": report["given"]["shape"],
        "sha256": report["given"]["sha256"],
        "versions": report["versions"],
        "seconds": report["seconds"],
        "source": report["source"],
        "repair": purified.given.repair if purified.repaired else "none",  # what was done
        "shares": report["given"]["shares"],
        "compute": report["given"]["compute"],
    }
    assert entries.keys() == _ENTRIES.keys() | _LATER.keys()
    return {"library": LIBRARY, "format": FORMAT, **plain(entries)}


def written(record: dict[str, Any]) -> str:
    """The text of a record: one line an entry."""
    lines = (f"{json.dumps(name)}: {json.dumps(e, allow_nan=False)}" for name, e in record.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _removal_of(report: RemovalReport) -> dict[str, Any]:
    """Before and after, and what stayed: reason -> site -> channels."""
    stayed: dict[str, dict[str, list[int]]] = {}
    for (site, channel), why in report.silenced.items():
        stayed.setdefault(why, {}).setdefault(site, []).append(channel)
    return {
        "removed": len(report.removed),
        "channels": report.channels,
        "only_silenced": stayed,
        "drift": report.drift,
        "before": report.before,
        "after": report.after,
    }
