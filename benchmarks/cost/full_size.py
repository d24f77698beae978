"""What criteria cost as `purify` calls them, at default settings, on networks of full size.

    python -m benchmarks.cost.full_size --threads 2           # ResNet-18, 32 px
    python -m benchmarks.cost.full_size --device cuda        # ResNet-50 and ViT-B, 224 px
    python -m benchmarks.cost.full_size --scan 1000 --only "ResNet-50, 40 px"

500 images, of which 300 score, as in `purify`; seconds are wall seconds of the scoring, images are
counted as they leave the features (forward; nearly all go backward too). Weights are random, the
last layer centred so that predictions vary, and labels are the network's own. How long unlearning
takes depends on the network, so it is 14 epochs here, what a ResNet of the zoo takes.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.cost.passes import counted
from benchmarks.cost.speed import ARCHITECTURES, LARGE, build, images_for
from benchmarks.render import RESULTS
from nnprune_backdoor import CleanData, Compute, Criterion, Diagnosis, PurifyError, scan
from nnprune_backdoor.core.predictions import predict_labels
from nnprune_backdoor.core.sites import find_sites
from nnprune_backdoor.criteria import ANP, CNP, MNP, RNP, TAC, Unlearning

UNLEARNING = Unlearning(epochs=14, stop=-1.0, missed="flag")
CRITERIA: dict[str, Criterion] = {
    "rnp": RNP(unlearning=UNLEARNING),
    "anp": ANP(),
    "mnp": MNP(unlearning=UNLEARNING),
    "tac, target given": TAC(target=0, min_success=0.0),
    "cnp, target given": CNP(target=0, min_success=0.0),
    "tac": TAC(min_success=0.0),
    "cnp": CNP(min_success=0.0),
}
# of a size that two cores get through in an hour
SCANNED: dict[str, tuple[str, int, int]] = {"ResNet-50, 40 px": ("resnet50", 40, 64)}
WAYS = {"float32": Compute(), "bfloat16": Compute(precision="bfloat16", channels_last=True)}


def task(model: nn.Module, pixels: int) -> CleanData:
    """500 images with the labels that the network gives, once the mean is taken off its logits."""
    images = images_for(pixels, 500).images
    head = model.get_classifier()  # type: ignore[operator]
    with torch.no_grad():
        few = images[:100].to(head.weight.device)
        logits = torch.cat([model(part) for part in few.split(20)])
        head.weight.div_(logits.std())
        head.bias.sub_(logits.mean(0)).div_(logits.std())
    return CleanData(images, predict_labels(model, images))


def measured(work: Any, images: Any, device: str) -> dict[str, Any]:
    """Seconds, images a second and MB of a piece of work."""
    images.clear()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    found: dict[str, Any] = {}
    try:
        result = work()
        if isinstance(result, Diagnosis):
            found["stages"] = {name: round(took, 1) for name, took in result.seconds.items()}
    except PurifyError as error:
        found["error"] = f"{type(error).__name__}: {error}"[:200]
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # of all so far
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e6
    found |= {"seconds": round(seconds, 1), "images": images["forward"], "mb": round(peak)}
    return found | {"images_per_second": round(images["forward"] / seconds)}


def jobs_for(
    model: nn.Module, clean: CleanData, options: argparse.Namespace
) -> dict[tuple[str, str], Callable[[], object]]:
    """What to measure, by method and way."""
    if options.scan:
        unlabelled = CleanData(clean.images)
        name = f"scan, {options.scan} classes"
        return {(name, "float32"): partial(scan, model, unlabelled, progress=False)}
    sites = find_sites(model, clean.images[:2].to(options.device))
    return {
        (method, way): partial(CRITERIA[method], model, clean, sites=sites, compute=WAYS[way])
        for method in options.methods
        for way in options.ways
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="networks, as in speed.py")
    parser.add_argument("--methods", nargs="*", default=[*CRITERIA])
    parser.add_argument("--ways", nargs="*", default=["float32"], choices=[*WAYS])
    parser.add_argument("--scan", type=int, help="scan instead, a network of so many classes")
    parser.add_argument("--out", type=Path, default=RESULTS / "full_size.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = options.only or (["ResNet-18, 32 px"] if options.device == "cpu" else [*LARGE])
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    for network in names:
        timm_name, pixels, _ = (ARCHITECTURES | LARGE | SCANNED)[network]
        model = build(timm_name, pixels, options.scan or 10).to(options.device)
        scoring = task(model, pixels).take(torch.arange(300))
        model, images = counted(model.requires_grad_(False))
        jobs = jobs_for(model, scoring, options)
        for (method, way), work in jobs.items():
            row = {"network": network, "method": method, "way": way, "where": where}
            row |= {"threads": options.threads} if options.device == "cpu" else {}
            row |= measured(work, images, options.device)
            print(json.dumps(row), flush=True)
            rows.append(row)
            options.out.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
