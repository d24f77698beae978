"""Purify before compressing: a pruning pipeline with and without `purify` in front.

The pipeline is an ordinary one: prune the groups of least magnitude until a share of the parameters
is left, fine-tune on the clean images. It runs twice to the same size. Magnitude knows nothing of
backdoors, and fine-tuning repairs them along with the accuracy: in our run the attack survived the
plain pipeline whole, and after `purify` it came back in part. So measure after every stage; what
was measured before fine-tuning does not hold after it.

    python examples/compress_and_purify.py    # two to three minutes on two cores
"""

from __future__ import annotations

import copy

import torch
import torch_pruning as tp
from _shared import Backdoored, parameters, parser, plant
from torch import nn

from nnprune_backdoor import purify
from nnprune_backdoor.demo import Demo
from nnprune_backdoor.training import FineTuning, fine_tune

STEPS = 40  # of a pruner, from the whole network to almost nothing


def compress(model: nn.Module, most: int) -> nn.Module:
    """A copy, pruned by magnitude until at most `most` parameters are left."""
    model = copy.deepcopy(model)
    pruner = tp.pruner.BasePruner(
        model,
        (torch.zeros(2, 3, 32, 32),),
        importance=tp.importance.MagnitudeImportance(),
        pruning_ratio=0.95,
        iterative_steps=STEPS,
        ignored_layers=[model.fc],
    )
    while parameters(model) > most and pruner.current_step < STEPS:
        pruner.step()
    return model


def run_pipeline(given: Backdoored, model: nn.Module, most: int, epochs: int) -> None:
    """Compress and fine-tune; print a row for each stage."""
    small = compress(model, most)
    tuned = fine_tune(small, given.clean, FineTuning(epochs=epochs), progress=False)
    for stage, each in (("before", model), ("compressed", small), ("fine-tuned", tuned)):
        size = f"{parameters(each):9,} parameters"
        print(f"{stage:12} {size}  ACC {given.acc(each)}  ASR {given.asr(each)}")


def main() -> None:
    """Run the pipeline twice."""
    options = parser(__doc__)
    options.add_argument("--keep", type=float, default=0.5, help="share of parameters to keep")
    options = options.parse_args()
    given = plant(Demo(width=0.25), options)
    most, epochs = int(options.keep * parameters(given.model)), 1 if options.quick else 20

    print(f"\nwithout purify, to {options.keep:.0%} of the parameters")
    run_pipeline(given, given.model, most, epochs)

    settings = given.unless_quick(method="tac", selector="trigger")
    purified = purify(given.model, given.clean, seed=options.seed, **settings)
    print(f"\n{purified.summary()}\n\npurified first, to the same size")
    run_pipeline(given, purified.model, most, epochs)


if __name__ == "__main__":
    main()
