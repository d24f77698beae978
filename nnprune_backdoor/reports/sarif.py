"""A run as a SARIF 2.1.0 log, which code-scanning pages show.

OASIS Standard "Static Analysis Results Interchange Format (SARIF) Version 2.1.0", 2020.
"""

from __future__ import annotations

import urllib.parse
from typing import Any

from ..evidence.probability import Outcome
from .report import Data
from .sections import sentence

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"

_RULES: dict[str, Data] = {
    "scan": {
        "id": "backdoor-evidence",
        "name": "EvidenceOfABackdoor",
        "shortDescription": {"text": "The model shows evidence of a backdoor."},
        "fullDescription": {
            "text": "Small pictures or patches, recovered from clean images, send images to one "
            "label as a backdoor's trigger would. Networks without a backdoor can show this too, "
            "and a backdoor of another kind leaves no such evidence."
        },
        "defaultConfiguration": {"level": "error"},
    },
    "purify": {
        "id": "backdoor-evidence-left",
        "name": "EvidenceOfABackdoorLeft",
        "shortDescription": {"text": "The purified model still shows evidence of a backdoor."},
        "fullDescription": {
            "text": "The selector looked for evidence in the model that was written, and found "
            "some. A backdoor of another kind leaves no such evidence."
        },
        "defaultConfiguration": {"level": "error"},
    },
}


def sarif(document: Data) -> Data:
    """The log with one run, from a document of `reports.document`.

    Evidence is a result of level "error". Where it cannot be told, there is a result of kind
    "open". No evidence, and none looked for, is no result. The verdict and the cautions are
    notifications of the run, whatever came out.
    """
    rule = _RULES[document["kind"]]
    driver = {**document["tool"], "rules": [rule]}
    shared = ("schema_version", "date", "outcome", "model", "images", "seed", "settings")
    run = {
        "tool": {"driver": driver},
        "invocations": [_invocation(document)],
        "artifacts": _artifacts(document),
        "results": _results(document, rule["id"]),
        "properties": {name: document[name] for name in shared},
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _invocation(document: Data) -> Data:
    when = "startTimeUtc" if document["kind"] == "purify" else "endTimeUtc"
    notes = [("note", document["verdict"]), *(("warning", c) for c in document["cautions"])]
    return {
        "executionSuccessful": True,
        when: document["date"],
        "toolExecutionNotifications": [
            {"level": level, "message": {"text": sentence(text)}} for level, text in notes
        ],
    }


def _artifacts(document: Data) -> list[Data]:
    """The model that was given and, of a purification, the one that was written."""
    given = document["model"]
    files = [(given["file"], given["sha256"])]
    if output := document.get("output"):
        name = "model.safetensors"
        files.append((f"{output['folder']}/{name}", output["files"].get(name)))
    return [
        {
            "location": {"uri": urllib.parse.quote(name or "model")},
            "roles": ["analysisTarget"],
            **({"hashes": {"sha-256": sha256}} if sha256 else {}),
        }
        for name, sha256 in files
    ]


def _results(document: Data, rule: str) -> list[Data]:
    outcome = document["outcome"]
    if outcome not in (Outcome.EVIDENCE, Outcome.UNKNOWN):
        return []
    found = outcome == Outcome.EVIDENCE
    artifacts = _artifacts(document)
    place = {"uri": artifacts[-1]["location"]["uri"], "index": len(artifacts) - 1}
    result: dict[str, Any] = {
        "ruleId": rule,
        "ruleIndex": 0,
        "kind": "fail" if found else "open",
        "level": "error" if found else "none",
        "message": {"text": sentence(document["verdict"])},
        "locations": [{"physicalLocation": {"artifactLocation": place}}],
        "partialFingerprints": {"tensors/v1": document["model"]["tensors_sha256"]},
    }
    return [result]
