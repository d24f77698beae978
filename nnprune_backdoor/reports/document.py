"""A scan or a purification as one JSON document, which stands for itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..evidence.diagnosis import Diagnosis
from ..version import __version__
from .plain import plain, settings_of
from .purified import Purified
from .report import Data, Report, versions_used
from .verdict import outcome_of

SCHEMA_VERSION = 1  # rises when an entry goes or changes its meaning; new ones may come any time

TOOL = "nnprune-backdoor"

_HOW = ("silencing", "removal", "repair", "shares", "compute", "threads")  # old reports lack some


def document(
    result: Diagnosis | Purified | Report,
    source: Mapping[str, Any] | None = None,
    output: Mapping[str, Any] | None = None,
) -> Data:
    """Everything that is known of a run, as plain data for strict JSON; docs/pipelines.md.

    Args:
        result: what `scan` or `purify` returned, or the report of a purification.
        source: where model and images came from, as the command line tells it: "checkpoint",
            "checkpoint sha256", "images" and others, all optional. By default that of `result`.
        output: what was written: "folder", and "files", name -> SHA-256.
    """
    if isinstance(result, Diagnosis):
        given = _of_scan(result)
    else:
        report = Report.of(result) if isinstance(result, Purified) else result
        given = _of_purification(report)
        source = report.source if source is None else source
        given["output"] = plain(output)
    source = source or {}
    sha256 = given.pop("sha256")
    model = {"file": source.get("checkpoint"), "sha256": source.get("checkpoint sha256")}
    images = {"folder": source.get("images"), "sha256": sha256.get("images")}
    entries = {
        **stamp(given.pop("kind"), given.pop("date")),
        **{name: given.pop(name) for name in ("outcome", "verdict", "cautions")},
        "model": {**model, "tensors_sha256": sha256.get("weights")},
        "images": {**images, "count": given.pop("count")},
        **{name: given.pop(name) for name in ("seed", "settings")},
        "source": source,
        "versions": versions_used(),
    }
    return {**plain(entries), **given}


def stamp(kind: str, date: str | None) -> Data:
    """What every document begins with.

    Args:
        kind: the command whose result it is.
        date: as ISO 8601; None: not known.
    """
    tool = {"name": TOOL, "version": __version__}
    return {"schema_version": SCHEMA_VERSION, "kind": kind, "tool": tool, "date": date}


def _of_scan(diagnosis: Diagnosis) -> Data:
    searched = [perturbation.target for perturbation in diagnosis.perturbations]
    return {
        "kind": "scan",
        "date": diagnosis.date,
        "outcome": diagnosis.outcome,
        "verdict": diagnosis.sentence,
        "cautions": diagnosis.cautions,
        "sha256": diagnosis.sha256,
        "count": diagnosis.images,
        "seed": diagnosis.seed,
        "settings": {
            "labels": searched,
            "silencing": diagnosis.silencing,
            **settings_of(diagnosis.settings),
        },
        "diagnosis": plain(diagnosis.to_dict()),
    }


def _of_purification(report: Report) -> Data:
    given, selection = report.given, report.selection
    return {
        "kind": "purify",
        "date": given.get("date"),
        "outcome": outcome_of(selection["details"], selection["neurons"]),
        "verdict": report.verdict,
        "cautions": report.cautions,
        "sha256": given["sha256"],
        "count": given["images"],
        "seed": report.seed,
        "settings": {
            "criterion": {"class": report.criterion["name"], **report.criterion["settings"]},
            "selector": {"class": selection["selector"], **selection["settings"]},
            **{name: given.get(name) for name in _HOW},
        },
        "report": report.to_dict(),
    }
