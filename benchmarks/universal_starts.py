"""How much the success of universal perturbations depends on where their search begins.

    OMP_NUM_THREADS=1 python benchmarks/universal_starts.py --models DIR   # networks that are there

Two sets of 300 clean images, "scan" that of diagnosis.py and "auto" that of auto_selector.py, and
three seeds on each: success by label. The alarm of the mean of three was set on these networks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from efficacy import clean_set
from render import DOCS, RESULTS, fill
from tqdm import tqdm
from zoo import members

from nnprune_backdoor import UniversalPerturbation

FOUND = RESULTS / "universal_starts.json"
SETS, SEEDS = ("scan", "auto"), (0, 1, 2)


def measured(models: Path) -> list[dict[str, Any]]:
    scoring, _, _ = clean_set(500, 0).split(0.6, 0.25, 0.15, seed=0)
    sets = dict(zip(SETS, (clean_set(300, 0), scoring), strict=True))
    rows = []
    for member in tqdm([m for m in members() if m.file(models).exists()], desc="networks"):
        model = member.load(models).requires_grad_(False).to(memory_format=torch.channels_last)
        target = member.target if isinstance(member.target, int) else None
        row: dict[str, Any] = {"name": member.name, "attack": member.attack, "target": target}
        for name, images in sets.items():
            for seed in SEEDS:
                found = UniversalPerturbation().recover(model, images, seed=seed)
                row[f"{name}/{seed}"] = [round(each.success, 4) for each in found]
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| network | scan: three searches, mean | auto: three searches, mean |",
        "|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["attack"] is not None, row["name"])):
        cells = [row["name"]]
        for name in SETS:
            each = np.array([row[f"{name}/{seed}"] for seed in SEEDS])
            best = ", ".join(f"{one.max():.3f} ({one.argmax()})" for one in each)
            cells.append(f"{best}; {each.mean(0).max():.3f} ({each.mean(0).argmax()})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=Path, help="folder of the zoo's weights; else only render")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.models is not None:
        rows = measured(options.models)
        FOUND.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    fill(DOCS / "diagnosis.md", "starts", table(json.loads(FOUND.read_text())))


if __name__ == "__main__":
    main()
