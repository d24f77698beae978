"""A hygiene pass in a compression pipeline: purify first, then prune to the size asked for.

The pipeline is an ordinary Torch-Pruning one: cut the least important groups by magnitude until a
share of the parameters is left, fine-tune on the clean images that one has, ship. It runs twice to
the same size, once as it is and once with `purify` before it. Magnitude knows nothing of backdoors,
and clean fine-tuning repairs them along with the accuracy: in our run the attack came through the
plain pipeline whole, and after the pass it came back in part. ACC and ASR are printed after every
stage for that reason: what was measured before fine-tuning does not hold after it. Needs the extra
`demo`.

    python examples/compress_and_purify.py            # two to three minutes on two cores
    python examples/compress_and_purify.py --quick    # a network that has learned little
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import replace

import torch
import torch_pruning as tp
from torch import nn

from nnprune_backdoor import CleanData, purify
from nnprune_backdoor.attacks import create_attack, photo_patches
from nnprune_backdoor.attacks.evaluation import accuracy, attack_success
from nnprune_backdoor.demo import Demo, normalise
from nnprune_backdoor.selectors import LowestFraction, TriggerGone
from nnprune_backdoor.training import fine_tune

STEPS = 40  # of a pruner, from the whole network to almost nothing


def parameters(model: nn.Module) -> int:
    """How many numbers are in it."""
    return sum(weight.numel() for weight in model.parameters())


def compress_(model: nn.Module, most: int) -> nn.Module:
    """Prune groups by magnitude, in place, until at most so many parameters are left."""
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


def pipeline(
    model: nn.Module,
    clean: CleanData,
    most: int,
    epochs: int,
    say: Callable[[str, nn.Module], None],
) -> nn.Module:
    """Compress, fine-tune: what was there before this library."""
    small = compress_(copy.deepcopy(model), most)
    say("compressed", small)
    tuned = fine_tune(small, clean, epochs=epochs, progress=False)
    say("fine-tuned", tuned)
    return tuned


def main(arguments: list[str] | None = None) -> None:
    """Print a row a stage, of both pipelines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, default=0.5, help="share of the parameters to keep")
    parser.add_argument("--epochs", type=int, default=20, help="of fine-tuning")
    parser.add_argument("--quick", action="store_true", help="so young that nothing is learned")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    demo, epochs = Demo(width=0.25, seed=options.seed), options.epochs
    if options.quick:
        demo, epochs = replace(demo, epochs=1, images=640), 1
    photos = photo_patches()
    model = demo.train(photos, progress=True)
    order = torch.randperm(len(photos.test_labels), generator=torch.Generator().manual_seed(1))
    given, hidden = order[:500], order[500 : 700 if options.quick else None]
    clean = CleanData(normalise(photos.test_images[given]), photos.test_labels[given])
    pixels, labels = photos.test_images[hidden], photos.test_labels[hidden]
    triggered = normalise(create_attack(demo.attack)(pixels))

    def say(stage: str, which: nn.Module) -> None:
        acc = accuracy(which, normalise(pixels), labels)
        asr = attack_success(which, triggered, labels, demo.target).asr
        print(f"{stage:12} {parameters(which):9,} parameters  ACC {acc}  ASR {asr}")

    most = int(options.keep * parameters(model))
    print(f"\nwithout the pass, to {options.keep:.0%} of the parameters")
    say("as given", model)
    pipeline(model, clean, most, epochs, say)

    if options.quick:  # nothing to recover in so young a network
        purified = purify(model, clean, "clp", selector=LowestFraction(0.05))
    else:
        purified = purify(model, clean, "tac", selector=TriggerGone(), seed=options.seed)
    print(f"\n{purified.summary()}\n\nwith the pass, to the same size")
    say("purified", purified.model)
    pipeline(purified.model, clean, most, epochs, say)


if __name__ == "__main__":
    main()
