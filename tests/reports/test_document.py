"""The JSON document of a run: all that identifies it, for scan and purify alike."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from helpers.results import diagnosis, suspicion
from nnprune_backdoor import CleanData, Purified, __version__, purify
from nnprune_backdoor.evidence import Scan
from nnprune_backdoor.evidence.probability import Outcome
from nnprune_backdoor.reports import Report, document
from nnprune_backdoor.selectors import LowestCount
from nnprune_backdoor.triggers import Inversion, UniversalPerturbation
from nnprune_backdoor.utils.fingerprint import fingerprint

SOURCE = {"checkpoint": "a.pth", "checkpoint sha256": "c" * 64, "images": "clean", "arch": "x"}
FILES = {"model.safetensors": "d" * 64}
IDENTITY = {
    "schema_version", "kind", "tool", "date", "outcome", "verdict", "cautions", "model", "images",
    "seed", "settings", "source", "versions",
}  # fmt: skip


@pytest.fixture(scope="module")
def done(_trained: nn.Module, clean: CleanData) -> Purified:
    return purify(_trained, clean, "magnitude", selector=LowestCount(9), seed=3, progress=False)


def test_a_purification_is_identified(done: Purified, clean: CleanData, trained: nn.Module) -> None:
    found = document(replace(done, source=SOURCE), output={"folder": "out", "files": FILES})
    assert found == json.loads(json.dumps(found, allow_nan=False))
    assert found.keys() == IDENTITY | {"report", "output"}
    assert (found["kind"], found["schema_version"], found["seed"]) == ("purify", 1, 3)
    assert found["tool"] == {"name": "nnprune-backdoor", "version": __version__}
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", found["date"])
    assert found["model"] == {
        "file": "a.pth",
        "sha256": "c" * 64,
        "tensors_sha256": fingerprint(trained.state_dict()),
    }
    images = fingerprint({"images": clean.images})
    assert found["images"] == {"folder": "clean", "sha256": images, "count": 64}
    assert found["settings"]["criterion"]["class"] == "Magnitude"
    assert found["settings"]["selector"] == {"class": "LowestCount", "count": 9}
    assert found["output"]["files"] == FILES
    assert found["outcome"] == "not looked for"
    assert found["report"]["verdict"] == found["verdict"]


def test_without_a_source_the_files_are_not_known(done: Purified) -> None:
    found = document(done)
    assert found["model"]["file"] is found["model"]["sha256"] is found["output"] is None
    assert re.fullmatch("[0-9a-f]{64}", found["model"]["tensors_sha256"])


@pytest.mark.slow
def test_a_scan_has_the_hashes_of_what_it_saw(trained: nn.Module, clean: CleanData) -> None:
    quick = Scan(
        search=Inversion(steps=2), universal=UniversalPerturbation(steps=2), starts=1, screened=2
    )
    result = quick(trained, clean, seed=5)
    found = document(result, SOURCE)
    assert found == json.loads(json.dumps(found, allow_nan=False))
    assert found.keys() == IDENTITY | {"diagnosis"}
    assert found["model"]["tensors_sha256"] == fingerprint(trained.state_dict())
    assert found["images"]["sha256"] == fingerprint({"images": clean.images})
    assert (found["kind"], found["seed"], found["images"]["count"]) == ("scan", 5, 64)
    assert found["settings"]["starts"] == 1
    assert found["settings"]["search"]["steps"] == 2
    assert found["diagnosis"]["cannot_tell"] == found["cautions"][0]
    assert found["outcome"] == "cannot tell"


OUTCOMES: list[tuple[dict[str, Any], Outcome, str]] = [
    ({"alarm": True}, Outcome.EVIDENCE, "evidence of a backdoor with target 1"),
    (
        {"alarm": False, "suspicions": (suspicion(False, universal=0.95),)},
        Outcome.UNKNOWN,
        "undecided: probability 0.40",
    ),
    ({"alarm": True, "cannot_tell": "too few"}, Outcome.UNKNOWN, "cannot tell whether there is a "),
    (
        {"alarm": False},
        Outcome.NONE,
        "no evidence of the kinds tested",
    ),
]


@pytest.mark.parametrize(("given", "outcome", "said"), OUTCOMES)
def test_the_first_line_of_a_scan(given: dict[str, Any], outcome: Outcome, said: str) -> None:
    found = diagnosis(**given)
    first = found.summary().splitlines()[0]
    assert first.startswith(f"verdict    {said}")
    assert "30 clean images" in first and "the model was not changed" in first
    assert found.outcome == document(found)["outcome"] == outcome
    assert document(found)["verdict"] == first.removeprefix("verdict    ")


@pytest.mark.parametrize(
    ("look", "outcome"),
    [(0.9, Outcome.EVIDENCE), (0.5, Outcome.UNKNOWN), (0.1, Outcome.NONE), (None, None)],
)
def test_what_a_purification_says_of_a_backdoor(
    done: Purified, look: float | None, outcome: Outcome | None
) -> None:
    """The last look decides, not the scan of the model as given."""
    details: dict[str, Any] = {"diagnosis": diagnosis(True).to_dict()}
    if look is not None:
        details["repaired"] = {"alarm": look >= 0.7, "probability": look, "success": 0.0}
    result = replace(done, selection=replace(done.selection, details=details))
    assert document(result)["outcome"] == (outcome or Outcome.UNKNOWN)
    assert document(done)["outcome"] == Outcome.NOT_SOUGHT


def test_the_first_line_of_a_purification(done: Purified) -> None:
    first = done.summary().splitlines()[0]
    assert first.startswith("verdict    a backdoor was not looked for; 9 of ")
    assert "neurons were silenced" in first and "clean accuracy " in first
    assert first.endswith("none of this proves that no backdoor is left")
    report = Report.of(done)
    assert report.verdict == first.removeprefix("verdict    ")
    old = {k: v for k, v in report.to_dict().items() if k != "verdict"}
    assert Report.from_dict(old).verdict == "", "reports written before have none"
