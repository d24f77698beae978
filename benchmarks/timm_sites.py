"""Sites of one small model of every timm module: identity of masks, finite gradients.

    python benchmarks/timm_sites.py --out benchmarks/results/timm_sites.json

Random weights, native input size, two images. A module is left out where its smallest model has
more than 60 million parameters; the models are named in the results.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import time
from pathlib import Path
from typing import Any

import timm
import torch

from nnprune_backdoor import MaskedModel, find_sites


def check(name: str) -> dict[str, Any]:
    """Find the sites of a timm model and try its masks."""
    start = time.perf_counter()
    torch.manual_seed(0)
    row: dict[str, Any] = {"model": name}
    try:
        model = timm.create_model(name, num_classes=10).eval().requires_grad_(False)
        size = model.pretrained_cfg.get("input_size", (3, 224, 224))
        images = torch.randn(2, *size)
        sites = find_sites(model, images)
        masked = MaskedModel(model, sites)
        with torch.no_grad():
            plain = model(images)
        logits = masked(images)
        (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), masked.masks)
        row |= {
            "norm_sites": sum(site.kind == "norm" for site in sites),
            "layer_sites": sum(site.kind == "layer" for site in sites),
            "neurons": len(masked.masks),
            "identity": torch.equal(plain, logits.detach()),
            "finite_gradient": bool(torch.isfinite(gradient).all()),
        }
    except Exception as error:  # the table reports whatever went wrong
        row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def smallest_of_each_module(limit: int) -> tuple[list[str], list[str]]:
    """Per timm module the smallest model by parameters (built on the meta device)."""
    chosen, left_out = [], []
    for module in timm.list_modules():
        sizes = {}
        for name in timm.list_models(module=module):
            with contextlib.suppress(Exception), torch.device("meta"):
                model = timm.create_model(name)
                sizes[name] = sum(parameter.numel() for parameter in model.parameters())
        if not sizes:
            left_out.append(f"{module} (none builds)")
            continue
        best = min(sizes, key=lambda name: sizes[name])
        (chosen if sizes[best] <= limit else left_out).append(best)
    return chosen, left_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="default: the smallest of each timm module")
    parser.add_argument("--limit", type=int, default=60_000_000, help="parameters")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    names, left_out = options.models, []
    if not names:
        names, left_out = smallest_of_each_module(options.limit)
    rows = []
    for name in names:
        rows.append(check(name))
        print(json.dumps(rows[-1]), flush=True)
        gc.collect()
        report = {"timm": timm.__version__, "left_out": left_out, "models": rows}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
