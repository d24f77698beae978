"""Images that each criterion sends through the network, counted, and seconds.

    OMP_NUM_THREADS=1 python -m benchmarks.cost.passes --models DIR  # the zoo's folder of weights

On one network of the zoo, with the 300 images that `purify` scores with when it is given 500. The
counts do not depend on the machine; those of a criterion that stops by accuracy depend on the
network. Renders the table of docs/results/speed.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.efficacy.efficacy import clean_set
from benchmarks.networks.zoo import members
from benchmarks.render import DOCS, RESULTS, fill
from nnprune_backdoor import CleanData, Criterion
from nnprune_backdoor.core.sites import find_sites
from nnprune_backdoor.criteria import ANP, CNP, MNP, RNP, TAC

WAYS = ("forward", "backward")
NETWORK = "resnet-badnets-short-0"
PARTS = 40  # published mask training is run for one part of its steps and for two: it is linear
# criterion, and images forward and backward by its publication
CASES: dict[str, tuple[Criterion, str]] = {
    "RNP()": (RNP(), ""),
    "RNP.paper()": (RNP.paper(), "at most 21 + 20 epochs: 12,300 and 12,300"),
    "ANP()": (ANP(), ""),
    "ANP.paper()": (ANP.paper(), "2,000 steps of 128, three passes: 768,000 and 768,000"),
    "CNP()": (CNP(), ""),
    "CNP(target=0)": (CNP(target=0), ""),
    "CNP.paper()": (
        CNP.paper(),
        "nine forward passes a mask step, not six, and five noise passes: 1,490,000 forward",
    ),
    "MNP()": (MNP(), ""),
    "MNP.paper()": (MNP.paper(), "no code is public; reconstructed, at most 134,000 each"),
    "TAC()": (TAC(), ""),
    "TAC(target=0)": (TAC(target=0), ""),
}


def counted(model: nn.Module) -> tuple[nn.Module, Counter[str]]:
    """The model, and how many images went through its features: "forward", "backward"."""
    images: Counter[str] = Counter()

    class Counted(type(model)):  # type: ignore[misc]  # copies count into the same place
        def forward_features(self, x: Tensor, **others: Any) -> Tensor:
            features: Tensor = super().forward_features(x, **others)
            images["forward"] += len(x)
            if features.requires_grad:
                features.register_hook(lambda grad: images.update(backward=len(grad)))
            return features

    model.__class__ = Counted
    return model, images


def row(name: str, model: nn.Module, clean: CleanData, images: Counter[str]) -> dict[str, Any]:
    criterion, published = CASES[name]
    sites = find_sites(model, clean.images[:2])

    def run(one: Criterion) -> Counter[str]:
        images.clear()
        one(model, clean, sites=sites)
        return images.copy()

    found: dict[str, Any] = {"criterion": name, "published": published}
    if name in ("ANP.paper()", "CNP.paper()"):
        one, two = (run(shortened(criterion, k)) for k in (1, 2))
        found["estimated"] = True
        return found | {way: one[way] + (PARTS - 1) * (two[way] - one[way]) for way in WAYS}
    start = time.process_time()
    passes = run(criterion)
    found["seconds"] = round(time.process_time() - start, 1)
    return found | {way: passes[way] for way in WAYS}


def shortened(criterion: Any, parts: int) -> Criterion:
    """With so many parts of the steps of mask training, and of inversion where there is one."""
    steps = parts * criterion.ranking.steps // PARTS
    changed: dict[str, Any] = {"ranking": replace(criterion.ranking, steps=steps)}
    if hasattr(criterion, "steps"):
        changed["steps"] = parts * criterion.steps // PARTS
    shorter: Criterion = replace(criterion, **changed)
    return shorter


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| criterion | images forward | images backward | CPU seconds | its publication |",
        "|---|---|---|---|---|",
    ]
    for one in rows:
        about = "about " if "estimated" in one else ""
        cells = [f"`{one['criterion']}`", *(f"{about}{one[way]:,}" for way in WAYS)]
        cells += [f"{one['seconds']:.0f}" if "seconds" in one else "", one["published"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=Path, required=True, help="folder of the zoo's weights")
    options = parser.parse_args()
    torch.set_num_threads(1)
    member = next(one for one in members() if one.name == NETWORK)
    model, images = counted(member.load(options.models).requires_grad_(False))
    scoring, *_ = clean_set(500, 0).split(0.6, 0.25, 0.15, seed=0)
    rows = []
    for name in CASES:
        rows.append(row(name, model, scoring, images))
        print(rows[-1], flush=True)
    (RESULTS / "passes.json").write_text(json.dumps(rows, indent=1) + "\n")
    fill(DOCS / "speed.md", "passes", table(rows))


if __name__ == "__main__":
    main()
