"""Prune with Torch-Pruning, then distil back what it cost: `distil` after any pruner.

The same share of a backdoored ResNet's channels goes by magnitude, at random and by RNP; then each
pruned network learns from the network as it was given, on 500 clean images without their labels.
Distilling alone, without pruning, is the control. It is plain distilling, so that what is seen is
what pruning does; without `stamped=0` it also trains against triggers that it recovers.

    python examples/torch_pruning_then_repair.py    # about 8 minutes on two busy cores

What one run of an earlier version gave, with other random draws (10 % of the channels, 30 epochs;
ACC / ASR in %). It is one network.

    criterion    pruned           distilled
    none         94.2 /  99.9     93.2 / 58.7
    magnitude    20.8 /  98.3     92.0 / 34.3
    random       74.1 / 100       93.0 / 59.8
    rnp          73.0 /   0.2     93.3 / 12.0

The first row is the network as given.
"""

from __future__ import annotations

import copy

import torch
import torch_pruning as tp
from _shared import parser, plant
from swap_criterion import measured, print_row, prune_

from nnprune_backdoor import CleanData
from nnprune_backdoor.criteria import Unlearning
from nnprune_backdoor.demo import Demo
from nnprune_backdoor.importance import RNPImportance
from nnprune_backdoor.training import Distillation, distil


def main() -> None:
    """Print the table."""
    options = parser(__doc__)
    options.add_argument("--ratio", type=float, default=0.1, help="share of channels to prune")
    options = options.parse_args()
    given = plant(Demo(width=0.125 if options.quick else 0.5), options)
    # there is nothing to unlearn in a network that was hardly trained
    unlearning = Unlearning(epochs=1, stop=0.0, missed="flag") if options.quick else Unlearning()
    settings = Distillation(epochs=1 if options.quick else 30, turned=0.0, stamped=0.0)
    images = CleanData(given.clean.images)

    print(f"\n{options.ratio:.0%} of the channels pruned globally; pruned -> distilled\n")
    print_row("criterion", "channels", "parameters", "ACC", "ASR", "")
    print_row(*["---"] * 6)
    print_row("before", *measured(given, given.model), "")
    for name in ("none", "magnitude", "random", "rnp"):
        pruned = copy.deepcopy(given.model)
        torch.manual_seed(options.seed)
        if name == "rnp":
            importance = RNPImportance(pruned, given.clean, unlearning=unlearning)
            prune_(pruned, importance, options.ratio)
        elif name != "none":
            importances = tp.importance.MagnitudeImportance, tp.importance.RandomImportance
            prune_(pruned, importances[name == "random"](), options.ratio)
        print_row(name, *measured(given, pruned), "pruned")
        repaired = distil(pruned, given.model, images, settings, seed=options.seed)
        print_row(name, *measured(given, repaired), "distilled")


if __name__ == "__main__":
    main()
