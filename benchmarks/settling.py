"""How masks move while they are trained, and where the rule for stopping would end their training.

    python benchmarks/settling.py --models DIR --record RUNS --methods cnp --seeds 0 1
    python benchmarks/settling.py --models DIR --judge RUNS            # -> docs/speed.md

`paper()` settings on trained networks of the zoo, all of their steps, 300 scoring images. A run is
recorded (a look every 20 steps, RNP every 5) and judged afterwards: the rule reads the looks alone.
ACC and ASR are of 1,000 hidden images, with the neurons silenced that `AccuracyBudget` takes, and
with the lowest 1 %, which is CNP's authors' share.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from efficacy import MEASURED, Hidden, clean_set
from render import DOCS, RESULTS, fill, percent
from safetensors.torch import load_file, save_file
from speed import differences
from torch import Tensor
from zoo import ZOOS

from nnprune_backdoor import (
    ANP,
    CNP,
    RNP,
    AccuracyBudget,
    ChannelScores,
    Compute,
    Criterion,
    LowestFraction,
    Selector,
    find_sites,
)
from nnprune_backdoor.criteria.settling import Settling
from nnprune_backdoor.selection import HeldOut

FOUND = RESULTS / "settling.json"
CRITERIA: dict[str, Criterion] = {"anp": ANP.paper(), "cnp": CNP.paper(), "rnp": RNP.paper()}
COMPUTE = {"float32": Compute(), "bfloat16": Compute(precision="bfloat16", channels_last=True)}
EVERY = {"anp": 20, "cnp": 20, "rnp": 5}
ALIKE = 0.9
SELECTORS: dict[str, Selector] = {"accuracy": AccuracyBudget(), "1 %": LowestFraction(0.01)}
NETWORKS = {member.name: member for zoo in ZOOS.values() for member in zoo()}


@dataclass(frozen=True)
class Run:
    """Of one criterion on one network."""

    network: str
    method: str
    seed: int
    precision: str

    def file(self, folder: Path) -> Path:
        return folder / f"{self.network}.{self.method}.{self.seed}.{self.precision}.safetensors"

    def record(self, models: Path, device: str) -> dict[str, Tensor]:
        """Masks (looks, number of neurons), and the seconds that it took."""
        looks: list[Tensor] = []

        class Recorder(Settling):
            def __call__(self, masks: Tensor) -> bool:
                stop = super().__call__(masks)
                if self.steps % every == 0:
                    looks.append(masks.detach().float().cpu().clone())
                return stop

        every, member = EVERY[self.method], NETWORKS[self.network]
        model = member.load(models).requires_grad_(False).to(device)
        scoring = clean_set(500, 0).split(0.6, 0.25, 0.15, seed=0)[0]  # as purify does
        sites = find_sites(model, scoring.images[:2].to(device))
        start = time.perf_counter()
        with mock.patch(f"nnprune_backdoor.criteria.{self.method}.Settling", Recorder):
            CRITERIA[self.method](
                model, scoring, sites=sites, seed=self.seed, compute=COMPUTE[self.precision]
            )
        return {"looks": torch.stack(looks), "seconds": torch.tensor(time.perf_counter() - start)}


def settled_at(looks: Tensor) -> int | None:
    """The look (from 1) at which the rule stops, if it does."""
    rule = Settling(ALIKE, every=1)
    return next((number for number, masks in enumerate(looks, 1) if rule(masks)), None)


def judge(run: Run, runs: Path, models: Path) -> dict[str, Any]:
    """The masks of a run's end beside those of other ways to get some."""
    every, looks = EVERY[run.method], load_file(run.file(runs))["looks"]
    ways = {
        f"all {every * len(looks)} steps": looks[-1],
        "nine tenths of them": looks[round(0.9 * len(looks)) - 1],
        "a quarter of them": looks[round(0.25 * len(looks)) - 1],
    }
    stop = settled_at(looks)
    ways |= {} if stop is None else {f"settled, {every * stop} steps": looks[stop - 1]}
    others = {
        "other seed": Run(run.network, run.method, 1, run.precision),
        "bfloat16": Run(run.network, run.method, run.seed, "bfloat16"),
    }
    for name, other in others.items():
        if other.file(runs).exists() and other != run:
            found = load_file(other.file(runs))["looks"]
            ways |= {name: found[-1], f"{name}, a quarter": found[round(0.25 * len(found)) - 1]}
    member = NETWORKS[run.network]
    model, hidden = member.load(models).requires_grad_(False), Hidden.of(member)
    _, selecting, _ = clean_set(500, 0).split(0.6, 0.25, 0.15, seed=0)
    sites = find_sites(model, selecting.images[:2])
    held_out = HeldOut(model, sites, selecting)
    row: dict[str, Any] = {
        "network": run.network,
        "method": run.method,
        "settled": stop,
        "ways": {},
    }
    for name, masks in ways.items():
        way = row["ways"][name] = {
            "shared": round(differences(looks[-1], masks)["lowest_shared"], 3)
        }
        for selector, select in SELECTORS.items():
            selection = select(ChannelScores(sites, masks, name), held_out)
            rates = hidden.measure(partial(held_out.predict, selection), MEASURED)
            way[selector] = {"neurons": len(selection), **rates}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| network | method | masks | lowest 2 % shared | ACC, ASR: accuracy budget "
        "| ACC, ASR: 1 % |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        for name, found in row["ways"].items():
            cells = [row["network"], row["method"], name, f"{found['shared']:.0%}"]
            cells += [
                f"{percent(found[selector]['acc'])}, {percent(found[selector]['asr'])} "
                f"({found[selector]['neurons']})"
                for selector in SELECTORS
            ]
            lines.append(f"| {' | '.join(cells)} |")
        if row["settled"] is None:
            lines.append(f"| {row['network']} | {row['method']} | the rule never stops | | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--models", type=Path, required=True, help="folder of the zoo's weights")
    parser.add_argument("--record", type=Path, help="folder for runs")
    parser.add_argument("--judge", type=Path, help="folder of runs: judge those with seed 0")
    parser.add_argument("--only", nargs="+", default=["resnet-badnets-short-1"])
    parser.add_argument("--methods", nargs="+", default=[*CRITERIA], choices=[*CRITERIA])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--precision", default="float32", choices=[*COMPUTE])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options: Any = parser.parse_args()
    torch.set_num_threads(1)
    if options.judge:
        names = sorted(file.name.split(".") for file in options.judge.glob("*.0.*.safetensors"))
        recorded = {(name[0], name[1]): name[3] for name in names}  # float32 comes last
        runs = [Run(*which, 0, precision) for which, precision in recorded.items()]
        rows = [judge(run, options.judge, options.models) for run in runs]
        FOUND.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        fill(DOCS / "speed.md", "settling", table(rows))
        return
    options.record.mkdir(parents=True, exist_ok=True)
    for network in options.only:
        for method in options.methods:
            for seed in options.seeds:
                run = Run(network, method, seed, options.precision)
                found = run.record(options.models, options.device)
                save_file(found, run.file(options.record))
                print(run, found["looks"].shape, f"{found['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
