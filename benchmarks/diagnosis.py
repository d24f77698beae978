"""What `scan` says of every network of the zoo, and how well it finds triggered images.

    python benchmarks/diagnosis.py --models DIR --out DIR2             # resumable, a JSON a network
    python benchmarks/diagnosis.py --out DIR2 --collect                # -> results/diagnosis.json
    python benchmarks/diagnosis.py --null                              # -> the package's null.json

The development half is the first fifteen networks of the zoo (BadNets, Blended and benign, seed 0,
short) and the benign networks of further seeds in EXTRA, which serve the null alone and are trained
here. Alarms are set on that half (`ALARM`); everything else only measures. `scan` gets 300 clean
images without labels; triggered images serve to measure the detection of samples, nothing else.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from efficacy import Hidden, clean_set
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from tqdm import tqdm
from zoo import Member, members

import nnprune_backdoor
from nnprune_backdoor.diagnosis import Diagnosis, scan

RESULTS = Path(__file__).parent / "results" / "diagnosis.json"
NULL = Path(nnprune_backdoor.__file__).parent / "null.json"
DEVELOPMENT = [member.name for member in members()[:15]]
EXTRA = [
    Member(arch=arch, attack=None, seed=seed)
    for seed in (3, 4)
    for arch in ("repvgg", "mobilenet", "resnet")
]
IMAGES = 300
ALARM: dict[str, float] = {}


def execute(member: Member, models: Path, out: Path) -> None:
    """Scan one network and write its JSON."""
    model = member.load(models).requires_grad_(False)
    start = time.process_time()
    diagnosis = scan(model, clean_set(IMAGES, 0), progress=False)
    row: dict[str, Any] = {
        "name": member.name,
        "arch": member.arch,
        "attack": member.attack,
        "target": member.target if isinstance(member.target, int) else "each",
        "cpu_seconds": round(time.process_time() - start, 1),
    }
    found = diagnosis.to_dict()
    row |= {key: found[key] for key in ("triggers", "restoration", "seconds")}
    row["evidence"] = {
        item["kind"]: {key: item[key] for key in ("value", "label", "by_label")}
        for item in found["evidence"]
    }
    row["trajectory"] = [
        [look.steps, look.accuracy, look.predicted] for look in diagnosis.exposed.trajectory
    ][-3:]
    if member.attack is not None:
        row["samples"] = detection(diagnosis, Hidden.of(member))
    part = out / f"{member.name}.part"
    part.write_text(json.dumps(row) + "\n")
    part.replace(out / f"{member.name}.json")


def detection(diagnosis: Diagnosis, hidden: Hidden) -> dict[str, float]:
    """AUROC of telling 500 triggered images from the same ones without the trigger."""
    assert hidden.stamped is not None
    others = (
        slice(0, 500)
        if not isinstance(hidden.target, int)
        else hidden.labels[:700] != hidden.target
    )
    images = [
        pile[: len(others) if isinstance(others, torch.Tensor) else None][others][:500]
        for pile in (hidden.images, hidden.stamped)
    ]
    truth = [0] * len(images[0]) + [1] * len(images[1])
    both = torch.cat(images)
    with torch.no_grad():
        sure = torch.cat([diagnosis.model(part).softmax(1).amax(1) for part in both.split(250)])
    scores = {"original": sure, "exposure": diagnosis.suspicious(both, by="exposure")}
    if diagnosis.restored is not None:
        scores["silencing"] = diagnosis.suspicious(both)
    return {key: round(float(roc_auc_score(truth, value)), 4) for key, value in scores.items()}


def write_null() -> None:
    """The benign networks of the development half, and the alarms set on that half."""
    rows = json.loads(RESULTS.read_text())
    names = {*DEVELOPMENT, *(member.name for member in EXTRA)}
    benign = {
        row["name"]: {kind: round(found["value"], 4) for kind, found in row["evidence"].items()}
        for row in rows
        if row["attack"] is None and row["name"] in names
    }
    null = {"images": IMAGES, "pixels": 32, "classes": 10, "alarm": ALARM, "benign": benign}
    NULL.write_text(json.dumps(null, indent=1) + "\n")
    print(f"{len(benign)} benign networks")


def collect(out: Path) -> None:
    """All networks in one file, a line each, numbers rounded."""
    order = {member.name: i for i, member in enumerate([*members(), *EXTRA])}
    rows = [json.loads(file.read_text()) for file in out.glob("*.json")]
    rows.sort(key=lambda row: order.get(row["name"], len(order)))
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(rounded(row)) for row in rows) + "\n]\n")
    print(f"{len(rows)} networks")


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=Path, help="folder of the zoo's weights")
    parser.add_argument("--out", type=Path, help="folder, a JSON each network")
    parser.add_argument("--only", nargs="+", help="networks: names, or parts of them")
    parser.add_argument("--collect", action="store_true", help="write results/diagnosis.json")
    parser.add_argument("--null", action="store_true", help="write null.json of the package")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.null:
        write_null()
        return
    if options.collect:
        collect(options.out)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    zoo = [*members(), *EXTRA]
    zoo = [m for m in zoo if not options.only or any(o in m.name for o in options.only)]
    for member in tqdm(zoo, desc="networks"):
        if (options.out / f"{member.name}.json").exists():
            continue
        if not member.file(options.models).exists():
            if member not in EXTRA:
                continue
            weights = {k: v.contiguous() for k, v in member.train().state_dict().items()}
            save_file(weights, member.file(options.models))
        execute(member, options.models, options.out)


if __name__ == "__main__":
    main()
