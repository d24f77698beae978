"""The tables of docs/results/speed.md, from results/speed*.json and full_size.json.

python -m benchmarks.cost.speed_page
"""

from __future__ import annotations

import json
from statistics import median
from typing import Any

from benchmarks.cost.speed import PASSES
from benchmarks.render import DOCS, RESULTS, fill

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
        "| network | method | plain | channels_last | bfloat16 | both, against the loop |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ways = row["ways"]
        plain = median(ways["library"]["cpu"])
        cells = [row["architecture"], row["method"], f"{plain:.2f} s"]
        for way in ("channels_last", "bfloat16"):
            seconds = median(ways[way]["cpu"])
            cells.append(f"{seconds:.2f} s ({plain / seconds:.2f} times)")
        faster = median(ways["reference"]["cpu"]) / median(ways["both"]["cpu"])
        cells.append(f"{faster:.2f} times")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gpu(rows: list[Row]) -> str:
    """Seconds and memory on a GPU, of the ways that were run there."""
    lines = [
        "| network | method | published loop | library | bfloat16, channels_last | floor "
        "| library: times faster, of the floor | bfloat16: times faster "
        "| scores differ by: library, bfloat16 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells, ways, took = [row["architecture"], row["method"]], row["ways"], {}
        for way in ("reference", "library", "both", "floor"):
            took[way], mb = (median(ways[way][key]) for key in ("wall", "gpu_mb"))
            cells.append(f"{took[way]:.2f} s, {mb / 1000:.1f} GB")
        faster = took["reference"] / took["library"]
        cells.append(f"{faster:.2f}, {took['library'] / took['floor']:.2f}")
        cells.append(f"{took['reference'] / took['both']:.2f}")
        gaps = (ways[way]["difference"]["largest"] for way in ("library", "both"))
        cells.append(", ".join(f"{gap:.0e}" for gap in gaps))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def full_size(rows: list[Row]) -> str:
    """What a ranking takes at default settings."""
    lines = [
        "| network | on | criterion | precision | seconds | images/s | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        threads = f", {row['threads']} threads" if "threads" in row else ""
        cells = [row["network"], row["where"] + threads, row["method"], row["way"]]
        cells += [f"{row['seconds']:.0f}", f"{row['images_per_second']:,}"]
        cells.append(f"{row['mb'] / 1000:.1f} GB")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def span(seconds: list[float]) -> str:
    return f"[{min(seconds):.2f}, {max(seconds):.2f}]"


def main() -> None:
    found = json.loads((RESULTS / "speed.json").read_text())
    page = DOCS / "speed.md"
    fill(page, "cost", cost(found["rows"]))
    fill(page, "options", options(found["rows"]))
    fill(page, "gpu", gpu(json.loads((RESULTS / "speed_gpu.json").read_text())["rows"]))
    fill(page, "full size", full_size(json.loads((RESULTS / "full_size.json").read_text())))


if __name__ == "__main__":
    main()
