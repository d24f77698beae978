"""What a ranking costs: the library, the published loops (reference_loops.py), and the floor.

    OMP_NUM_THREADS=1 python -m benchmarks.cost.speed --out benchmarks/results/speed.json
    python -m benchmarks.cost.speed --device cuda --out benchmarks/results/speed_gpu.json
    python -m benchmarks.cost.speed_page

Published settings (`paper()`: trained masks), cut to so few iterations and images that a small
machine gets through them; all ways do the same number of iterations on the same random numbers.
One thread; the ways take turns, a round each, so that a busy machine hits all alike; seconds are
CPU seconds of the process. Networks have random weights: what a pass costs does not depend on them.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cost import reference_loops
from benchmarks.cost.counting import count
from nnprune_backdoor import CleanData, Compute, Criterion
from nnprune_backdoor.core.norms import use_statistics_
from nnprune_backdoor.core.sites import Site, find_sites
from nnprune_backdoor.criteria import ANP, CNP, MNP, RNP

CLASSES = 8  # no more than there are images: two batches of four
STEPS = {"cpu": 2, "cuda": 4}
ARCHITECTURES: dict[str, tuple[str, int, int]] = {  # timm name, pixels, images a batch
    "ResNet-18, 32 px": ("resnet18", 32, 8),
    "MobileNetV3 small": ("mobilenetv3_small_100", 224, 8),
    "ViT tiny": ("vit_tiny_patch16_224", 224, 4),
    "ConvNeXt atto": ("convnext_atto", 224, 4),
    "ResNet-18, 224 px": ("resnet18", 224, 4),
}
LARGE: dict[str, tuple[str, int, int]] = {
    "ResNet-50, 224 px": ("resnet50", 224, 64),
    "ViT-B/16, 224 px": ("vit_base_patch16_224", 224, 64),
}


def build(name: str, pixels: int, classes: int = CLASSES) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=classes)
    if pixels == 32:  # the stem that is used at this size
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    with torch.no_grad():
        for module in model.modules():  # timm starts the last gamma of a block at 0
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(1.0)
    return model.eval()


def images_for(pixels: int, number: int) -> CleanData:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(number) % CLASSES
    return CleanData(torch.randn(number, 3, pixels, pixels, generator=generator), labels)


def criteria(batch: int, steps: int) -> dict[str, Criterion]:
    """The published settings, phases shortened about alike."""
    anp, rnp, cnp, mnp = ANP.paper(), RNP.paper(), CNP.paper(), MNP.paper()
    unlearning: dict[str, Any] = {
        "batch_size": batch,
        "epochs": 1,
        "stop": -1.0,
        "missed": "flag",
    }
    return {
        "anp": replace(anp, ranking=replace(anp.ranking, batch_size=batch, steps=steps)),
        "rnp": replace(
            rnp,
            unlearning=replace(rnp.unlearning, **unlearning),
            ranking=replace(rnp.ranking, batch_size=batch, epochs=1),
        ),
        "cnp": replace(
            cnp,
            batch_size=batch,
            noise_passes=1,
            steps=1,
            ranking=replace(cnp.ranking, batch_size=batch, steps=steps),
        ),
        "mnp": replace(
            mnp,
            unlearning=replace(mnp.unlearning, **unlearning),
            ranking=replace(mnp.ranking, batch_size=batch, steps=2 * steps),
        ),
    }


# forward passes of a batch in the settings above with two steps, two batches an epoch
PASSES = {"anp": 2 * 3, "rnp": 2 + 2, "cnp": 2 * 3 + 1 + 2 * 6, "mnp": 2 + 4 * 2}


class Floor:
    """The passes that each algorithm cannot do without, of the plain network and nothing else."""

    def __init__(self, model: nn.Module, clean: CleanData, sites: tuple[Site, ...]) -> None:
        self.model, self.clean = model, clean
        self.scored = [model.get_submodule(site.name) for site in sites]

    def __call__(self, criterion: Any) -> None:
        device = next(self.model.parameters()).device
        size, ranking = criterion.ranking.batch_size, criterion.ranking
        batch = self.clean.take(torch.arange(size))
        batch = CleanData(batch.images.to(device), batch.targets.to(device))
        epoch = -(-len(self.clean) // size)
        if isinstance(criterion, ANP):
            self.masks(batch, ranking.steps * (criterion.noise_steps + 2))
        elif isinstance(criterion, RNP):
            self.weights(batch, criterion.unlearning.epochs * epoch)
            self.masks(batch, ranking.epochs * epoch)
        elif isinstance(criterion, MNP):
            self.weights(batch, criterion.unlearning.epochs * epoch)
            self.masks(batch, 2 * ranking.steps)
        elif isinstance(criterion, CNP):
            draws = -(-criterion.noise_passes * len(self.clean) // size)
            self.masks(batch, draws, "running")
            self.forwards(batch, 2 * draws, "running")
            self.images(batch, criterion.steps)
            self.masks(batch, ranking.steps * 4)
            self.forwards(batch, ranking.steps * 2)

    def masks(self, batch: CleanData, passes: int, statistics: Any = "batch") -> None:
        """Forward, and backward to what the masks and noises multiply."""
        self.model.requires_grad_(False)
        for layer in self.scored:  # a gamma or bias costs what a mask costs; a weight far more
            for parameter in layer.parameters():
                parameter.requires_grad_(parameter.ndim == 1)
        self._passes(batch, passes, statistics)

    def weights(self, batch: CleanData, passes: int) -> None:
        """Forward, and backward to all weights."""
        self.model.requires_grad_(True)
        self._passes(batch, passes, "batch")

    def images(self, batch: CleanData, passes: int) -> None:
        self.model.requires_grad_(False)
        images = batch.images.clone().requires_grad_(True)
        self._passes(CleanData(images, batch.targets), passes, "running")

    def forwards(self, batch: CleanData, passes: int, statistics: Any = "batch") -> None:
        use_statistics_(self.model, statistics)
        with torch.no_grad():
            for _ in range(passes):
                self.model(batch.images)

    def _passes(self, batch: CleanData, passes: int, statistics: Any) -> None:
        use_statistics_(self.model, statistics)
        for _ in range(passes):
            self.model.zero_grad(set_to_none=True)
            F.cross_entropy(self.model(batch.images), batch.targets).backward()


def ways(
    criterion: Criterion, model: nn.Module, clean: CleanData, sites: tuple[Site, ...]
) -> dict[str, Callable[[], Tensor | None]]:
    name = type(criterion).__name__.lower()
    floor = Floor(model, clean, sites)

    def library(compute: Compute) -> Callable[[], Tensor]:
        return lambda: criterion(model, clean, sites=sites, compute=compute).flat

    return {
        "reference": lambda: getattr(reference_loops, name)(criterion, model, clean, sites),
        "library": library(Compute()),
        "channels_last": library(Compute(channels_last=True)),
        "bfloat16": library(Compute(precision="bfloat16")),
        "both": library(Compute(precision="bfloat16", channels_last=True)),
        "floor": lambda: floor(criterion),
    }


def timed(work: Callable[[], Any], device: str) -> tuple[dict[str, float], Any]:
    """What work took (CPU and wall seconds, on a GPU its peak memory in MB) and what it gave."""
    if device == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    took = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    if device == "cuda":
        took["gpu_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return {name: round(value, 4) for name, value in took.items()}, result


def row(architecture: str, method: str, rounds: int, device: str) -> dict[str, Any]:
    timm_name, pixels, batch = (ARCHITECTURES | LARGE)[architecture]
    steps = STEPS[device]
    model, clean = build(timm_name, pixels).to(device), images_for(pixels, steps * batch)
    sites = find_sites(model, clean.images[:2].to(device))
    criterion = criteria(batch, steps)[method]
    doing = ways(criterion, model, clean, sites)
    if device == "cuda":
        del doing["channels_last"], doing["bfloat16"]  # in "both"
    found: dict[str, Any] = {
        "architecture": architecture,
        "method": method,
        "criterion": repr(criterion),
        "neurons": sum(site.channels for site in sites),
        "images": len(clean),
        "ways": {name: {} for name in doing},
    }
    scores: dict[str, Tensor] = {}
    for number in range(rounds + (device == "cuda")):
        for name, work in doing.items():
            model.requires_grad_(True).eval()
            try:
                took, result = timed(work, device)
            except torch.OutOfMemoryError as error:
                found["ways"][name]["error"] = str(error)[:100]
                continue
            if number == 0 and device == "cuda":
                continue  # kernels are chosen and loaded
            for what, value in took.items():
                found["ways"][name].setdefault(what, []).append(value)
            if result is not None:
                scores[name] = result.cpu()
    for name, flat in scores.items():
        if "reference" in scores:
            found["ways"][name]["difference"] = differences(scores["reference"], flat)
    if device == "cpu":
        # counted on batches twice as large and half as many, where activations outweigh the weights
        doing = ways(criteria(2 * batch, 1)[method], model, clean, sites)
        for name in ("reference", "library", "floor"):
            model.requires_grad_(True).eval()
            found["ways"][name].update(count(doing[name]))
    return found


def differences(reference: Tensor, scores: Tensor) -> dict[str, float]:
    """Largest gap, rank correlation, and how much of the lowest 2 % is the same."""
    few = max(1, len(scores) // 50)
    # MNP spreads masks at 1 by their order in size: what differs by rounding differs by places
    reference, scores = reference.clamp(0, 1), scores.clamp(0, 1)
    lowest = [set(each.argsort(stable=True)[:few].tolist()) for each in (reference, scores)]
    ranks = [each.argsort(stable=True).argsort().double() for each in (reference, scores)]
    return {
        "largest": (reference - scores).abs().max().item(),
        "share_beyond": ((reference - scores).abs() > 1e-4).float().mean().item(),
        "rank_correlation": torch.corrcoef(torch.stack(ranks))[0, 1].item(),
        "lowest_shared": len(lowest[0] & lowest[1]) / few,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="networks; by default those for the device")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--methods", nargs="*", default=["anp", "rnp", "cnp", "mnp"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    known |= {"torch": torch.__version__, "timm": timm.__version__, "cpu": platform.machine()}
    if options.device == "cuda":
        known["gpu"] = torch.cuda.get_device_name()
    rows = known.setdefault("rows", [])
    for architecture in options.only or (ARCHITECTURES if options.device == "cpu" else LARGE):
        for method in options.methods:
            found = row(architecture, method, options.rounds, options.device)
            rows[:] = [
                old
                for old in rows
                if (old["architecture"], old["method"]) != (architecture, method)
            ]
            rows.append(found)
            print(json.dumps(found), flush=True)
            options.out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
