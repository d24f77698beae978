"""What removal gains when a fifth of all neurons is silent: drawn at random, or ranked by `rnp`.

    python -m benchmarks.cost.removal_sizes --out benchmarks/results/removal_sizes.json
    python -m benchmarks.cost.removal_sizes --out benchmarks/results/removal_sizes.json --ranked

writes the JSON and docs/results/removal_sizes.md. Well-known architectures, with latencies, and the
families of timm (the smallest of each module, as listed in timm_coverage.json), without. Random
weights in which every layer matters; pictures of 64 pixels where the architecture takes them.
What --out already has is not measured again. --ranked adds to each family that took less than
SLOW seconds a fifth that `rnp` chose.

Nothing is trained, so there is no task for `rnp` to unlearn: it unlearns made-up labels of noise,
in a few steps. Its fifth has the shape of such a ranking (much of some layers, little of others),
not its meaning.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.cost.removal_page import sizes
from benchmarks.networks.timm_coverage import stirred
from benchmarks.render import DOCS, RESULTS
from nnprune_backdoor import CleanData
from nnprune_backdoor.core.masks import silence_
from nnprune_backdoor.core.scores import ChannelScores, Selection, lowest, neurons_of
from nnprune_backdoor.core.sites import find_sites
from nnprune_backdoor.criteria import RNP, Unlearning
from nnprune_backdoor.removal import compact

SHARE = 0.2
PIXELS = 64
LIMIT = 120.0  # seconds of the analysis of one model
SLOW = 20.0  # seconds of the first row, above which there is no second one
NOISE = 20  # images whose labels are unlearned
RANKING = RNP(
    unlearning=Unlearning(epochs=5, stop=-1.0, clip=1.0, statistics="running", missed="flag")
)
KNOWN = (
    "resnet18",
    "efficientnet_b0",
    "convnext_atto",
    "mobilenetv3_small_100",
    "regnetx_002",
    "vgg11_bn",
    "ghostnet_100",
    "res2net50_14w_8s",
    "densenet121",
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "nfnet_l0",
)


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A model in which every layer matters, and four images of PIXELS where it takes them."""
    for options in ({"img_size": PIXELS}, {}):
        with contextlib.suppress(Exception):  # architectures refuse what they do not take, anyhow
            torch.manual_seed(0)
            model = timm.create_model(name, num_classes=10, **options)
            return stirred(model, torch.randn(4, 3, PIXELS, PIXELS))
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    return stirred(model, torch.randn(4, *model.pretrained_cfg.get("input_size", (3, 224, 224))))


def latencies(models: tuple[nn.Module, ...], images: Tensor, repeats: int = 7) -> list[float]:
    """Median seconds of each model, measured in turns."""
    seconds: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in range(repeats):
            for model, mine in zip(models, seconds, strict=True):
                start = time.perf_counter()
                model(images)
                mine.append(time.perf_counter() - start)
    return [statistics.median(mine) for mine in seconds]


def measured(name: str) -> dict[str, Any]:
    """Silence a random fifth, compact, compare."""
    start = time.process_time()
    model, images = build(name)
    sites = find_sites(model, images[:2])
    noise = torch.rand(len(neurons_of(sites)), generator=torch.Generator().manual_seed(0))
    row, selection, silent, smaller = cut(model, images, ChannelScores(sites, noise, "random"))
    row = {"pixels": images.shape[-1], "neurons": len(noise)} | row
    if name in KNOWN:
        unfilled, without = compact(silent, selection, images, seconds=LIMIT, fill=False)
        row["unfilled_parameters"] = without.after.parameters
        row["latency"] = latencies((silent, unfilled, smaller), images)
    return row | {"seconds": round(time.process_time() - start, 1)}


def ranked(name: str) -> dict[str, Any]:
    """The same with the fifth that `rnp` ranks lowest."""
    start = time.process_time()
    model, images = build(name)
    noise = torch.randn(NOISE, *images.shape[1:])
    scores = RANKING(model, CleanData(noise, torch.arange(NOISE) % 10))
    row, *_ = cut(model, images, scores)
    row["seconds"] = round(time.process_time() - start, 1)
    return row


def cut(
    model: nn.Module, images: Tensor, scores: ChannelScores
) -> tuple[dict[str, Any], Selection, nn.Module, nn.Module]:
    """What compaction did once the lowest fifth is silent; which, the silenced, the compacted."""
    selection = lowest(scores, round(SHARE * len(scores.flat)))
    silent = copy.deepcopy(model)
    silence_(silent, selection)
    smaller, report = compact(silent, selection, images, seconds=LIMIT)
    with torch.no_grad():
        wanted, got = silent(images), smaller(images)
    row = {
        "silenced": len(selection),
        "removed": len(report.removed),
        "filled": len(report.filled),
        "drift": float((got - wanted).abs().max() / wanted.abs().max()),
        "parameters": [report.before.parameters, report.after.parameters],
        "macs": [report.before.macs, report.after.macs],
        "reasons": dict(Counter(why[:60] for why in report.silenced.values())),
    }
    return row, selection, silent, smaller


def _attempt(measure: Callable[[str], dict[str, Any]], name: str) -> dict[str, Any]:
    try:
        return measure(name)
    except Exception as error:  # the table reports whatever went wrong
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}


def _report(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    versions = {"timm": timm.__version__, "torch": torch.__version__, "share": SHARE}
    return versions | {"models": list(rows.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="default: the well-known and the families")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ranked", action="store_true", help="add the fifth that `rnp` chose")
    options = parser.parse_args()
    torch.set_num_threads(1)
    coverage = json.loads((RESULTS / "timm_coverage.json").read_text())["models"]
    families = [row["model"] for row in coverage if row["family"]]
    rows: dict[str, dict[str, Any]] = {}
    if options.out.exists():
        rows = {row["model"]: row for row in json.loads(options.out.read_text())["models"]}
    names = options.models or list(dict.fromkeys([*families, *KNOWN]))
    if options.ranked:  # quick ones first
        names.sort(key=lambda name: rows.get(name, {}).get("seconds", SLOW))
    for name in names:
        row = rows.get(name)
        quick = row is not None and row["family"] and row.get("seconds", SLOW) < SLOW
        if options.ranked and row and quick and "rnp" not in row:
            row["rnp"] = _attempt(ranked, name)
        elif row is None and not options.ranked:
            kinds = {"known": name in KNOWN, "family": name in families}
            rows[name] = {"model": name} | kinds | _attempt(measured, name)
        else:
            continue
        print(json.dumps(rows[name]), flush=True)
        options.out.write_text(json.dumps(_report(rows), indent=1) + "\n")
        gc.collect()
    if not options.models:
        (DOCS / "removal_sizes.md").write_text(sizes(_report(rows)))


if __name__ == "__main__":
    main()
