"""What `scan` says of every network of the zoo, and how well it finds triggered images.

    python -m benchmarks.evidence.diagnosis --models DIR --out DIR2 --zoo fresh  # a JSON a network
    python -m benchmarks.evidence.diagnosis --out DIR2 --zoo fresh --collect     # -> results/
    python -m benchmarks.evidence.diagnosis --null    # -> the package's null.json
    python -m benchmarks.evidence.diagnosis --tables  # -> docs/results/diagnosis.md

Zoos, same recipe, other weights. "development", an earlier one, set the alarms `EARLIER`, and
"evaluation" measured them, both with one search for universal perturbations a label. Benign ones
of the latter, scanned anew ("null"), and a few backdoored ones moved the alarm of their mean of
three (`ALARM`), and "fresh" networks measure that, and then more "benign" ones. A backdoored drill
that this missed added an alarm (`WITH_ANOMALY`), and networks of an "other" architecture measured
it. With those in sight relative sizes took its place (`LATEST`), and "unseen" ones, of two more
architectures, measure that.
`scan` gets 300 clean images without labels; triggered images serve to measure the detection of
samples, nothing else.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from scipy.stats import beta
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

import nnprune_backdoor
from benchmarks.efficacy.efficacy import Hidden, clean_set
from benchmarks.networks.zoo import ZOOS as MEMBERS
from benchmarks.networks.zoo import Member, members, records
from benchmarks.render import DOCS, RESULTS, fill
from nnprune_backdoor import Diagnosis, scan
from nnprune_backdoor.evidence import Evidence, Scan
from nnprune_backdoor.evidence.null import KINDS, suspected
from nnprune_backdoor.evidence.scanning import comparable
from nnprune_backdoor.triggers.inversion import relative_sizes

NULL = Path(nnprune_backdoor.__file__).parent / "evidence" / "null.json"
IMAGES = 300
ALARM = {"restoration": 0.75, "universal": 0.935}  # halfway: benign .911, backdoored .961
WITH_ANOMALY = ALARM | {"anomaly": 6.0}  # benign at most 4.2, one backdoored drill 12.3
LATEST = ALARM | {"relative size": 0.065}  # halfway in log: benign .078, missed until then .054
EARLIER = {"restoration": 0.75, "universal": 0.9}
ZOOS = {  # file in results/, and the alarms of its day
    "fresh": ("diagnosis_fresh", ALARM),
    "unseen": ("diagnosis_unseen", LATEST),
    "other": ("diagnosis_other", WITH_ANOMALY),
    "benign": ("diagnosis_benign", ALARM),
    "null": ("diagnosis_null", ALARM),
    "evaluation": ("diagnosis", EARLIER),
    "development": ("diagnosis_development", EARLIER),
}


def execute(member: Member, models: Path, out: Path, again: bool) -> None:
    """Scan one network and write its JSON; again: as `auto` does, other images and seed."""
    model = member.load(models).requires_grad_(False)
    images = clean_set(500, 0).split(0.6, 0.25, 0.15, seed=0)[0] if again else clean_set(IMAGES, 0)
    start = time.process_time()
    diagnosis = scan(model, images, seed=int(again), progress=False)
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


def write_null() -> None:
    """All benign networks that were scanned as `scan` does now, and the alarms."""
    benign = {
        row["name"]: {kind: round(found["value"], 4) for kind, found in row["evidence"].items()}
        for zoo in ("null", "fresh", "benign")
        for row in rows_of(zoo)
        if row["attack"] is None
    }
    null = {"images": IMAGES, "pixels": 32, "classes": 10, "alarm": LATEST, "benign": benign}
    NULL.write_text(json.dumps(null, indent=1) + "\n")
    print(f"{len(benign)} benign networks")


def results(zoo: str) -> Path:
    return RESULTS / f"{ZOOS[zoo][0]}.json"


def rows_of(zoo: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(results(zoo).read_text())
    for row in found:  # some are of before relative sizes
        row["evidence"].setdefault("relative size", relative_size(row["triggers"]))
    return found


def relative_size(triggers: list[dict[str, Any]]) -> dict[str, Any]:
    """As in `Scan`, of triggers as they are recorded: all zoos have ten labels that have one."""
    sizes = [t["norm"] if t["success"] >= Scan().min_success else 1024.0 for t in triggers]
    shares = relative_sizes(torch.tensor(sizes)).tolist()
    by_label = {t["target"]: share for t, share in zip(triggers, shares, strict=True)}
    label = min(by_label, key=by_label.__getitem__)
    return {"value": by_label[label], "label": label, "by_label": by_label}


def collect(out: Path, zoo: str) -> None:
    """All networks in one file, a line each, numbers rounded."""
    order = {
        member.name: i for i, member in enumerate(m for zoo in MEMBERS.values() for m in zoo())
    }
    rows = [json.loads(file.read_text()) for file in out.glob("*.json")]
    rows.sort(key=lambda row: order.get(row["name"], len(order)))
    results(zoo).write_text("[\n" + ",\n".join(json.dumps(rounded(row)) for row in rows) + "\n]\n")
    print(f"{len(rows)} networks")


def tables() -> str:
    """For docs/results/diagnosis.md: evidence by network, and what separates, in each zoo."""
    zoos = {zoo: rows_of(zoo) for zoo in ZOOS}
    separating = {zoo: rows for zoo, rows in zoos.items() if not zoo.startswith("null")}
    lines = ["### What separates", "", *_separation(separating)]
    for zoo, rows in zoos.items():
        lines += ["", f"### Networks of the {zoo} zoo", "", *_network_table(rows, ZOOS[zoo][1])]
    return "\n".join(lines)


def _network_table(rows: list[dict[str, Any]], alarm: dict[str, float]) -> list[str]:
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
        alarms = ", ".join(item.kind for item in evidence_in(row, alarm) if item.alarm)
        cells.append(f"{alarms}: {suspected(evidence_in(row, alarm))}" if alarms else "no")
        cells.append(", ".join(f"{samples[key]:.2f}" for key in keys if key in samples))
        lines.append(f"| {' | '.join(cells)} | {row['cpu_seconds']:.0f} |")
    return lines


def evidence_in(row: dict[str, Any], alarm: dict[str, float]) -> list[Evidence]:
    """As `scan` returned it, with these alarms."""
    working = sum(trigger["success"] >= Scan().min_success for trigger in row["triggers"])
    if not comparable(working, len(row["triggers"]), 10):
        compared = ("relative size", "anomaly")
        alarm = {kind: limit for kind, limit in alarm.items() if kind not in compared}
    return [
        Evidence(
            kind,
            found["value"],
            found["label"],
            {int(label): value for label, value in found["by_label"].items()},
            {},
            alarm.get(kind),
        )
        for kind, found in row["evidence"].items()
    ]


def _separation(zoos: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "| evidence | zoo | backdoored, benign | AUROC | label is the target |",
        "|---|---|---|---|---|",
    ]
    for kind, (direction, _) in KINDS.items():
        sign = 1 if direction == "high" else -1
        for zoo, rows in zoos.items():
            mine = [row for row in rows if kind in row["evidence"]]
            bad = [row for row in mine if row["attack"] is not None]
            if not bad:
                continue
            truth = [row["attack"] is not None for row in mine]
            values = [sign * row["evidence"][kind]["value"] for row in mine]
            hits = [row["evidence"][kind]["label"] == row["target"] for row in bad]
            area = f"{roc_auc_score(truth, values):.2f}" if 0 < sum(truth) < len(truth) else ""
            counts = f"{len(bad)}, {len(mine) - len(bad)}"
            lines.append(f"| {kind} | {zoo} | {counts} | {area} | {sum(hits)} of {len(hits)} |")
    for zoo, rows in zoos.items():
        named = [(suspected(evidence_in(row, ZOOS[zoo][1])), row) for row in rows]
        bad = [(label, row["target"]) for label, row in named if row["attack"] is not None]
        false = [label is not None for label, row in named if row["attack"] is None]
        raised = sum(label is not None for label, _ in bad)
        right = sum(label == target for label, target in bad)
        lines.append(
            f"| alarm | {zoo} | raised on {raised} of {len(bad)}, {sum(false)} of {len(false)} "
            f"{exact(sum(false), len(false))} | | {right} of {len(bad)} |"
        )
    return lines


def exact(hits: int, count: int) -> str:
    """Clopper and Pearson's 95 % interval of a rate, in percent."""
    low = beta.ppf(0.025, hits, count - hits + 1) if hits else 0.0
    high = beta.ppf(0.975, hits + 1, count - hits) if hits < count else 1.0
    return f"[{100 * low:.0f}, {100 * high:.0f} %]"


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
    parser.add_argument("--zoo", choices=[*ZOOS], default="fresh")
    parser.add_argument("--only", nargs="+", help="networks: names, or parts of them")
    parser.add_argument("--collect", action="store_true", help="write its file in results/")
    parser.add_argument("--tables", action="store_true", help="into docs/results/diagnosis.md")
    parser.add_argument("--null", action="store_true", help="write null.json of the package")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.null:
        write_null()
        return
    if options.tables:
        fill(DOCS / "diagnosis.md", "tables", tables())
        return
    if options.collect:
        collect(options.out, options.zoo)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    known = records()
    zoo = MEMBERS.get(options.zoo.partition(" ")[0], members)()
    zoo = [m for m in zoo if not options.zoo.startswith("null") or m.attack is None]
    zoo = [m for m in zoo if m.name in known and m.file(options.models).exists()]
    zoo = [m for m in zoo if not options.only or any(o in m.name for o in options.only)]
    for member in tqdm(zoo, desc="networks"):
        if not (options.out / f"{member.name}.json").exists():
            execute(member, options.models, options.out, options.zoo.endswith("again"))


if __name__ == "__main__":
    main()
