"""The logistic function of `evidence.probability`, and how it does on architectures left out.

    python -m benchmarks.evidence.calibration   # -> its results and page

results/diagnosis*.json hold scans of 101 networks by an earlier version, which searched a trigger
and a perturbation for every label; what `scan` looks at now is taken from them. Per label: the log
of its trigger's size below the median of three others, the success of its universal perturbation,
and its restoration. Classes weigh alike, so that the probability is that of a network which is
backdoored or benign with equal odds.
"""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import log_loss, roc_auc_score

from benchmarks.render import DOCS, RESULTS, fill

Array = NDArray[np.float64]
ALARM = 0.7
CANDIDATES, COMPARED = 2, 3  # as `Scan`'s
RIDGE = 1.0  # on standardised weights


def rows() -> list[dict[str, Any]]:
    """All networks once; of a network that was scanned twice, the first."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(RESULTS.glob("diagnosis*.json")):
        for row in json.loads(file.read_text()):
            found.setdefault(row["name"], row)
    return list(found.values())


def features(row: dict[str, Any]) -> dict[int, list[float]]:
    """Label -> size, universal and restoration, for the labels that `scan` would suspect."""
    kinds = {
        kind: {int(label): value for label, value in found["by_label"].items()}
        for kind, found in row["evidence"].items()
    }
    size = {
        trigger["target"]: trigger["norm"] / 1024 if trigger["success"] >= 0.75 else 1.0
        for trigger in row["triggers"]
    }
    ranked = sorted(kinds["universal"], key=lambda label: -kinds["universal"][label])
    first, rest = ranked[:CANDIDATES], ranked[CANDIDATES:]
    others = [rest[round(i * (len(rest) - 1) / (COMPARED - 1))] for i in range(COMPARED)]
    middle = statistics.median(math.log(size[label]) for label in others)
    restored = kinds.get("restoration", {})
    return {
        label: [middle - math.log(size[label]), kinds["universal"][label], restored.get(label, 0.0)]
        for label in first
    }


def fit(found: list[dict[int, list[float]]], truth: Array) -> tuple[Array, float]:
    """Weights (3,) and constant; each network counts by the label that it suspects most."""
    weights, constant = np.array([1.0, 0.0, 0.0]), 0.0
    for _ in range(7):
        values = np.array([each[suspect(each, weights)] for each in found])
        weights, constant = _logistic(values, truth)
    return weights, constant


def suspect(found: dict[int, list[float]], weights: Array) -> int:
    return max(found, key=lambda label: float(np.dot(weights, found[label])))


def _logistic(values: Array, truth: Array) -> tuple[Array, float]:
    """Newton's method on the cross-entropy, with a ridge on all but the constant."""
    mean, spread = values.mean(0), values.std(0)
    inputs = np.c_[(values - mean) / spread, np.ones(len(values))]
    balance = np.where(truth == 1, 0.5 / truth.mean(), 0.5 / (1 - truth.mean()))
    ridge = RIDGE * np.diag([1.0] * values.shape[1] + [0.0])
    found = np.zeros(inputs.shape[1])
    for _ in range(15):
        given = 1 / (1 + np.exp(-inputs @ found))
        slope = inputs.T @ (balance * (given - truth)) + ridge @ found
        curve = (inputs * (balance * given * (1 - given))[:, None]).T @ inputs + ridge
        found = found - np.linalg.solve(curve, slope)
    weights = found[:-1] / spread
    return weights, float(found[-1] - weights @ mean)


def left_out(networks: list[dict[str, Any]], found: list[dict[int, list[float]]]) -> list[Any]:
    """[name, backdoored, probability, whether the label is right], each fitted on the others'."""
    truth = np.array([float(row["attack"] is not None) for row in networks])
    archs = np.array([row["arch"] for row in networks])
    judged = []
    for arch in dict.fromkeys(archs):
        inside = archs != arch
        weights, constant = fit([found[i] for i in np.flatnonzero(inside)], truth[inside])
        for i in np.flatnonzero(~inside):
            label = suspect(found[i], weights)
            odds = float(np.dot(weights, found[i][label]) + constant)
            right = label == networks[i]["target"] if truth[i] else None
            judged.append([networks[i]["name"], bool(truth[i]), 1 / (1 + math.exp(-odds)), right])
    return judged


def rates(judged: list[Any]) -> dict[str, Any]:
    """AUROC, cross-entropy, and what the alarm gets right."""
    truth, given = [row[1] for row in judged], [row[2] for row in judged]
    bad, good = ([row for row in judged if row[1] is kind] for kind in (True, False))
    raised = [row for row in bad if row[2] >= ALARM]
    return {
        "backdoored": len(bad),
        "benign": len(good),
        "auroc": round(float(roc_auc_score(truth, given)), 3) if bad and good else None,
        "cross_entropy": round(float(log_loss(truth, given, labels=[False, True])), 3),
        "detected": len(raised),
        "label_right": sum(bool(row[3]) for row in raised),
        "false_alarms": [row[0] for row in good if row[2] >= ALARM],
        "missed": [row[0] for row in bad if row[2] < ALARM],
    }


def rates_table(parts: dict[str, dict[str, Any]], first: str) -> str:
    """A line for each part, name -> what `rates` gives."""
    lines = [
        f"| {first} | backdoored, benign | AUROC | cross-entropy | found | label right | missed "
        "| false alarms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in parts.items():
        cells = [
            name,
            f"{found['backdoored']}, {found['benign']}",
            "" if found["auroc"] is None else f"{found['auroc']:.3f}",
            f"{found['cross_entropy']:.3f}",
            str(found["detected"]),
            str(found["label_right"]),
            ", ".join(found["missed"]) or "none",
            ", ".join(found["false_alarms"]) or "none",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    networks = rows()
    found = [features(row) for row in networks]
    truth = np.array([float(row["attack"] is not None) for row in networks])
    weights, constant = fit(found, truth)
    chosen = np.array([each[suspect(each, weights)] for each in found])
    middle = (chosen[truth == 0].mean(0) + chosen[truth == 1].mean(0)) / 2
    judged = left_out(networks, found)
    archs = {row["name"]: row["arch"] for row in networks}
    result = {
        "kinds": ["relative size", "universal", "restoration"],
        "weights": weights.round(3).tolist(),
        "middle": middle.round(3).tolist(),
        "start": round(constant + float(weights @ middle), 3),
        "left out": {
            "all": rates(judged),
            **{
                arch: rates([row for row in judged if archs[row[0]] == arch])
                for arch in dict.fromkeys(archs.values())
            },
        },
    }
    (RESULTS / "calibration.json").write_text(json.dumps(result, indent=1) + "\n")
    fill(DOCS / "diagnosis.md", "calibration", rates_table(result["left out"], "left out"))


if __name__ == "__main__":
    main()
