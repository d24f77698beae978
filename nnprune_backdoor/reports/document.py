"""A scan or a purification as one JSON document, which stands for itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..evidence.diagnosis import Diagnosis
from ..version import __version__
from .purified import Purified
from .report import Data, Report, plain, settings_of, versions_used
from .verdict import outcome_of

SCHEMA_VERSION = 1  # rises when an entry goes or changes its meaning; new ones may come any time

TOOL = "nnprune-backdoor"


def document(
    result: Diagnosis | Purified,
    source: Mapping[str, Any] | None = None,
    output: Mapping[str, Any] | None = None,
) -> Data:
    """Everything that is known of a run, as plain data for strict JSON; docs/pipelines.md.

    Args:
        result: what `scan` or `purify` returned.
        source: where model and images came from, as the command line tells it: "checkpoint",
            "checkpoint sha256", "images" and others, all optional. By default that of `result`.
        output: what was written, "folder" and "sha256" of the weights in it.
    """
    if isinstance(result, Diagnosis):
        given = _of_scan(result)
    else:
        given = _of_purification(result)
        source = result.source if source is None else source
        given["output"] = plain(output)
    source = source or {}
    sha256 = given.pop("sha256")
    model = {"file": source.get("checkpoint"), "sha256": source.get("checkpoint sha256")}
    images = {"folder": source.get("images"), "sha256": sha256.get("images")}
    entries = {
        "schema_version": SCHEMA_VERSION,
        "kind": given.pop("kind"),
        "tool": {"name": TOOL, "version": __version__},
        **{name: given.pop(name) for name in ("date", "outcome", "verdict", "cautions")},
        "model": {**model, "tensors_sha256": sha256.get("weights")},
        "images": {**images, "count": given.pop("count")},
        **{name: given.pop(name) for name in ("seed", "settings")},
        "source": source,
        "versions": versions_used(),
    }
    return {**plain(entries), **given}


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


def _of_purification(purified: Purified) -> Data:
    report = Report.of(purified)
    given, selection = report.given, report.selection
    return {
        "kind": "purify",
        "date": given["date"],
        "outcome": outcome_of(purified),
        "verdict": report.verdict,
        "cautions": report.cautions,
        "sha256": given["sha256"],
        "count": given["images"],
        "seed": report.seed,
        "settings": {
            "criterion": {"class": report.criterion["name"], **report.criterion["settings"]},
            "selector": {"class": selection["selector"], **selection["settings"]},
            **{name: given[name] for name in ("silencing", "removal", "repair", "shares")},
            "compute": given["compute"],
            "threads": given["threads"],
        },
        "report": report.to_dict(),
    }
