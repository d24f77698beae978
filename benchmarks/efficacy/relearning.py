"""How soon a backdoor is relearned: as given, silenced, repaired, and by a benign network.

    python -m benchmarks.efficacy.relearning --models DIR --runs DIR2  # -> results, docs

DIR2 is where efficacy.py put its runs; `tac`'s scores of the first clean set are taken. Each
network is probed (`relearn`) with the attacker's trigger and with one that was recovered from it;
so is the benign network of the same architecture, which has never seen either.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.efficacy.efficacy import _repaired, clean_set
from benchmarks.networks.zoo import members
from benchmarks.render import DOCS, RESULTS, fill
from nnprune_backdoor.core.held_out import HeldOut
from nnprune_backdoor.core.masks import silence_
from nnprune_backdoor.core.scores import ChannelScores
from nnprune_backdoor.demo import normalise
from nnprune_backdoor.evidence import relearn
from nnprune_backdoor.selectors import TriggerGone
from nnprune_backdoor.utils.randomness import private_randomness

ARCHITECTURES = ("resnet", "mobilenet", "repvgg", "convnext", "vit")
ATTACKS = ("badnets", "blended", "adaptive_blend")
STATES = ("given", "silenced", "repaired", "benign")
FOUND = RESULTS / "relearning.json"


def row(arch: str, attack: str, models: Path, runs: Path) -> dict[str, Any] | None:
    """Steps to half success by state and trigger; None where the network or a run is missing."""
    zoo = {member.name: member for member in members()}
    bad, good = (zoo[f"{arch}-{name}-short-0"] for name in (attack, "benign"))
    run = runs / f"{bad.name}__tac__500__0.safetensors"
    if not run.exists() or not good.file(models).exists():
        return None
    model, benign = (member.load(models).requires_grad_(False) for member in (bad, good))
    clean, scores = clean_set(500, 0), ChannelScores.load(run)
    scoring, selecting, _ = clean.split(0.6, 0.25, 0.15, seed=0)
    held_out = HeldOut(model, scores.sites, selecting)
    with private_randomness(0):
        selection = TriggerGone()(scores, held_out)
    silenced = copy.deepcopy(model)
    silence_(silenced, selection)
    repaired, repair_rejected = _repaired(model, (scoring, selecting), scores, selection, 0)
    recovered = (*selection.triggers, *scores.triggers)[0]

    def true(images: torch.Tensor) -> torch.Tensor:
        return normalise(bad.trigger((images / 2 + 0.5).clamp(0, 1)))  # type: ignore[misc]

    found: dict[str, Any] = {"name": bad.name, "neurons": len(selection)}
    found["undone"] = repair_rejected
    for name, stamp, target in (
        ("true", true, bad.target),
        ("recovered", recovered, recovered.target),
    ):
        for state, net in zip(STATES, (model, silenced, repaired, benign), strict=True):
            probe = relearn(net, clean, stamp, target, progress=False)
            found[f"{name}, {state}"] = probe.steps_to_half
    return found


def table(rows: list[dict[str, Any]]) -> str:
    columns = [f"{name}, {state}" for name in ("true", "recovered") for state in STATES]
    lines = [
        "| network | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for one in rows:
        cells = ["never" if one[key] is None else str(one[key]) for key in columns]
        lines.append(f"| {one['name']} | {' | '.join(cells)} |")
    never = 31  # steps; 30 are made
    middle = [median(never if one[key] is None else one[key] for one in rows) for key in columns]
    cells = ["never" if value == never else f"{value:g}" for value in middle]
    lines.append(f"| median | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=Path, required=True, help="folder of the zoo's weights")
    parser.add_argument("--runs", type=Path, required=True, help="folder of efficacy.py's runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for arch, attack in tqdm([(a, b) for b in ATTACKS for a in ARCHITECTURES], desc="networks"):
        found = row(arch, attack, options.models, options.runs)
        if found is not None:
            rows.append(found)
            FOUND.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
            fill(DOCS / "diagnosis.md", "relearning", table(rows))


if __name__ == "__main__":
    main()
