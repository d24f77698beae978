"""How long `purify` and `scan` take, and what they say beforehand.

    python -m benchmarks.cost.waiting --young DIR [--only NAME ...]  # nothing else may run
    python -m benchmarks.cost.waiting --young DIR --busy             # processor time of one thread
    python -m benchmarks.cost.waiting --render

On networks of benchmarks.networks.zoo, at default settings, with 500 images to purify and 300 to
scan. The estimate is made as the calls make it, from passes that are timed before anything else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.efficacy.efficacy import clean_set
from benchmarks.networks import zoo
from benchmarks.render import DOCS, RESULTS, fill
from nnprune_backdoor import CleanData, Compute, purify, scan
from nnprune_backdoor.core.passes import Task, expected
from nnprune_backdoor.core.prepared import Prepared
from nnprune_backdoor.evidence.scanning import Scan
from nnprune_backdoor.pipeline.job import Job
from nnprune_backdoor.pipeline.kept import KeptIn
from nnprune_backdoor.pipeline.options import Options
from nnprune_backdoor.pipeline.planning import passes_of
from nnprune_backdoor.utils import progress

RESULT = RESULTS / "waiting.json"
NETWORKS = (
    "resnet-badnets-short-0",
    "mobilenet-badnets-short-0",
    "repvgg-badnets-short-0",
    "convnext-badnets-short-0",
    "vit-badnets-short-0",
)
NAMES = {
    "resnet": "ResNet-18, half as wide",
    "mobilenet": "MobileNetV3-Small, half as wide",
    "repvgg": "RepVGG, 6 blocks",
    "convnext": "ConvNeXt-Atto, narrowed",
    "vit": "ViT-Tiny, 4 blocks",
    "resnet10t": "ResNet-10-T",
    "regnet": "RegNetX-200MF",
    "densenet": "DenseNet, 16 layers",
}


def estimated_purify(model: nn.Module, clean: CleanData) -> dict[str, float | None]:
    """Stage -> seconds, as `purify` says them."""
    options = Options.of(
        "rnp",
        {},
        None,
        None,
        None,
        removal="exact",
        shares=(0.6, 0.25, 0.15),
        compute=Compute(),
        progress=False,
        kept_in=KeptIn(),
    )
    prepared = Prepared.of(model, clean)
    job = Job(model, prepared, options, 0)
    neurons = sum(site.channels for site in prepared.sites)
    task = Task.of(prepared.model, clean.images, prepared.classes, neurons)
    return expected(passes_of(job, task), prepared.model, clean.images, prepared.sites).seconds


def estimated_scan(model: nn.Module, clean: CleanData) -> dict[str, float | None]:
    """Stage -> seconds, as `scan` says them."""
    prepared = Prepared.of(model, clean)
    task = Task.of(prepared.model, clean.images, prepared.classes)
    work = Scan().passes(task)
    return expected(work, prepared.model, clean.images, prepared.sites).seconds


def measured(name: str, folder: Path, command: str) -> dict[str, Any]:
    """What was said and what was needed, in seconds of `progress.timer`."""
    every = [*zoo.members(), *zoo.others(), *zoo.unseen()]
    member = next(one for one in every if one.name == name)
    model = member.load(folder)
    images = 500 if command == "purify" else 300
    clean = clean_set(500, 0)
    start = progress.timer()
    if command == "purify":
        said = estimated_purify(model, clean)
    else:
        clean = CleanData(clean.images[:images])
        said = estimated_scan(model, clean)
    estimating = progress.timer() - start
    work = purify if command == "purify" else scan
    start = progress.timer()
    done = work(model, clean, progress=False)
    took = progress.timer() - start
    return {
        "network": name,
        "arch": member.arch,
        "command": command,
        "images": images,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "said": round(sum(filter(None, said.values())), 1),
        "took": round(took, 1),
        "estimating": round(estimating, 1),
        "said_stages": {stage: seconds and round(seconds, 1) for stage, seconds in said.items()},
        "took_stages": {stage: round(seconds, 1) for stage, seconds in done.seconds.items()},
        "threads": torch.get_num_threads(),
        "seconds": "of the processor" if progress.timer is time.process_time else "on the wall",
        "load": round(os.getloadavg()[0], 1),
        "processor": platform.machine(),
        "torch": torch.__version__,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| network | parameters | `purify` said | took | | `scan` said | took | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arch in dict.fromkeys(row["arch"] for row in rows):
        mine = {row["command"]: row for row in rows if row["arch"] == arch}
        cells = [NAMES[arch], f"{mine['purify']['parameters'] / 1e6:.2f} M"]
        for command in ("purify", "scan"):
            said, took = mine[command]["said"], mine[command]["took"]
            cells += [f"{said:.0f} s", f"{took:.0f} s", f"x {took / said:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def stages(rows: list[dict[str, Any]]) -> str:
    lines = ["| network | stage | said | took |", "|---|---|---|---|"]
    for row in rows:
        for stage, took in row["took_stages"].items():
            said = row["said_stages"].get(stage)
            if max(took, said or 0) >= 1:
                shown = "" if said is None else f"{said:.0f} s"
                where = f"{NAMES[row['arch']]}, `{row['command']}`"
                lines.append(f"| {where} | {stage} | {shown} | {took:.0f} s |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--young", type=Path, help="folder of the zoo's weights")
    parser.add_argument("--only", nargs="+", default=[*NETWORKS], help="names of networks")
    parser.add_argument("--commands", nargs="+", default=["purify", "scan"])
    parser.add_argument("--busy", action="store_true", help="other work runs on the machine")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--render", action="store_true", help="fill in docs/results/waiting.md")
    options = parser.parse_args()
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    if options.render:
        fill(DOCS / "waiting.md", "waiting", table(rows))
        fill(DOCS / "waiting.md", "stages", stages(rows))
        return
    torch.set_num_threads(1 if options.busy else 2)
    if options.busy:
        progress.timer = time.process_time
    for name in options.only:
        for command in options.commands:
            row = measured(name, options.young, command)
            print(json.dumps(row), flush=True)
            key = (name, command)
            rows = [one for one in rows if (one["network"], one["command"]) != key] + [row]
            options.out.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
