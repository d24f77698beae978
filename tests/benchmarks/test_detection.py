"""The rates that a scan is judged by, and what its calibration reads from earlier scans."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.evidence.calibration import features, fit, rates, rows, suspect
from benchmarks.evidence.detection import judged, networks, table
from benchmarks.render import RESULTS
from nnprune_backdoor.evidence import Suspicion


def test_rates_by_hand() -> None:
    judgements = [
        ["a", True, 0.9, True],
        ["b", True, 0.8, False],
        ["c", True, 0.5, None],
        ["d", False, 0.75, None],
        ["e", False, 0.1, None],
    ]
    found = rates(judgements)
    assert (found["backdoored"], found["benign"]) == (3, 2)
    assert (found["detected"], found["label_right"]) == (2, 1)
    assert (found["missed"], found["false_alarms"]) == (["c"], ["d"])
    assert found["auroc"] == pytest.approx(5 / 6, abs=1e-3)
    losses = [-math.log(p) for p in (0.9, 0.8, 0.5, 0.25, 0.9)]
    assert found["cross_entropy"] == pytest.approx(sum(losses) / 5, abs=1e-3)
    assert rates(judgements[:3])["auroc"] is None


def test_the_fit_is_the_one_on_record() -> None:
    stored = json.loads((RESULTS / "calibration.json").read_text())
    scans = rows()
    found = [features(row) for row in scans]
    truth = np.array([float(row["attack"] is not None) for row in scans])
    weights, constant = fit(found, truth)
    assert weights == pytest.approx(stored["weights"], abs=1e-3)
    size, universal, restored = found[0][suspect(found[0], weights)]
    odds = float(np.dot(weights, [size, universal, restored]) + constant)
    made = Suspicion.of(0, universal=universal, size=math.exp(-size), restored=restored)
    assert made.probability == pytest.approx(1 / (1 + math.exp(-odds)), abs=0.02)


def test_networks_are_known_by_the_names_of_their_files(tmp_path: Path) -> None:
    names = ("vgg-badnets-short-2", "regnetx-benign-short-1", "vgg-nothing-short-1", "other")
    for name in names:
        (tmp_path / f"{name}.safetensors").touch()
    assert [member.name for member, _ in networks([tmp_path])] == [names[1], names[0]]


def test_what_cannot_be_told_counts_as_one_half_and_is_shown() -> None:
    first = {"label": 3, "universal": 0.9, "relative size": 0.1, "restoration": 0.5}
    row = {
        "name": "vgg-badnets-short-1", "arch": "vgg", "attack": "badnets", "target": 3,
        "cpu_seconds": 9.0, "probability": None, "suspicions": [first],
    }  # fmt: skip
    assert judged(row) == ["vgg-badnets-short-1", True, 0.5, True]
    shown = table([row])
    assert "| vgg-badnets-short-1 | 3 | cannot tell | 3 | 0.9 | 0.1 | 0.5 | 9 |" in shown
    assert "missed" in shown
