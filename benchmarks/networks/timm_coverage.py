"""What of this library works on which timm architecture, beside plain Torch-Pruning.

    python -m benchmarks.networks.timm_coverage --out benchmarks/results/timm_coverage.json

The smallest model of every timm module, and popular ones; each in a process of its own. Random
weights, with norms and scales off their neutral values and BatchNorm statistics that fit them, so
that every layer matters; native input size. One per cent of all neurons, drawn at random, is
silenced: coupled ones as well, which only ever go as whole groups.

*plain*: `tp.pruner.MagnitudePruner`, a fifth of every group, classifier ignored, `num_heads` given
for fused qkv layers; right if the pruned model runs and gives logits of the same shape. *adapter*:
the same with `GroupImportance` and random scores, groups that break the network left alone.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn

from nnprune_backdoor.core.masks import MaskedModel, silence_
from nnprune_backdoor.core.scores import ChannelScores, Selection, lowest, neurons_of
from nnprune_backdoor.core.sites import Site, find_sites
from nnprune_backdoor.importance import GroupImportance
from nnprune_backdoor.removal import compact

SHARE = 0.01
MEMORY = 12 * 2**30  # bytes of address space of the process of one model
POPULAR = (
    "beit_base_patch16_224",
    "coatnet_nano_rw_224",
    "convnext_atto",
    "convnextv2_atto",
    "cspresnet50",
    "darknet53",
    "dla34",
    "eca_nfnet_l0",
    "efficientnet_b0",
    "efficientnetv2_rw_t",
    "ghostnet_100",
    "mambaout_femto",
    "maxvit_rmlp_pico_rw_256",
    "mixer_s32_224",
    "mobilenetv2_100",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "mobileone_s0",
    "nfnet_l0",
    "poolformer_s12",
    "regnety_002",
    "repvgg_a0",
    "repvit_m0_9",
    "res2net50_26w_4s",
    "resmlp_12_224",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "starnet_s1",
    "tf_efficientnet_lite0",
    "twins_pcpvt_small",
    "vgg11",
    "vgg11_bn",
    "vit_tiny_patch16_224",
    "wide_resnet50_2",
    "xception41",
    "xcit_nano_12_p16_224",
)


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A model in which every layer matters, and images for it."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    return stirred(model, torch.randn(4, *model.pretrained_cfg.get("input_size", (3, 224, 224))))


def stirred(model: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    """The model with no layer at neutral values, statistics that fit the images, and these."""
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim <= 1 or parameter.min() == parameter.max():
            parameter.add_(0.3 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # the mean over what is seen
            module.train()
    with torch.no_grad():
        model(images)
    model.eval()
    return model, images


def scoring(model: nn.Module, images: Tensor) -> tuple[dict[str, Any], tuple[Site, ...]]:
    """Sites, identity of masks, finite gradients."""
    sites = find_sites(model, images[:2])
    masked = MaskedModel(model, sites)
    with torch.no_grad():
        plain = model(images[:2])
    logits = masked(images[:2])
    (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), masked.masks)
    found = {
        "norm_sites": sum(site.kind == "norm" for site in sites),
        "layer_sites": sum(site.kind == "layer" for site in sites),
        "neurons": len(masked.masks),
        "identity": torch.equal(plain, logits.detach()),
        "finite_gradient": bool(torch.isfinite(gradient).all()),
    }
    return found, sites


def removal(model: nn.Module, images: Tensor, sites: tuple[Site, ...]) -> dict[str, Any]:
    """Silence one per cent, compact, compare with what the masks compute."""
    generator = torch.Generator().manual_seed(0)
    total = len(neurons_of(sites))
    scores = ChannelScores(sites, torch.rand(total, generator=generator), "random")
    selection: Selection = lowest(scores, max(1, round(SHARE * total)))
    masked = MaskedModel(model, sites, silencing="zero")
    masked.masks.requires_grad_(False).copy_(selection.keep())
    with torch.no_grad():
        wanted = masked(images)
        silence_(model, selection)
        silenced = model(images)
    start = time.perf_counter()
    smaller, report = compact(model, selection, images)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        got = smaller(images)
    scale = wanted.abs().max()
    return {
        "selected": len(selection),
        "removed": len(report.removed),
        "silenced_drift": float((silenced - wanted).abs().max() / scale),
        "drift": float((got - wanted).abs().max() / scale),
        "parameters": [report.before.parameters, report.after.parameters],
        "macs": [report.before.macs, report.after.macs],
        "reasons": dict(Counter(why[:60] for why in report.silenced.values())),
        "removal_seconds": round(seconds, 1),
    }


def torch_pruning(name: str, adapter: bool) -> tuple[str, float]:
    """Empty if a fifth of the channels went and the model runs, else why not; parameters left."""
    model, images = build(name)
    model.requires_grad_(True)
    wanted = model(images[:2]).shape
    importance: Any = tp.importance.MagnitudeImportance(p=2)
    if adapter:
        sites = find_sites(model, images[:2])
        noise = torch.rand(len(neurons_of(sites)), generator=torch.Generator().manual_seed(0))
        scores = ChannelScores(sites, noise, "random")
        importance = GroupImportance(model, scores, example=images[:1])
    heads = {
        module.qkv: module.num_heads
        for module in model.modules()
        if isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "num_heads")
    }
    classifier = model.get_classifier()
    pruner = tp.pruner.MagnitudePruner(
        model,
        (images[:2],),
        importance=importance,
        pruning_ratio=0.2,
        ignored_layers=[classifier] if isinstance(classifier, nn.Module) else [],
        num_heads=heads,
        in_channel_groups={},
        out_channel_groups={},
    )
    before = sum(parameter.numel() for parameter in model.parameters())
    pruner.step()
    left = sum(parameter.numel() for parameter in model.parameters()) / before
    if left == 1:
        return "nothing was pruned", left
    with torch.no_grad():
        got = model.eval()(images[:2]).shape
    return "" if got == wanted else f"logits of shape {tuple(got)}", left


def attempt(job: Callable[[], tuple[str, float]], seconds: float) -> tuple[str, float]:
    """The job's complaint, its exception, or that it ran out of time."""
    try:
        with time_limit(seconds):
            return job()
    except (Exception, OutOfTime) as error:  # the table reports whatever went wrong
        text = str(error).splitlines()[0][:80] if str(error) else ""
        return f"{type(error).__name__}: {text}", 1.0


