"""How `scan` does on a folder of networks: AUROC, cross-entropy, every miss and false alarm.

    python -m benchmarks.evidence.detection --models DIR [DIR ...] --out OUT
        # scans what is not in OUT yet, a JSON each; then results/detection.json and the table

The networks are those of benchmarks.networks.zoo that the folders hold. Those of architectures in
`zoo.FINAL` had no part in the calibration; of the others the same recipe was used there. A scan
gets 300 clean images without labels. "Cannot tell" counts as a probability of one half.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from benchmarks.efficacy.efficacy import clean_set
from benchmarks.evidence.calibration import rates, rates_table
from benchmarks.networks.zoo import ATTACKS, EVERY, FINAL, Length, Member, records
from benchmarks.render import DOCS, RESULTS, fill
from nnprune_backdoor import scan

RESULT, PAGE = RESULTS / "detection.json", DOCS / "diagnosis.md"
IMAGES = 300


def networks(folders: list[Path]) -> Iterator[tuple[Member, Path]]:
    """Those whose file names are names of members, and their folders.

    Without those in which the attack did not take, by results/zoo.json.
    """
    failed = records(only_taken=False).keys() - records().keys()
    for folder in folders:
        for file in sorted(folder.glob("*.safetensors")):
            parts = file.stem.rsplit("-", 3)
            if len(parts) != 4 or file.stem in failed:
                continue
            arch, attack, length, seed = parts
            known = arch in EVERY and attack in {*ATTACKS, "benign"}
            if known and length in get_args(Length) and seed.isdigit():
                planted = None if attack == "benign" else attack
                yield Member(arch=arch, attack=planted, length=length, seed=int(seed)), folder


def execute(member: Member, folder: Path) -> dict[str, Any]:
    """One scan, and the truth."""
    start = time.process_time()
    found = scan(member.load(folder), clean_set(IMAGES, 0), progress=False)
    targets = member.target if isinstance(member.target, int) else "each"
    return {
        "name": member.name,
        "arch": member.arch,
        "attack": member.attack,
        "target": targets if member.attack else None,
        "cpu_seconds": round(time.process_time() - start, 1),
        "probability": None if found.probability is None else round(found.probability, 4),
        "suspicions": [
            {"label": item.label, "probability": round(item.probability, 4)}
            | {kind.kind: round(kind.value, 4) for kind in item.evidence}
            for item in found.suspicions
        ],
    }


def judged(row: dict[str, Any]) -> list[Any]:
    """As `rates` takes it."""
    given = 0.5 if row["probability"] is None else row["probability"]
    right = row["target"] == "each" or row["suspicions"][0]["label"] == row["target"]
    return [row["name"], row["attack"] is not None, given, right if row["attack"] else None]


def table(rows: list[dict[str, Any]]) -> str:
    """Rates by architecture, then every network."""
    new = [row for row in rows if row["arch"] in FINAL]
    old = [row for row in rows if row["arch"] not in FINAL]
    parts = {"**architectures that the calibration has not seen**": new, "**others**": old}
    for arch in dict.fromkeys(row["arch"] for row in new + old):
        parts[arch] = [row for row in rows if row["arch"] == arch]
    found = {name: rates([judged(row) for row in some]) for name, some in parts.items() if some}
    lines = [
        rates_table(found, "networks"),
        "",
        "| network | target | probability | label | universal | relative size | restoration "
        "| CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [_line(row) for row in new + old])


def _line(row: dict[str, Any]) -> str:
    first = row["suspicions"][0]
    kinds = [f"{first[kind]:.3g}" for kind in ("universal", "relative size", "restoration")]
    given = "cannot tell" if row["probability"] is None else f"{row['probability']:.2f}"
    target = "" if row["target"] is None else str(row["target"])
    cells = [row["name"], target, given, str(first["label"]), *kinds, f"{row['cpu_seconds']:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=Path, nargs="+", default=[], help="folders of weights")
    parser.add_argument("--out", type=Path, required=True, help="folder, a JSON each network")
    parser.add_argument("--only", nargs="+", default=[""], help="names, or parts of them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for member, folder in tqdm([*networks(options.models)], desc="networks"):
        file = options.out / f"{member.name}.json"
        if any(part in member.name for part in options.only) and not file.exists():
            row = json.dumps(execute(member, folder))
            file.write_text(row + "\n")
    rows = [json.loads(file.read_text()) for file in sorted(options.out.glob("*.json"))]
    RESULT.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    fill(PAGE, "detection", table(rows))


if __name__ == "__main__":
    main()
