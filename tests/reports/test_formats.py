"""Documents for other tools, held against the formats' own schemas."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from google.protobuf.json_format import ParseDict
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from torch import nn

from helpers.results import diagnosis, suspicion
from nnprune_backdoor import CleanData, Purified, __version__, purify
from nnprune_backdoor.reports import Report, document
from nnprune_backdoor.reports.cyclonedx import cyclonedx
from nnprune_backdoor.reports.in_toto import in_toto
from nnprune_backdoor.reports.model_card import model_card
from nnprune_backdoor.reports.sarif import sarif
from nnprune_backdoor.selectors import LowestCount

# of OASIS: docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas
SCHEMA = Path(__file__).parent / "schemas" / "sarif-schema-2.1.0.json"
FORMATS = jsonschema.FormatChecker(["uri", "uri-reference", "date-time"])
SARIF = jsonschema.Draft4Validator(json.loads(SCHEMA.read_text()), format_checker=FORMATS)
HOSTILE = '<img src=x onerror=alert(1)> | `x` \u202e"\n# y: [1'
SOURCE = {"checkpoint": f"a b/{HOSTILE}.pth", "checkpoint sha256": "c" * 64, "images": "clean"}
FILES = {"model.safetensors": "d" * 64, "record.json": "e" * 64}
NO_EVIDENCE: dict[str, Any] = {"alarm": False}
UNDECIDED: dict[str, Any] = {"alarm": False, "suspicions": (suspicion(False, universal=0.95),)}
TOO_FEW: dict[str, Any] = {"alarm": True, "cannot_tell": "30 images are too few to tell"}


@pytest.fixture(scope="module")
def done(_trained: nn.Module, clean: CleanData) -> Purified:
    found = purify(_trained, clean, "magnitude", selector=LowestCount(9), progress=False)
    return replace(found, source=SOURCE)


@pytest.fixture(scope="module")
def purification(done: Purified) -> dict[str, Any]:
    return document(done, output={"folder": "out dir", "files": FILES})


def valid_sarif(given: dict[str, Any]) -> Any:
    log = sarif(given)
    assert json.loads(json.dumps(log, allow_nan=False)) == log
    assert [error.message for error in SARIF.iter_errors(log)] == []
    return log["runs"][0]


def test_the_schema_of_sarif_refuses_what_is_none() -> None:
    log = sarif(document(diagnosis(True), SOURCE))
    log["runs"][0]["results"][0]["kind"] = "guilty"
    assert [error.message[:8] for error in SARIF.iter_errors(log)] == ["'guilty'"]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"alarm": True}, [("fail", "error")]),
        (NO_EVIDENCE, []),
        (UNDECIDED, [("open", "none")]),
        (TOO_FEW, [("open", "none")]),
    ],
)
def test_a_scan_as_sarif(given: dict[str, Any], found: list[tuple[str, str]]) -> None:
    result = document(diagnosis(**given), SOURCE)
    run = valid_sarif(result)
    assert [(item["kind"], item["level"]) for item in run["results"]] == found
    assert run["tool"]["driver"]["version"] == __version__
    (artifact,) = run["artifacts"]
    assert artifact["hashes"] == {"sha-256": "c" * 64}
    assert artifact["location"]["uri"].startswith("a%20b/%3Cimg")
    for item in run["results"]:
        place = item["locations"][0]["physicalLocation"]["artifactLocation"]
        assert place == {"uri": artifact["location"]["uri"], "index": 0}
        assert item["ruleId"] == run["tool"]["driver"]["rules"][item["ruleIndex"]]["id"]
    (invocation,) = run["invocations"]
    assert invocation["endTimeUtc"] == "2026-01-02T03:04:05Z"
    first, *cautions = invocation["toolExecutionNotifications"]
    assert (first["level"], first["message"]["text"].lower()) == (
        "note",
        f"{result['verdict']}.".lower(),
    )
    assert len(cautions) == len(result["cautions"])
    properties = run["properties"]
    assert (properties["seed"], properties["schema_version"]) == (0, 1)
    assert properties["images"]["sha256"] == "b" * 64
    assert properties["settings"]["starts"] == 3


@pytest.mark.parametrize(
    ("look", "found"),
    [(0.9, [("fail", "error")]), (0.5, [("open", "none")]), (0.1, []), (None, [])],
)
def test_a_purification_as_sarif(
    done: Purified, look: float | None, found: list[tuple[str, str]]
) -> None:
    details: dict[str, Any] = {}
    if look is not None:
        seen = {"alarm": look >= 0.7, "probability": look, "success": 0.0}
        details = {"diagnosis": diagnosis(True).to_dict(), "repaired": seen}
    result = replace(done, selection=replace(done.selection, details=details))
    run = valid_sarif(document(result, output={"folder": "out dir", "files": FILES}))
    assert [(item["kind"], item["level"]) for item in run["results"]] == found
    written = run["artifacts"][1]
    assert written["hashes"] == {"sha-256": "d" * 64}
    assert written["location"]["uri"] == "out%20dir/model.safetensors"
    for item in run["results"]:
        assert item["locations"][0]["physicalLocation"]["artifactLocation"]["index"] == 1


def test_without_a_source_or_output_it_is_valid_too(done: Purified) -> None:
    bare = replace(done, source={})
    assert valid_sarif(document(bare))["artifacts"] == [
        {"location": {"uri": "model"}, "roles": ["analysisTarget"]}
    ]


def test_a_bill_of_materials_is_valid(done: Purified, purification: dict[str, Any]) -> None:
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    unlabelled = replace(done, source={}, accuracy=None)
    without = document(unlabelled, output={"folder": "out", "files": FILES})
    for given in (purification, without):
        assert validator.validate_str(json.dumps(cyclonedx(given))) is None
    bom = cyclonedx(purification)
    model = bom["metadata"]["component"]
    assert model["hashes"] == [{"alg": "SHA-256", "content": "d" * 64}]
    (ancestor,) = model["pedigree"]["ancestors"]
    assert ancestor["hashes"][0]["content"] == "c" * 64
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert done.accuracy is not None
    assert metrics[1]["value"] == f"{done.accuracy.after.value:.4f}"
    properties = {item["name"]: item["value"] for item in model["properties"]}
    assert properties["nnprune-backdoor:seed"] == "0"
    assert properties["nnprune-backdoor:criterion"] == "Magnitude"
    assert json.loads(properties["nnprune-backdoor:settings"]) == purification["settings"]
    (images,) = bom["components"]
    assert {"name": "nnprune-backdoor:images", "value": "64"} in images["properties"]
    model["modelCard"]["oven"] = 1
    assert validator.validate_str(json.dumps(bom)) is not None, "it would accept anything"
    assert cyclonedx(purification)["serialNumber"] == bom["serialNumber"]


def test_a_statement_is_in_totos(purification: dict[str, Any]) -> None:
    made = in_toto(purification)
    Statement.copy_from_pb(ParseDict(made, statement_pb2.Statement())).validate()
    assert made["_type"] == "https://in-toto.io/Statement/v1"
    assert {s["name"]: s["digest"]["sha256"] for s in made["subject"]} == FILES
    assert made["predicate"] == purification


def test_a_card_keeps_hostile_names_as_text(done: Purified) -> None:
    report = Report.of(done)
    card = model_card(report, arch="test_resnet", sha256="d" * 64)
    metadata, page = card.removeprefix("---\n").split("\n---\n", 1)
    assert "alert" not in metadata
    assert "<img" not in page and "&lt;img" in page
    assert "\n# y" not in page
    assert report.verdict[:40].lower() in page.lower()
    for text in ("d" * 64, "c" * 64, report.given["sha256"]["images"], "Magnitude", "no proof"):
        assert text in page.replace("\\", "")
    assert 'load_purified("folder of this file")' in card
    unnamed = model_card(report, arch=None, sha256="d" * 64)
    assert "model=YourNetwork()" in unnamed
