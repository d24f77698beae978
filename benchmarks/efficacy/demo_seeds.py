"""The demo over seeds and methods: before/after, and the curve that only an analyst may see.

    python -m benchmarks.efficacy.demo_seeds --seeds 0 1 2 3 4 \
        --out benchmarks/results/demo_seeds.json

One backdoored network a seed, trained once; each method prunes it by the selector `accuracy`, with
500 clean images. The curve (ACC and ASR against the share of neurons silenced) uses triggered
images and is for analysis: nothing is chosen by it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nnprune_backdoor import CleanData, Criterion, PurifyError, Selector, purify
from nnprune_backdoor.attacks import create_attack, photo_patches
from nnprune_backdoor.core.masks import silence_
from nnprune_backdoor.core.measures import Repair
from nnprune_backdoor.core.scores import ChannelScores, lowest
from nnprune_backdoor.criteria import ANP, RNP, TAC, Random
from nnprune_backdoor.demo import Demo, Rates, normalise
from nnprune_backdoor.selectors import AccuracyBudget, TriggerGone

METHODS: dict[str, tuple[Criterion, Selector, Repair]] = {
    "tac, trigger, repaired": (TAC(), TriggerGone(), "unlearn"),
    "rnp, trigger, repaired": (RNP(), TriggerGone(), "unlearn"),
    "anp, trigger, repaired": (ANP(), TriggerGone(), "unlearn"),
    "random, trigger, repaired": (Random(), TriggerGone(), "unlearn"),
    "tac, trigger": (TAC(), TriggerGone(), "none"),
    "rnp, trigger": (RNP(), TriggerGone(), "none"),
    "tac": (TAC(), AccuracyBudget(), "none"),
    "rnp": (RNP(), AccuracyBudget(), "none"),
    "anp": (ANP(), AccuracyBudget(), "none"),
    "rnp paper": (RNP.paper(), AccuracyBudget(), "none"),
}
SHARES = (0.0, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1)


def rates(measured: Rates) -> dict[str, float]:
    return {
        "acc": measured.acc.value,
        "asr": measured.attack.asr.value,
        "ra": measured.attack.ra.value,
    }


def file_of(demo: Demo, folder: Path) -> Path:
    return folder / f"{demo.attack}-{demo.width:g}-{demo.epochs}-{demo.seed}.safetensors"


def stored(demo: Demo, folder: Path | None) -> torch.nn.Module | None:
    """The demo's network, if it was trained before."""
    if folder is None or not file_of(demo, folder).exists():
        return None
    model = demo.model().eval()
    model.load_state_dict(load_file(file_of(demo, folder)))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=Demo.epochs)
    parser.add_argument("--width", type=float, default=Demo.width)
    parser.add_argument("--attack", default="badnets")
    parser.add_argument("--rate", type=float, default=Demo.rate)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--models", type=Path, help="folder of trained networks, to train once")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    photos = photo_patches()
    order = torch.randperm(len(photos.test_labels), generator=torch.Generator().manual_seed(1))
    given, hidden = order[:500], order[500:]
    clean = CleanData(normalise(photos.test_images[given]), photos.test_labels[given])
    pixels, labels = photos.test_images[hidden], photos.test_labels[hidden]
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        demo = Demo(
            seed=seed,
            epochs=options.epochs,
            width=options.width,
            attack=options.attack,
            rate=options.rate,
        )
        trigger = create_attack(demo.attack)
        start = time.perf_counter()
        model = stored(demo, options.models) or demo.train(photos)
        if options.models:
            save_file(model.state_dict(), file_of(demo, options.models))
        trained = time.perf_counter() - start

        def measure(network: torch.nn.Module, some: slice = slice(None)) -> dict[str, float]:
            return rates(Rates.of(network, pixels[some], labels[some], trigger, demo.target))  # noqa: B023

        def curve(scores: ChannelScores) -> list[dict[str, float]]:
            points = []
            for share in SHARES:
                product = demo.model().eval()  # noqa: B023
                product.load_state_dict(model.state_dict())  # noqa: B023
                silence_(product, lowest(scores, round(share * len(scores.flat))))
                points.append({"share": share, **measure(product, slice(700))})
            return points

        before = measure(model)
        for name in options.methods:
            row: dict[str, Any] = {"seed": seed, "method": name, "before": before}
            row |= {"attack": demo.attack, "epochs": demo.epochs, "width": demo.width}
            try:
                criterion, selector, repair = METHODS[name]
                purified = purify(
                    model,
                    clean,
                    criterion,
                    selector=selector,
                    repair=repair,
                    seed=seed,
                    progress=False,
                )
                row |= {
                    "after": measure(purified.model),
                    "silenced": len(purified.selection),
                    "because": purified.selection.reason,
                    "removed": len(purified.removal.removed) if purified.removal else 0,
                    "neurons": len(purified.scores.flat),
                    "tied_at_zero": float((purified.scores.flat == 0).float().mean()),
                    "certified_drop": purified.accuracy.drop if purified.accuracy else None,
                    "seconds": round(sum(purified.seconds.values()), 1),
                    "training_seconds": round(trained, 1),
                    "curve": curve(purified.scores),
                }
            except PurifyError as error:
                row["error"] = str(error)
            rows.append(row)
            print(json.dumps({k: v for k, v in row.items() if k != "curve"}), flush=True)
            options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
