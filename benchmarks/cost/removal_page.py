"""docs/results/removal_sizes.md from what removal_sizes.py measured."""

from __future__ import annotations

import statistics
from typing import Any


def _change(pair: list[float], unit: float, name: str) -> str:
    old, new = pair
    return f"{old / unit:.3g} -> {new / unit:.3g} {name} ({100 * (new / old - 1):+.1f} %)"


def _removed(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [row["model"], row["error"], *[""] * 5]
    return [
        row["model"],
        f"{row['silenced']} of {row['neurons']}",
        f"{row['removed']} ({row['removed'] / row['silenced']:.0%})",
        str(row["filled"]),
        _change(row["parameters"], 1e6, "M"),
        _change(row["macs"], 1e9, "G"),
        f"{row['drift']:.0e}",
    ]


def _known(row: dict[str, Any]) -> list[str]:
    *cells, drift = _removed(row)
    if "error" in row:
        return [*cells, "", "", drift]
    before, without, after = (f"{1e3 * seconds:.0f}" for seconds in row["latency"])
    smaller = row["unfilled_parameters"] / row["parameters"][0] - 1
    return [*cells, f"{100 * smaller:+.1f} %", f"{before} -> {after} ({without})", drift]


def _ranked(row: dict[str, Any]) -> list[str]:
    """What the fifth that `rnp` chose gains: removed, parameters."""
    found = row.get("rnp", {"error": "not measured"})
    if "error" in found:
        return [found["error"], ""]
    return [
        f"{found['removed']} ({found['removed'] / found['silenced']:.0%})",
        _change(found["parameters"], 1e6, "M"),
    ]


def _ranked_summary(rows: list[dict[str, Any]]) -> list[str]:
    families = [row["rnp"] for row in rows if row["family"] and "drift" in row.get("rnp", {})]
    shares = [row["removed"] / row["silenced"] for row in families]
    lost = sorted(1 - row["parameters"][1] / row["parameters"][0] for row in families)
    wrong = sum(row["drift"] > 1e-4 for row in families)
    return [
        f"With the fifth that `rnp` ranks lowest instead, in {len(families)} families,",
        f"{statistics.mean(shares):.1%} were removed, and {statistics.median(lost):.0%} of the",
        f"parameters in the median ({lost[0]:.0%} to {lost[-1]:.0%}). Logits that differ by more",
        f"than 1e-4: {wrong} models.",
    ]


def _sizes_summary(rows: list[dict[str, Any]]) -> list[str]:
    done = [row for row in rows if "error" not in row]
    families = [row for row in done if row["family"]]
    shares = [row["removed"] / row["silenced"] for row in families]
    apart = [(row["removed"] - row["filled"]) / row["silenced"] for row in families]
    lost = sorted(1 - row["parameters"][1] / row["parameters"][0] for row in families)
    known = [1 - row["parameters"][1] / row["parameters"][0] for row in done if row["known"]]
    wrong = sum(row["drift"] > 1e-4 for row in done)
    return [
        f"A random fifth of all neurons was silenced. In {len(families)} families of timm",
        f"{statistics.mean(shares):.1%} of the silent neurons were removed on average, and",
        f"{statistics.median(lost):.0%} of the parameters in the median ({lost[0]:.0%} to "
        f"{lost[-1]:.0%}). The {len(known)} well-known",
        f"architectures became {min(known):.0%} to {max(known):.0%} smaller. Logits that differ by "
        f"more than 1e-4: {wrong} models.",
        "",
        "A neuron that others are read together with (a residual sum, a norm over all channels)",
        "leaves a constant in its place. Without these,",
        f"{statistics.mean(apart):.1%} were removed. The constants can cost time (latencies).",
    ]


def sizes(report: dict[str, Any]) -> str:
    rows = report["models"]
    head = ["model", "silenced", "removed", "left a constant", "parameters", "MACs"]
    lines = [
        "# What removal gains",
        "",
        *_sizes_summary(rows),
        "",
        *_ranked_summary(rows),
        "",
        "## Well-known architectures",
        "",
    ]
    lines += _table(
        [*head, "parameters without constants", "ms of a batch (without constants)", "drift"],
        [_known(row) for row in rows if row["known"]],
    )
    lines += [
        "",
        "## Families",
        "",
        "The smallest of each module of timm, by parameters.",
        "",
        *_table(
            [*head, "drift", "by `rnp`: removed", "by `rnp`: parameters"],
            [[*_removed(row), *_ranked(row)] for row in rows if row["family"]],
        ),
        "",
        "## Why some stay",
        "",
        *_table(["model", "neurons", "why"], _why(rows)),
        "",
        "## How it was measured",
        "",
        f"timm {report['timm']}, torch {report['torch']}; random weights in which every layer",
        "matters, four pictures of 64 pixels where the architecture takes them, one thread. Drift:",
        "the largest difference of the logits to those of the silenced model, relative to their",
        "scale. Latencies are medians of seven runs in turns, on a machine that was shared with",
        "other work: only large differences mean something.",
        "",
        "By `rnp`: these networks were not trained, so there was no task to unlearn. `rnp`",
        "unlearned made-up labels of 20 noise images, in five steps of small gradients, and ranked",
        "as always. Its fifth has the shape of such a ranking (much of some layers, little of",
        "others), not its meaning. Left out: families whose random fifth took 20 seconds or more.",
        "",
        "`python -m benchmarks.cost.removal_sizes --out benchmarks/results/removal_sizes.json`,",
        "then again with `--ranked`.",
    ]
    return "\n".join(lines) + "\n"


def _why(rows: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [row["model"], str(count), why]
        for row in rows
        for why, count in row.get("reasons", {}).items()
    ]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
