"""The selector `auto` beside the oracle and the default one, on rankings made by efficacy.py.

    python -m benchmarks.efficacy.auto_selector --models DIR --runs DIR2 --out DIR3   # resumable
    python -m benchmarks.efficacy.auto_selector --out DIR3 --collect        # -> results/auto.json
    (with --fresh: the networks of zoo.py's `fresh`)

DIR2 is where efficacy.py put its runs: their scores are taken, 500 clean images, first set. A
network is scanned once, since what a scan says does not depend on the ranking.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from benchmarks.efficacy.efficacy import MEASURED, Hidden, clean_set, oracle
from benchmarks.networks.zoo import Member, fresh, members, records
from benchmarks.render import DOCS, RESULTS, fill, percent
from nnprune_backdoor import Diagnosis
from nnprune_backdoor.attacks.evaluation import defense_effectiveness
from nnprune_backdoor.core.held_out import HeldOut
from nnprune_backdoor.core.recovered import RecoveredTrigger
from nnprune_backdoor.core.scores import ChannelScores
from nnprune_backdoor.evidence import Scan
from nnprune_backdoor.selectors import Auto, TriggerGone
from nnprune_backdoor.triggers import Inversion
from nnprune_backdoor.utils.randomness import private_randomness

METHODS = ("tac", "cnp", "rnp", "anp", "mnp")
LEFT = 0.5  # ASR of a network that counts as missed where the oracle reaches 10 %


@dataclass(frozen=True)
class ScanOnce(Scan):
    """The scan of a network is made once; all rankings of it ask the same."""

    made: ClassVar[dict[str, Diagnosis]] = {}

    def __call__(self, *args: Any, **settings: Any) -> Diagnosis:
        if "scan" not in self.made:
            self.made["scan"] = super().__call__(*args, **settings)
        return self.made["scan"]


@dataclass(frozen=True)
class InvertOnce(Inversion):
    """So are the suspected label's further triggers, in the network as it was given."""

    made: ClassVar[dict[int, tuple[RecoveredTrigger, ...]]] = {}

    def recover(self, *args: Any, **settings: Any) -> tuple[RecoveredTrigger, ...]:
        seed = settings["seed"]
        if seed not in self.made:
            self.made[seed] = super().recover(*args, **settings)
        return self.made[seed]


def execute(member: Member, models: Path, runs: Path, out: Path) -> None:
    """Select by `auto` for every method whose scores are there, and measure."""
    ScanOnce.made.clear()
    InvertOnce.made.clear()
    auto = Auto(evidence=ScanOnce(), gone=TriggerGone(inversion=InvertOnce()))
    for method in METHODS:
        run, place = (
            runs / f"{member.name}__{method}__500__0.json",
            out / f"{member.name}__{method}",
        )
        if not run.exists() or place.with_suffix(".json").exists():
            continue
        made = json.loads(run.read_text())
        if "error" in made:
            continue
        model = member.load(models).requires_grad_(False).to(memory_format=torch.channels_last)
        scores = ChannelScores.load(run.with_suffix(".safetensors"))
        scoring, selecting, _ = clean_set(500, 0).split(0.6, 0.25, 0.15, seed=0)
        held_out = HeldOut(model, scores.sites, selecting, scored=scoring)
        with private_randomness(0):
            selection = auto(scores, held_out)
        measured = Hidden.of(member).measure(partial(held_out.predict, selection), MEASURED)
        row = {key: made[key] for key in ("name", "arch", "attack", "method", "before")}
        row |= {"accuracy": made["selections"]["accuracy"], "start": made["curve"][0]}
        row |= {"oracle": oracle(made) if member.attack else None}
        row["auto"] = {"neurons": len(selection), "reason": selection.reason, **measured}
        row["alarm"] = "target" in selection.details
        targets = member.target if isinstance(member.target, int) else None  # all to all: several
        row["target_right"] = row["alarm"] and selection.details["target"] == targets
        part = place.with_suffix(".part")
        part.write_text(json.dumps(row) + "\n")
        part.replace(place.with_suffix(".json"))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| method | networks | DER: auto | default | oracle | ASR: auto | default | oracle "
        "| oracle <= 10 %, auto > 50 % | ACC drop: auto | default |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method and row["attack"]]
        if not mine:
            continue

        def over(
            value: Callable[[dict[str, Any], str], float], way: str, some: Any = mine
        ) -> float:
            return mean(value(row, way) for row in some)

        ways = ("auto", "accuracy", "oracle")
        easy = [row for row in mine if row["oracle"]["asr"] <= 0.1]
        missed = sum(row["auto"]["asr"] > LEFT for row in easy)
        cells = [method, str(len(mine)), *(f"{over(der, way):.3f}" for way in ways)]
        cells += [percent(over(lambda row, way: row[way]["asr"], way)) for way in ways]
        cells += [f"{missed} of {len(easy)}"]
        cells += [percent(over(drop, way)) for way in ways[:2]]
        lines.append(f"| {' | '.join(cells)} |")
    benign = [row for row in rows if not row["attack"]]
    names = {row["name"] for row in benign}
    cut = {row["name"] for row in benign if row["auto"]["neurons"]}
    first = list({row["name"]: row for row in rows if row["attack"]}.values())
    worst = max((drop(row, "auto") for row in benign), default=0.0)
    lines += [
        "",
        f"Of {len(names)} benign networks `auto` pruned {len(cut)}; worst loss of ACC "
        f"{percent(worst)} points. An alarm was raised, and the label named rightly, on "
        f"{sum(r['alarm'] for r in first)} and {sum(r['target_right'] for r in first)} of "
        f"{len(first)} backdoored ones.",
    ]
    return "\n".join(lines)


def before(row: dict[str, Any], way: str) -> dict[str, float]:
    """The oracle is chosen and measured on the curve's own images."""
    rates: dict[str, float] = row["start" if way == "oracle" else "before"]
    return rates


def drop(row: dict[str, Any], way: str) -> float:
    return before(row, way)["acc"] - float(row[way]["acc"])


def der(row: dict[str, Any], way: str) -> float:
    old, new = before(row, way), row[way]
    return defense_effectiveness(old["acc"], old["asr"], new["acc"], new["asr"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=Path, help="folder of the zoo's weights")
    parser.add_argument("--runs", type=Path, help="folder of efficacy.py's runs")
    parser.add_argument("--out", type=Path, required=True, help="folder, a JSON each run")
    parser.add_argument("--only", nargs="+", help="networks: names, or parts of them")
    parser.add_argument("--fresh", action="store_true", help="the networks of zoo.py's `fresh`")
    parser.add_argument("--collect", action="store_true", help="write results/auto.json, render")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    zoo = fresh() if options.fresh else members()
    if options.collect:
        names = {member.name for member in zoo}
        rows = [json.loads(file.read_text()) for file in sorted(options.out.glob("*.json"))]
        rows = [row for row in rows if row["name"] in names]
        which = "auto fresh" if options.fresh else "auto"
        found = RESULTS / f"{which.replace(' ', '_')}.json"
        found.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        fill(DOCS / "diagnosis.md", which, table(rows))
        return
    torch.set_num_threads(1)
    known = records()
    zoo = [m for m in zoo if m.name in known and m.file(options.models).exists()]
    zoo = [m for m in zoo if not options.only or any(o in m.name for o in options.only)]
    for member in tqdm(zoo, desc="networks"):
        execute(member, options.models, options.runs, options.out)


if __name__ == "__main__":
    main()
