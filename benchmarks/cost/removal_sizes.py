"""What removing a tenth of the private channels does to size and speed.

    python -m benchmarks.cost.removal_sizes --out benchmarks/results/removal_sizes.json

Private means: goes alone when it is silent. Found here by silencing half of all neurons at random,
and taking the layers of which every silent neuron could be removed. Then, in a fresh copy, a tenth
of each of those layers. Latency of a batch of four on one thread, before and after in turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks.timm_coverage import build
from nnprune_backdoor.core.masks import silence_
from nnprune_backdoor.core.scores import Selection
from nnprune_backdoor.core.sites import Neuron, Site, find_sites
from nnprune_backdoor.removal import compact

MODELS = (
    "resnet18",
    "resnet50",
    "mobilenetv3_small_100",
    "efficientnet_b0",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "densenet121",
    "regnety_002",
    "nfnet_l0",
    "vgg11_bn",
)


def some(sites: tuple[Site, ...], share: float) -> Selection:
    """A share of each site's channels, at random."""
    generator = torch.Generator().manual_seed(0)
    neurons = []
    for site in sites:
        order = torch.randperm(site.channels, generator=generator)
        neurons += [Neuron(site.name, c) for c in order[: round(share * site.channels)].tolist()]
    return Selection(sites, tuple(neurons))


def cut(model: nn.Module, selection: Selection, images: Tensor) -> tuple[nn.Module, Any]:
    silent = copy.deepcopy(model)
    silence_(silent, selection)
    return compact(silent, selection, images)


def latencies(models: tuple[nn.Module, ...], images: Tensor, repeats: int = 15) -> list[float]:
    """Median seconds of each model, measured in turns."""
    seconds: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in range(repeats):
            for model, mine in zip(models, seconds, strict=True):
                start = time.perf_counter()
                model(images)
                mine.append(time.perf_counter() - start)
    return [statistics.median(mine) for mine in seconds]


def row(name: str) -> dict[str, Any]:
    model, images = build(name)
    sites = find_sites(model, images[:2])
    _, half = cut(model, some(sites, 0.5), images)
    stuck = {neuron.site for neuron in half.silenced}
    private = tuple(site for site in sites if site.name not in stuck)
    selection = some(private, 0.1)
    smaller, report = cut(model, selection, images)
    before, after = latencies((model, smaller), images)
    return {
        "model": name,
        "neurons": sum(site.channels for site in sites),
        "private": sum(site.channels for site in private),
        "selected": len(selection),
        "removed": len(report.removed),
        "drift": report.drift,
        "parameters": [report.before.parameters, report.after.parameters],
        "macs": [report.before.macs, report.after.macs],
        "latency": [before, after],
        "removal_seconds": round(report.seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.models:
        rows.append(row(name))
        print(json.dumps(rows[-1]), flush=True)
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
