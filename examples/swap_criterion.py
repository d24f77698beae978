"""Torch-Pruning with another criterion: magnitude, random and RNP in the same pruner.

The same share of a backdoored ResNet's channels is pruned three times; only the importance differs.
RNP is given 500 clean images, and nothing is fine-tuned. What came out on three networks is in
docs/results/swap_criterion.md.

    python examples/swap_criterion.py --ratio 0.05    # about two minutes on two cores
"""

from __future__ import annotations

import copy
import time

import torch
import torch_pruning as tp
from _shared import Backdoored, parameters, parser, plant
from torch import nn

from nnprune_backdoor.criteria import Unlearning
from nnprune_backdoor.demo import Demo
from nnprune_backdoor.importance import RNPImportance

WIDTHS = (9, 8, 10, 22, 22, 7)


def prune_(model: nn.Module, importance: tp.importance.Importance, ratio: float) -> None:
    """What any Torch-Pruning script does."""
    tp.pruner.BasePruner(
        model,
        (torch.zeros(2, 3, 32, 32),),
        importance=importance,
        pruning_ratio=ratio,
        global_pruning=True,
        ignored_layers=[model.fc],
    ).step()


def print_row(*cells: str) -> None:
    """A row of a Markdown table."""
    print("| " + " | ".join(f"{cell:{w}}" for cell, w in zip(cells, WIDTHS, strict=True)) + " |")


def measured(given: Backdoored, model: nn.Module) -> tuple[str, ...]:
    """Output channels of all convolutions, parameters, ACC, ASR."""
    channels = sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    return (
        str(channels),
        f"{parameters(model) / 1e6:.2f} M",
        given.acc(model),
        given.asr(model),
    )


def main() -> None:
    """Print the table."""
    options = parser(__doc__)
    options.add_argument("--ratio", type=float, default=0.05, help="share of channels to prune")
    options = options.parse_args()
    given = plant(Demo(width=0.125 if options.quick else 0.5), options)
    # there is nothing to unlearn in a network that was hardly trained
    settings = (
        {"unlearning": Unlearning(epochs=1, stop=0.0, missed="flag")} if options.quick else {}
    )

    print(f"\n{options.ratio:.0%} of the channels pruned globally, no fine-tuning\n")
    print_row("criterion", "channels", "parameters", "ACC", "ASR", "seconds")
    print_row(*["---"] * len(WIDTHS))
    print_row("before", *measured(given, given.model), "")
    for name in ("magnitude", "random", "rnp"):
        model, start = copy.deepcopy(given.model), time.perf_counter()
        torch.manual_seed(options.seed)
        if name == "magnitude":
            importance = tp.importance.MagnitudeImportance()
        elif name == "random":
            importance = tp.importance.RandomImportance()
        else:  # the swap
            importance = RNPImportance(model, given.clean, seed=options.seed, **settings)
        prune_(model, importance, options.ratio)
        print_row(name, *measured(given, model), f"{time.perf_counter() - start:.1f}")


if __name__ == "__main__":
    main()
