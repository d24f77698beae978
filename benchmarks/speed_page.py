"""The tables of docs/speed.md, from results/speed.json: python benchmarks/speed_page.py"""

from __future__ import annotations

import json
from statistics import median
from typing import Any

from render import DOCS, RESULTS, fill
from speed import PASSES

Row = dict[str, Any]


def cost(rows: list[Row]) -> str:
    """Seconds against the published loop and the floor; medians, and ranges of the library's."""
    lines = [
        "| network | method | published loop, s | library, s | images/s | times faster "
        "| of the floor | memory | scores differ by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ways = row["ways"]
        reference, library, floor = (
            median(ways[way]["cpu"]) for way in ("reference", "library", "floor")
        )
        memory = ways["library"]["peak_mb"] / ways["reference"]["peak_mb"]
        cells = [
            row["architecture"],
            row["method"],
            f"{reference:.2f} {span(ways['reference']['cpu'])}",
            f"{library:.2f} {span(ways['library']['cpu'])}",
            f"{PASSES[row['method']] * row['images'] / 2 / library:.0f}",
            f"{reference / library:.2f}",
            f"{library / floor:.2f}",
            f"{ways['library']['peak_mb']:.0f} of {ways['reference']['peak_mb']:.0f} MB "
            f"({memory:.0%})",
            f"{ways['library']['difference']['largest']:.0e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def options(rows: list[Row]) -> str:
    """What the options of `Compute` do to seconds."""
    lines = [
        "| network | method | plain | channels_last | bfloat16 | bfloat16 against the loop |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ways = row["ways"]
        plain = median(ways["library"]["cpu"])
        cells = [row["architecture"], row["method"], f"{plain:.2f} s"]
        for way in ("channels_last", "bfloat16"):
            seconds = median(ways[way]["cpu"])
            cells.append(f"{seconds:.2f} s ({plain / seconds:.2f} times)")
        faster = median(ways["reference"]["cpu"]) / median(ways["bfloat16"]["cpu"])
        cells.append(f"{faster:.2f} times")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def choices(rows: list[Row]) -> str:
    """What the options do to rankings and to what is selected of them."""
    lines = [
        "| network | criterion | option | CPU s | mask steps | rank correlation "
        "| lowest 2 % shared | budget of 2 points: neurons, ACC, ASR | lowest 2 %: ACC, ASR |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['net']} | {row['method']} | {row['compute']} | {row['error']} |")
            continue
        budget, few = row["accuracy"], row["2 %"]
        cells = [
            row["net"],
            row["method"],
            row["compute"] or "none",
            f"{row['cpu']:.1f}",
            str(row["steps"] or ""),
            f"{row['rank']:.3f}",
            f"{row['low2']:.0%}",
            f"{budget['neurons']}, {budget['acc']:.3f}, {budget['asr']:.3f}",
            f"{few['acc']:.3f}, {few['asr']:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def span(seconds: list[float]) -> str:
    return f"[{min(seconds):.2f}, {max(seconds):.2f}]"


def main() -> None:
    found = json.loads((RESULTS / "speed.json").read_text())
    page = DOCS / "speed.md"
    fill(page, "cost", cost(found["rows"]))
    fill(page, "options", options(found["rows"]))
    fill(page, "choices", choices(found.get("choices", [])))


if __name__ == "__main__":
    main()