class OutOfTime(BaseException):
    """Not an Exception: what tries things out would take one for an answer."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Of processor time, which other work on the machine does not use up."""

    def stop(*_: object) -> None:
        raise OutOfTime(f"{seconds:g} s")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def ours(name: str) -> dict[str, Any]:
    """What this library does with a model."""
    start = time.perf_counter()
    row: dict[str, Any] = {"model": name}
    try:
        model, images = build(name)
        found, sites = scoring(model, images)
        row |= found | removal(model, images, sites)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def theirs(name: str, seconds: float) -> dict[str, Any]:
    """What Torch-Pruning does with it."""
    row: dict[str, Any] = {}
    for which in ("plain", "adapter"):
        gc.collect()
        job = functools.partial(torch_pruning, name, which == "adapter")
        row[which], left = attempt(job, seconds)
        row[f"{which}_left"] = round(left, 3)
    return row


def apart(part: str, name: str, seconds: float) -> dict[str, Any]:
    """`ours` or `theirs` in a process of its own, which may die."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.networks.timm_coverage",
        name,
        "--part",
        part,
        "--seconds",
        str(seconds),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = ended.stdout.strip().splitlines()
    if ended.returncode == 0 and lines:
        row: dict[str, Any] = json.loads(lines[-1])
        return row
    what = f"the process died: {ended.stderr.strip()[-80:]}"
    return {"model": name, "error": what} if part == "ours" else {"plain": what, "adapter": what}


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
    parser.add_argument("models", nargs="*", help="default: smallest of each module, and popular")
    parser.add_argument("--limit", type=int, default=60_000_000, help="parameters")
    parser.add_argument("--seconds", type=float, default=30, help="for Torch-Pruning; 0: leave out")
    parser.add_argument("--part", choices=("ours", "theirs"), help="of the one model given")
    parser.add_argument("--resume", action="store_true", help="only what --out does not have yet")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.part:  # Torch-Pruning's index lists can grow without bound
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        name = options.models[0]
        row = ours(name) if options.part == "ours" else theirs(name, options.seconds)
        print(json.dumps(row))
        return
    families, left_out = options.models, []
    if not families:
        families, left_out = smallest_of_each_module(options.limit)
    popular = [] if options.models else [name for name in POPULAR if name not in families]
    rows: dict[str, dict[str, Any]] = {}
    if options.resume:
        rows = {row["model"]: row for row in json.loads(options.out.read_text())["models"]}
    for part in ("ours", "theirs") if options.seconds else ("ours",):
        for name in [*families, *popular]:
            row = rows.get(name, {})
            if ("seconds" if part == "ours" else "plain") in row:
                continue
            rows[name] = row | {"family": name in families} | apart(part, name, options.seconds)
            print(json.dumps(rows[name]), flush=True)
            if options.out:
                versions = {"timm": timm.__version__, "torch": torch.__version__}
                limits = {"seconds": options.seconds, "gib": MEMORY / 2**30}
                rest = {"share": SHARE, "left_out": left_out, "models": list(rows.values())}
                options.out.write_text(json.dumps(versions | limits | rest, indent=1) + "\n")


if __name__ == "__main__":
    main()
