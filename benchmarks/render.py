"""Render committed results into docs/: python benchmarks/render.py"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
RESULTS, DOCS = ROOT / "results", ROOT.parent / "docs"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def demo(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# The demo over seeds",
        "",
        "`OMP_NUM_THREADS=1 python benchmarks/demo_seeds.py --out",
        "benchmarks/results/demo_seeds.json`, then",
        "`python benchmarks/render.py`. One backdoored network a seed: timm ResNet-18 at half",
        f"width, {rows[0]['epochs']} epochs on photo-patches, BadNets 3 x 3, 5 % poison. It",
        "is purified with 500 clean images and the default selector (two points). In percent;",
        "ACC on 2,370 and ASR, RA on about 2,120 images that the defence never saw. Seeds 0 and 1",
        "are networks C0 and C1 of [ranking.md](ranking.md), on which the defaults were found",
        "(with another clean set); seeds 2 to 4 were first seen here.",
        "",
        "| method | seed | ACC before | ASR before | ACC | ASR | RA | neurons silenced | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for method in methods:
        mine = [row for row in rows if row["method"] == method]
        for row in mine:
            before = row["before"]
            start = f"| {method} | {row['seed']} | "
            start += f"{percent(before['acc'])} | {percent(before['asr'])} |"
            if "error" in row:
                lines.append(f"{start} refused: {row['error']} | | | | |")
                continue
            after = row["after"]
            cells = [percent(after[key]) for key in ("acc", "asr", "ra")]
            share = f"{row['silenced']} of {row['neurons']}"
            lines.append(f"{start} {' | '.join(cells)} | {share} | {row['seconds']} |")
    lines += ["", *summary(rows)]
    lines += [
        "",
        "## The rankings, seen with the triggered images that no selector has",
        "",
        "ACC / ASR on 700 images when this share of the neurons is silenced.",
        "",
        "| method | seed | " + " | ".join(f"{p['share']:.2%}" for p in rows[0]["curve"]) + " |",
        "|" + "---|" * (2 + len(rows[0]["curve"])),
    ]
    for method in methods:
        for row in (row for row in rows if row["method"] == method and "curve" in row):
            cells = [f"{percent(p['acc'])} / {percent(p['asr'])}" for p in row["curve"]]
            lines.append(f"| {method} | {row['seed']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """One line a method, over the seeds."""
    lines = ["| method | mean ASR | worst ASR | mean ACC drop | mean RA |", "|---|---|---|---|---|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method and "after" in row]
        asr = [row["after"]["asr"] for row in mine]
        drop = [row["before"]["acc"] - row["after"]["acc"] for row in mine]
        ra = [row["after"]["ra"] for row in mine]
        cells = [statistics.mean(asr), max(asr), statistics.mean(drop), statistics.mean(ra)]
        lines.append(f"| {method} | {' | '.join(map(percent, cells))} |")
    return lines


def sites(report: dict[str, Any]) -> str:
    rows = report["models"]
    good = [row for row in rows if row.get("identity") and row.get("finite_gradient")]
    lines = [
        "# Sites on timm's architectures",
        "",
        "`python benchmarks/timm_sites.py MODELS --out benchmarks/results/timm_sites.json`, then",
        f"`python benchmarks/render.py`. timm {report['timm']}, random weights, native input size.",
        "Identity: masks of ones give the logits bit for bit. Gradient: finite for every mask.",
        "",
        f"**{len(good)} of {len(rows)} models pass both.**",
        "",
        "| model | norm sites | layer sites | neurons | identity | gradient | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['model']} | | | | {row['error']} | | {row['seconds']} |")
            continue
        marks = ["yes" if row[key] else "NO" for key in ("identity", "finite_gradient")]
        cells = [str(row[key]) for key in ("norm_sites", "layer_sites", "neurons")]
        lines.append(f"| {' | '.join([row['model'], *cells, *marks])} | {row['seconds']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    for name, render in (("demo_seeds", demo), ("timm_sites", sites)):
        data = json.loads((RESULTS / f"{name}.json").read_text())
        (DOCS / f"{name}.md").write_text(render(data))
    table = "\n".join(summary(json.loads((RESULTS / "demo_seeds.json").read_text())))
    readme = ROOT.parent / "README.md"
    begin, end = "<!-- results: python benchmarks/render.py -->\n", "<!-- /results -->"
    before, rest = readme.read_text().split(begin)
    readme.write_text(before + begin + table + "\n" + end + rest.split(end)[1])


if __name__ == "__main__":
    main()
