"""What `scan` says of every network of the zoo, and how well it finds triggered images.

    python benchmarks/diagnosis.py --models DIR --out DIR2             # resumable, a JSON a network
    python benchmarks/diagnosis.py --models DIR --out DIR2 --auto      # purifies by selector "auto"
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
from nnprune_backdoor import purify, scan
from nnprune_backdoor.diagnosis import Diagnosis
from nnprune_backdoor.evidence import KINDS

RESULTS = Path(__file__).parent / "results" / "diagnosis.json"
DOCS = Path(__file__).parent.parent / "docs" / "diagnosis.md"
NULL = Path(nnprune_backdoor.__file__).parent / "null.json"
DEVELOPMENT = [member.name for member in members()[:15]]
EXTRA = [
    Member(arch=arch, attack=None, seed=seed)
    for seed in (3, 4)
    for arch in ("repvgg", "mobilenet", "resnet")
]
IMAGES = 300
ALARM = {"restoration": 0.6, "universal": 0.9}


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
    others = torch.ones(len(hidden.labels), dtype=torch.bool)
    if isinstance(hidden.target, int):
        others = hidden.labels != hidden.target
    both = torch.cat([pile[others][:500] for pile in (hidden.images, hidden.stamped)])
    truth = [0] * (len(both) // 2) + [1] * (len(both) // 2)
    with torch.no_grad():
        sure = torch.cat([diagnosis.model(part).softmax(1).amax(1) for part in both.split(250)])
    scores = {"original": sure, "exposure": diagnosis.suspicious(both, by="exposure")}
    if diagnosis.restored is not None:
        scores["silencing"] = diagnosis.suspicious(both, by="silencing")
    return {key: round(float(roc_auc_score(truth, value)), 4) for key, value in scores.items()}


def purified(member: Member, models: Path, out: Path, method: str = "tac") -> None:
    """Purify one network with 500 labelled images and selector "auto", and measure."""
    model, hidden = member.load(models), Hidden.of(member)
    row: dict[str, Any] = {"name": member.name, "method": method}
    row["before"] = hidden.measure(model, 2000)
    done = purify(model, clean_set(500, 0), method, selector="auto", progress=False)
    row["after"] = hidden.measure(done.model, 2000)
    details = done.selection.details
    row |= {"neurons": len(done.selection), "reason": done.selection.reason}
    row |= {key: details.get(key) for key in ("target", "plateau", "remaining")}
    (out / f"{member.name}.auto").write_text(json.dumps(row) + "\n")


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
    for row in rows:
        if (out / f"{row['name']}.auto").exists():
            row["auto"] = json.loads((out / f"{row['name']}.auto").read_text())
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(rounded(row)) for row in rows) + "\n]\n")
    print(f"{len(rows)} networks")


def tables(rows: list[dict[str, Any]]) -> str:
    """For docs/diagnosis.md: evidence by network, and what separates the halves."""
    names = {*DEVELOPMENT, *(member.name for member in EXTRA)}
    halves = {
        "development": [row for row in rows if row["name"] in names],
        "evaluation": [row for row in rows if row["name"] not in names],
    }
    lines: list[str] = []
    for half, mine in halves.items():
        lines += ["", f"### Networks of the {half} half", ""]
        lines += _network_table(mine) if mine else ["None was scanned."]
    lines += ["", "### What separates", "", *_separation(halves)]
    return "\n".join(lines).strip() + "\n"


def _network_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| network | target | " + " | ".join(KINDS) + " | alarm | samples: original, exposure, "
        "silencing | s |",
        "|" + "---|" * (len(KINDS) + 5),
    ]
    for row in rows:
        cells = [row["name"], "" if row["attack"] is None else str(row["target"])]
        for kind in KINDS:
            found = row["evidence"].get(kind)
            cells.append("" if found is None else f"{found['value']:.3g} ({found['label']})")
        samples = row.get("samples", {})
        keys = ("original", "exposure", "silencing")
        cells.append(", ".join(raised(row)) or "no")
        cells.append(", ".join(f"{samples[key]:.2f}" for key in keys if key in samples))
        lines.append(f"| {' | '.join(cells)} | {row['cpu_seconds']:.0f} |")
    return lines


def raised(row: dict[str, Any]) -> list[str]:
    """Kinds of evidence that raise the alarm."""
    return [
        kind
        for kind, limit in ALARM.items()
        if kind in row["evidence"] and row["evidence"][kind]["value"] >= limit
    ]


def _separation(halves: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "| evidence | half | backdoored, benign | AUROC | label is the target |",
        "|---|---|---|---|---|",
    ]
    for kind, (direction, _) in KINDS.items():
        sign = 1 if direction == "high" else -1
        for half, rows in halves.items():
            mine = [row for row in rows if kind in row["evidence"]]
            bad = [row for row in mine if row["attack"] is not None]
            truth = [row["attack"] is not None for row in mine]
            values = [sign * row["evidence"][kind]["value"] for row in mine]
            hits = [row["evidence"][kind]["label"] == row["target"] for row in bad]
            area = f"{roc_auc_score(truth, values):.2f}" if 0 < sum(truth) < len(truth) else ""
            counts = f"{len(bad)}, {len(mine) - len(bad)}"
            lines.append(f"| {kind} | {half} | {counts} | {area} | {sum(hits)} of {len(hits)} |")
    for half, rows in halves.items():
        found = {
            bad: [bool(raised(r)) for r in rows if (r["attack"] is not None) == bad]
            for bad in (True, False)
        }
        lines.append(
            f"| alarm | {half} | raised on {sum(found[True])} of {len(found[True])} backdoored, "
            f"{sum(found[False])} of {len(found[False])} benign | | |"
        )
    return lines


def write_tables() -> None:
    begin, end = "<!-- tables: python benchmarks/diagnosis.py --tables -->\n", "<!-- /tables -->"
    before, rest = DOCS.read_text().split(begin)
    made = tables(json.loads(RESULTS.read_text()))
    DOCS.write_text(before + begin + made + end + rest.split(end)[1])


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
    parser.add_argument("--auto", action="store_true", help="purify instead of scanning")
    parser.add_argument("--collect", action="store_true", help="write results/diagnosis.json")
    parser.add_argument("--tables", action="store_true", help="into docs/diagnosis.md")
    parser.add_argument("--null", action="store_true", help="write null.json of the package")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.null:
        write_null()
        return
    if options.tables:
        begin, end = (
            "<!-- tables: python benchmarks/diagnosis.py --tables -->\n",
            "<!-- /tables -->",
        )
        before, rest = DOCS.read_text().split(begin)
        after = rest.split(end)[1]
        DOCS.write_text(before + begin + tables(json.loads(RESULTS.read_text())) + end + after)
        return
    if options.collect:
        collect(options.out)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    zoo = [*members(), *EXTRA]
    zoo = [m for m in zoo if not options.only or any(o in m.name for o in options.only)]
    for member in tqdm(zoo, desc="networks"):
        kind = "auto" if options.auto else "json"
        if (options.out / f"{member.name}.{kind}").exists():
            continue
        if not member.file(options.models).exists():
            if member not in EXTRA:
                continue
            weights = {k: v.contiguous() for k, v in member.train().state_dict().items()}
            save_file(weights, member.file(options.models))
        (purified if options.auto else execute)(member, options.models, options.out)


if __name__ == "__main__":
    main()
