"""Mask training that stops once it has settled, in bfloat16: what it saves and what it changes.

    OMP_NUM_THREADS=1 python benchmarks/sooner.py --models DIR      # the zoo's folder of weights

On trained networks of the zoo: `paper()` as published with two seeds, whose difference is the
noise, and with `settle` and bfloat16. Each is selected from by clean images, as `purify` does, and
by the share that CNP's authors take; ACC and ASR are of 1,000 hidden images. Seconds are CPU
seconds of one thread. The published loop (reference_loops.py) is run for one part of its steps and
for two, and reckoned from that: it is linear.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import reference_loops
import torch
from efficacy import MEASURED, Hidden, clean_set
from render import DOCS, RESULTS, fill, percent
from speed import differences
from torch import nn
from zoo import Member, members

from nnprune_backdoor import (
    ANP,
    CNP,
    RNP,
    AccuracyBudget,
    ChannelScores,
    CleanData,
    Compute,
    Criterion,
    LowestFraction,
    Selector,
    Site,
    find_sites,
)
from nnprune_backdoor.evaluation import predict
from nnprune_backdoor.selection import HeldOut

FOUND = RESULTS / "sooner.json"
PARTS = 100  # of the published loop's steps
SELECTORS: dict[str, Selector] = {"accuracy": AccuracyBudget(), "1 %": LowestFraction(0.01)}
CRITERIA: dict[str, Criterion] = {"anp": ANP.paper(), "rnp": RNP.paper(), "cnp": CNP.paper()}
FAST = Compute(precision="bfloat16", channels_last=True)


def ways(criterion: Any) -> dict[str, tuple[Criterion, int, Compute]]:
    """Criterion, seed and compute of each way."""
    return {
        "paper": (criterion, 0, Compute()),
        "paper, other seed": (criterion, 1, Compute()),
        "bfloat16": (criterion, 0, FAST),
        "settled": (replace(criterion, settle=0.9), 0, Compute()),
        "settled, bfloat16": (replace(criterion, settle=0.9), 0, FAST),
    }


def loop_seconds(
    method: str, criterion: Any, model: nn.Module, clean: CleanData, sites: tuple[Site, ...]
) -> float:
    """What the published loop takes for all of its steps."""
    loop = getattr(reference_loops, method)
    if isinstance(criterion, RNP):
        return seconds_of(partial(loop, criterion, model, clean, sites))
    long = [key for key in ("steps", "mask_steps") if hasattr(criterion, key)]
    one, two = (
        seconds_of(
            partial(
                loop,
                replace(criterion, **{key: k * getattr(criterion, key) // PARTS for key in long}),
                model,
                clean,
                sites,
            )
        )
        for k in (1, 2)
    )
    return one + (PARTS - 1) * (two - one)


def seconds_of(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def run(member: Member, method: str, names: list[str], models: Path) -> dict[str, Any]:
    """All ways of one criterion on one network."""
    criterion, model = CRITERIA[method], member.load(models).requires_grad_(False)
    scoring, selecting, _ = clean_set(500, 0).split(0.6, 0.25, 0.15, seed=0)  # as purify does
    sites, hidden = find_sites(model, scoring.images[:2]), Hidden.of(member)
    held_out = HeldOut(model, sites, selecting)
    published: ChannelScores | None = None
    row: dict[str, Any] = {"network": member.name, "method": method, "ways": {}}
    row["before"] = hidden.measure(partial(predict, model), MEASURED)
    model.requires_grad_(True)  # as a network comes
    row["loop_seconds"] = round(loop_seconds(method, criterion, model, scoring, sites), 1)
    for name, (one, seed, compute) in ways(criterion).items():
        if name not in names:
            continue
        start = time.process_time()
        scores = one(model, scoring, sites=sites, seed=seed, compute=compute, progress=False)
        found: dict[str, Any] = {"seconds": round(time.process_time() - start, 1)}
        found["mask_steps"] = scores.details["mask_steps"]
        published = scores if published is None else published
        found["ranks"] = differences(published.flat, scores.flat)
        for selector, select in SELECTORS.items():
            selection = select(scores, held_out)
            rates = hidden.measure(partial(held_out.predict, selection), MEASURED)
            found[selector] = {"neurons": len(selection), **rates}
        row["ways"][name] = found
        print(member.name, method, name, json.dumps(found), flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| network | method | way | mask steps | CPU seconds | faster than the loop "
        "| lowest 2 % shared | ACC, ASR: accuracy budget | ACC, ASR: 1 % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = [row["network"], row["method"]]
        before = f"{percent(row['before']['acc'])}, {percent(row['before']['asr'])}"
        cells = [*start, "loop, reckoned", "", f"{row['loop_seconds']:.0f}", "1.0", "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
        lines.append(f"| {' | '.join([*start, 'as given', '', '', '', '', before, before])} |")
        for name, found in row["ways"].items():
            faster = row["loop_seconds"] / found["seconds"]
            cells = [*start, name, str(found["mask_steps"]), f"{found['seconds']:.0f}"]
            cells += [f"{faster:.1f}", f"{found['ranks']['lowest_shared']:.0%}"]
            cells += [
                f"{percent(found[selector]['acc'])}, {percent(found[selector]['asr'])} "
                f"({found[selector]['neurons']})"
                for selector in SELECTORS
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=Path, help="folder of the zoo's weights")
    parser.add_argument("--only", nargs="+", default=["resnet-badnets-short-1"])
    parser.add_argument("--methods", nargs="+", default=[*CRITERIA], choices=[*CRITERIA])
    names = [*ways(ANP.paper())]
    parser.add_argument("--ways", nargs="+", default=names, choices=names)
    options = parser.parse_args()
    rows = json.loads(FOUND.read_text()) if FOUND.exists() else []
    if options.models is not None:
        torch.set_num_threads(1)
        zoo = {member.name: member for member in members()}
        for name in options.only:
            for method in options.methods:
                found = run(zoo[name], method, options.ways, options.models)
                rows = [r for r in rows if (r["network"], r["method"]) != (name, method)] + [found]
                FOUND.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    fill(DOCS / "speed.md", "sooner", table(rows))


if __name__ == "__main__":
    main()
