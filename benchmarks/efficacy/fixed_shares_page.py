"""Collect and render what fixed_shares.py measured: python -m benchmarks.efficacy.fixed_shares_page

    ... --out OUT [OUT ...]     # first collects the runs -> results/fixed_shares.json

docs/results/newer_criteria.md and heads.md, and swap_criterion.md from what group_ranking.py
measured, between their marks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.render import DOCS, RESULTS, fill, percent

RESULT = RESULTS / "fixed_shares.json"
GROUPS = RESULTS / "group_ranking.json"
CRITERIA = ("random", "rnp", "anp", "cnp", "mnp", "nwc", "ims")
RANKED_ON_VITS = ("random", "rnp", "anp")
Row = dict[str, Any]


def collect(folders: list[Path]) -> None:
    rows = [json.loads(file.read_text()) for folder in folders for file in folder.glob("*.json")]
    rows.sort(key=lambda row: (row["network"], row["kind"], row["row"], row["heads"]))
    RESULT.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def rates(found: dict[str, float] | None) -> str:
    """ACC / ASR in percent."""
    return "" if found is None else f"{percent(found['acc'])} / {percent(found['asr'])}"


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def criteria(rows: list[Row]) -> str:
    """ACC / ASR of each criterion at each share, on the networks without attention."""
    mine = {(r["network"], r["row"]): r for r in _without_attention(rows, "fixed")}
    lines = []
    for network in dict.fromkeys(network for network, _ in mine):
        given = rates(next(r["before"] for (n, _), r in mine.items() if n == network))
        for name in CRITERIA:
            if row := mine.get((network, name)):
                cells = [rates(row.get(share)) for share in ("0.02", "0.05", "0.1")]
                cells = cells if "refused" not in row else [row["refused"], "", ""]
                lines.append([network, given, name, *cells, str(row["cpu_seconds"])])
    return table(["network", "as given", "ranking", "2 %", "5 %", "10 %", "CPU s"], lines)


def calls(rows: list[Row]) -> str:
    """ACC / ASR after `purify` with each criterion, on the networks without attention."""
    lines = []
    for row in _without_attention(rows, "call"):
        cells = [rates(row["before"]), row["row"], rates(row["after"]), str(row["silenced"])]
        lines.append([row["network"], *cells])
    return table(["network", "as given", "`purify` with", "purified", "silenced"], lines)


def _without_attention(rows: list[Row], kind: str) -> list[Row]:
    return [r for r in rows if r["kind"] == kind and not r["network"].startswith("vit")]


def heads(rows: list[Row]) -> str:
    """ACC / ASR on ViTs at each share, without heads and with them, and how many heads went."""
    mine = [row for row in rows if row["network"].startswith("vit")]
    found = {(r["network"], r["row"], r["kind"], r["heads"]): r for r in mine}
    lines = []
    for network in sorted({row["network"] for row in mine}):
        given = rates(next(row["before"] for row in mine if row["network"] == network))
        for name in RANKED_ON_VITS:
            for share in ("0.05", "0.1", "0.2"):
                both = [
                    found.get((network, name, "fixed", how), {}).get(share)
                    for how in ("without", "with")
                ]
                if any(both):
                    went = str(both[1]["heads"]) if both[1] else ""
                    what = f"{name}, {float(share):.0%}"
                    lines.append([network, given, what, *map(rates, both), went])
        calls = [found.get((network, "rnp", "call", how), {}) for how in ("without", "with")]
        if any(calls):
            after = [call.get("after") for call in calls]
            lines.append([network, given, "`purify`", *map(rates, after), ""])
    head = ["network", "as given", "pruned", "without heads", "with heads", "heads silenced"]
    return table(head, lines)


def groups(rows: list[Row]) -> str:
    """ACC / ASR and parameters by each way of ranking coupled channels."""
    lines = []
    for row in rows:
        before, after = row["parameters"]
        lost = f"{percent(1 - after / before)} %"
        given, got = rates(row["before"]), rates(row["after"])
        lines.append([row["network"], given, row["ranking"], got, lost])
    return table(["network", "as given", "ranked by", "pruned", "parameters gone"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, nargs="+", help="folders of fixed_shares.py to collect")
    options = parser.parse_args()
    if options.out:
        collect(options.out)
    rows = json.loads(RESULT.read_text())
    fill(DOCS / "newer_criteria.md", "criteria", criteria(rows))
    fill(DOCS / "newer_criteria.md", "calls", calls(rows))
    fill(DOCS / "heads.md", "heads", heads(rows))
    fill(DOCS / "swap_criterion.md", "groups", groups(json.loads(GROUPS.read_text())))


if __name__ == "__main__":
    main()
