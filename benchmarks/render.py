"""Render committed results into docs/results/: python -m benchmarks.render"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cost.removal_page import sizes

ROOT = Path(__file__).parent
RESULTS, DOCS = ROOT / "results", ROOT.parent / "docs" / "results"
README = ROOT.parent / "README.md"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def demo(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# The demo over seeds",
        "",
        *summary(rows),
        "",
        "Five ResNet-18s, in percent. With the recovered trigger and the repair, `tac`, `rnp` and",
        "`anp` bring ASR below 2 %. Without the repair only `tac` comes near. `rnp paper` silenced",
        "nothing within its accuracy budget, so its row shows the networks as given. `random`",
        "draws the neurons at random: on three of five networks the selector then takes none, and",
        "nothing is trained. Accuracy rises under a repair because these young networks learn from",
        "the clean images.",
        "",
        "## Setting",
        "",
        "One backdoored network a seed: timm ResNet-18 at half width,",
        f"{rows[0]['epochs']} epochs on photo-patches, BadNets 3 x 3, 5 % poison, purified with",
        "500 clean images and a budget of two points of ACC. Methods named `..., trigger` use",
        '`selector="trigger"`, the others the selector `accuracy`. `repaired` means',
        '`repair="unlearn"`; its settings were found on other networks ([repair.md](repair.md)).',
        "ACC is measured on 2,370 images that the defence never saw, ASR and RA on about 2,120.",
        "Seeds 0 and 1 have the recipe of networks C0 and C1 of [ranking.md](ranking.md), on",
        "which the defaults were found. Another machine trains other networks from the same",
        "recipe; those of an earlier machine were easier: there `tac, trigger` left a mean ASR of",
        "4.2 without any repair.",
        "",
        "`OMP_NUM_THREADS=1 python -m benchmarks.efficacy.demo_seeds --out",
        "benchmarks/results/demo_seeds.json`, then `python -m benchmarks.render`.",
        "",
        "## Each network",
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
    lines += [
        "",
        "## The rankings at fixed amounts",
        "",
        "ACC / ASR on 700 images when this share of the neurons is silenced. It takes the trigger",
        "to measure this, so no selector can use it.",
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


def _pruned(row: dict[str, Any], which: str) -> str:
    left = row.get(f"{which}_left")
    return row.get(which, "not run") or ("runs" if left is None else f"runs ({left:.0%})")


_TESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "scored": lambda row: row.get("identity") and row.get("finite_gradient"),
    "silenced": lambda row: row.get("silenced_drift", 1) <= 1e-4,
    "smaller": lambda row: row.get("removed") and row["drift"] <= 1e-4,
    "wrong": lambda row: row.get("drift", 0) > 1e-4,
    "plain": lambda row: row.get("plain") == "",
    "adapter": lambda row: row.get("adapter") == "",
}


def _count(what: str, rows: list[dict[str, Any]]) -> int:
    return sum(bool(_TESTS[what](row)) for row in rows)


def _coverage_summary(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| of | models | scored | silenced | smaller | wrong | plain | adapter |",
        "|---|---|---|---|---|---|---|---|",
    ]
    families = [row for row in rows if row["family"]]
    for title, mine in (("families (smallest of a timm module)", families), ("all", rows)):
        cells = [str(_count(key, mine)) for key in ("scored", "silenced", "smaller", "wrong")]
        for key in ("plain", "adapter"):
            cells.append(f"{_count(key, mine)} of {sum(key in row for row in mine)} tried")
        lines.append(f"| {title} | {len(mine)} | {' | '.join(cells)} |")
    return lines


def _coverage_row(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {row['model']} | {row['error']} | | | | | | | | |"
    old, new = row["parameters"]
    cells = [
        row["model"],
        str(row["norm_sites"] + row["layer_sites"]),
        str(row["neurons"]),
        f"{row['removed']} of {row['selected']}",
        f"{row['drift']:.0e}",
        f"{100 * (new / old - 1):+.1f} %",
        str(row["removal_seconds"]),
        "; ".join(f"{n} {reason}" for reason, n in row["reasons"].items()),
        *(_pruned(row, which) for which in ("plain", "adapter")),
    ]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def coverage(report: dict[str, Any]) -> str:
    rows = report["models"]
    lines = [
        "# What works on which timm architecture",
        "",
        f"Of {len(rows)} architectures, {_count('scored', rows)} can be scored,",
        f"{_count('silenced', rows)} silenced, and {_count('smaller', rows)} made smaller without",
        "changing the logits. This says that the library runs there, not that it purifies.",
        "",
        *_coverage_summary(rows),
        "",
        "- **scored**: masks of ones give the logits bit for bit, and every mask has a finite",
        "  gradient.",
        "- **silenced**: the model with zeroed weights computes what the masks compute.",
        "- **smaller**: neurons were removed, and the logits differ from those of the masks by at",
        "  most 1e-4 of their scale; **wrong**: by more.",
        "- **plain**: Torch-Pruning's magnitude pruner takes a fifth of every group and the model",
        "  still runs, whatever it then computes. **adapter**: the same with our scores; groups",
        "  that break the network are left alone. In brackets: parameters left.",
        "",
        f"timm {report['timm']}, torch {report['torch']}, random weights, native input size.",
        f"{report['share']:.0%} of all neurons, drawn at random, coupled ones included, are",
        "silenced and then removed where that changes nothing. Torch-Pruning is given up after",
        f"{report['seconds']:g} s of processor time or {report['gib']:g} GiB.",
        "",
        "`python -m benchmarks.networks.timm_coverage --out",
        "benchmarks/results/timm_coverage.json`, then `python -m benchmarks.render`.",
        "",
        f"Left out: {', '.join(report['left_out'])}.",
        "Seconds are of one thread of a machine that was shared with other work.",
        *report.get("remarks", []),
        "",
        "| model | sites | neurons | removed | drift | parameters | s | why not all | plain "
        "| adapter |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(_coverage_row, rows),
    ]
    return "\n".join(lines) + "\n"


def published(report: dict[str, Any]) -> str:
    networks: dict[str, dict[str, Any] | None] = report["networks"]
    trained = {name: row for name, row in networks.items() if row is not None}
    attacked = [row for row in trained.values() if row["recipe"]["backdoors"]]
    took = sum(row["took"] for row in attacked)
    lines = [
        "# Networks in the papers' regime",
        "",
        f"{len(trained)} of {len(networks)} networks of the list are trained; the attack took",
        f"(ASR of at least 90 %) on {took} of {len(attacked)} backdoored ones. No method is",
        "measured on them yet.",
        "",
        "All 50,000 training images of CIFAR-10 (as JPEG of quality 75) train them, 25 epochs",
        "with crop, mirror and one cycle of the learning rate; networks are narrow. ACC, ASR and",
        "RA are of half B of the test set (5,000 images); half A is for the defences. The list",
        "was committed before training, and with it the development networks: only on those may",
        "settings be tuned. With two targets, the lower rate of both is given. An all-to-all",
        "attack sends an image to the label after its own, so its ASR is hardly above ACC. Left",
        "out: the input-aware attack with its jointly trained generator.",
        "",
        "| network | ACC | ASR | RA | took | CPU minutes | for |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in networks.items():
        role = "development" if name in report["development"] else "test"
        cells = ["not trained yet", "", "", "", ""]
        if row is not None:
            cells = [percent(row["acc"]), "", "", "benign", str(row["cpu_minutes"])]
            if row["recipe"]["backdoors"]:
                cells[1:4] = percent(row["asr"]), percent(row["ra"]), "yes" if row["took"] else "no"
        lines.append(f"| {' | '.join([name, *cells, role])} |")
    lines += [
        "",
        "`python -m benchmarks.networks.published --data DATA --out DIR`, then the same with",
        "`--out DIR --summary`, then `python -m benchmarks.render`. Recipes, curves and hashes:",
        "`benchmarks/results/zoo_v2.json`.",
    ]
    return "\n".join(lines) + "\n"


def fill(page: Path, name: str, text: str) -> None:
    """Put text between the marks `<!-- name: how it was made -->` and `<!-- /name -->`."""
    pattern = rf"(<!-- {name}: .*? -->\n).*?(<!-- /{name} -->)"
    filled, count = re.subn(
        pattern,
        lambda found: f"{found[1]}{text}\n{found[2]}",
        page.read_text(),
        flags=re.DOTALL,
    )
    if count != 1:
        raise ValueError(f"{page.name} has {count} places for {name}")
    page.write_text(filled)


def main() -> None:
    for name, render in (
        ("demo_seeds", demo),
        ("timm_coverage", coverage),
        ("removal_sizes", sizes),
        ("zoo_v2", published),
    ):
        data = json.loads((RESULTS / f"{name}.json").read_text())
        (DOCS / f"{name}.md").write_text(render(data))


if __name__ == "__main__":
    main()
