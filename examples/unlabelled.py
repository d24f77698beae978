"""Clean images without labels: CNP, and the selectors that can go with it.

Recovering a trigger and ranking neurons by what it works through needs no label. How much goes is
the harder question: selectors that count accuracy need labels, and `purify` refuses them at once
where there are none. So an amount is named beforehand. To look around it, the same scores serve
other amounts, with two numbers that need no label either, on images that the criterion did not
see: how often the answer is still the given model's, and how often the recovered trigger works.
Needs the extra `demo`.

    python examples/unlabelled.py            # about two minutes on two cores
    python examples/unlabelled.py --quick    # a network that has learned little, to see it run
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace

import torch

from nnprune_backdoor import CleanData, list_selectors, purify
from nnprune_backdoor.attacks import create_attack, photo_patches
from nnprune_backdoor.attacks.evaluation import accuracy, attack_success
from nnprune_backdoor.core.masks import silence_
from nnprune_backdoor.core.predictions import predict
from nnprune_backdoor.criteria import CNP
from nnprune_backdoor.demo import Demo, normalise
from nnprune_backdoor.errors import DataError
from nnprune_backdoor.selectors import LowestFraction
from nnprune_backdoor.selectors.base import selector_class


def main(arguments: list[str] | None = None) -> None:
    """Score once without labels, try several amounts, then look behind the curtain."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="so young that nothing is learned")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    for name in list_selectors():
        needs = "labels" if selector_class(name).needs_labels else "no labels"
        print(f"selector {name:10} needs {needs}")

    demo, criterion = Demo(width=0.25, seed=options.seed), CNP()
    if options.quick:
        demo = replace(demo, epochs=1, images=640)
        criterion = CNP(target=0, steps=10, min_success=0.0, rounds=1)
    photos = photo_patches()
    model = demo.train(photos, progress=True)
    order = torch.randperm(len(photos.test_labels), generator=torch.Generator().manual_seed(1))
    given, hidden = order[:500], order[500 : 700 if options.quick else None]
    images = normalise(photos.test_images[given])  # no label from here on
    ours, kept = CleanData(images[:350]), images[350:]

    try:
        purify(model, ours, criterion, selector="accuracy")
    except DataError as refusal:
        print(f"\nrefused: {refusal}")

    purified = purify(model, ours, criterion, selector=LowestFraction(0.02), seed=options.seed)
    print(f"\n{purified.summary()}\n")

    (trigger,) = purified.scores.triggers
    answers = predict(model, kept)
    others = answers != trigger.target
    pixels, labels = photos.test_images[hidden], photos.test_labels[hidden]
    triggered = normalise(create_attack(demo.attack)(pixels))
    print(
        f"{len(kept)} images without labels, trigger of label {trigger.target}; then what is true"
    )
    for share in (0.0, 0.005, 0.01, 0.02, 0.04):
        silenced = copy.deepcopy(model)
        silence_(silenced, LowestFraction(share)(purified.scores))
        same = (predict(silenced, kept) == answers).float().mean()
        works = (predict(silenced, trigger(kept[others])) == trigger.target).float().mean()
        asr = attack_success(silenced, triggered, labels, demo.target).asr
        print(
            f"{share:5.1%}  same answer {same:6.1%}  trigger works {works:6.1%}"
            f"  |  ACC {accuracy(silenced, normalise(pixels), labels)}  ASR {asr}"
        )


if __name__ == "__main__":
    main()
