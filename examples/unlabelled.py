"""Clean images without labels, pruning alone: CNP, and the selectors that can go with it.

`purify(model, images)` needs no labels: it silences a few of the neurons and distils. This
script trains nothing. Recovering a trigger and ranking neurons by what it works through needs no
labels either. Deciding how many go is harder: selectors that measure accuracy need labels, and
`purify` refuses them where there are none. So an amount is named beforehand. Other amounts are then
compared by two numbers that need no labels, on images that the criterion did not see: how often the
prediction is still that of the given network, and how often the recovered trigger works.

    python examples/unlabelled.py    # about two minutes on two cores
"""

from __future__ import annotations

import copy

from _shared import parser, plant

from nnprune_backdoor import CleanData, list_selectors, purify
from nnprune_backdoor.core.masks import silence_
from nnprune_backdoor.core.predictions import predict
from nnprune_backdoor.criteria import CNP, Response
from nnprune_backdoor.demo import Demo
from nnprune_backdoor.errors import DataError
from nnprune_backdoor.selectors import LowestFraction
from nnprune_backdoor.selectors.base import selector_class


def main() -> None:
    """Score once without labels and try several amounts; then look at what is true."""
    options = parser(__doc__).parse_args()
    for name in list_selectors():
        needs = "labels" if selector_class(name).needs_labels else "no labels"
        print(f"selector {name:10} needs {needs}")

    given = plant(Demo(width=0.25), options)
    images = given.clean.images  # no label from here on
    clean, kept = CleanData(images[:350]), images[350:]
    # a network that was hardly trained has no trigger that works: take any
    criterion = CNP()
    if options.quick:
        criterion = CNP(target=0, steps=10, min_success=0.0, ranking=Response(rounds=1))

    try:
        purify(given.model, clean, criterion, selector="accuracy")
    except DataError as refusal:
        print(f"\nrefused: {refusal}")

    purified = purify(
        given.model, clean, criterion, selector=LowestFraction(0.02), seed=options.seed
    )
    print(f"\n{purified.summary()}\n")

    (trigger,) = purified.scores.triggers
    predictions = predict(given.model, kept)
    stamped = trigger(kept[predictions != trigger.target])
    print(f"on {len(kept)} images, trigger of label {trigger.target} | what an attacker would see")
    for share in (0.0, 0.005, 0.01, 0.02, 0.04):
        silenced = copy.deepcopy(given.model)
        silence_(silenced, LowestFraction(share)(purified.scores))
        same = (predict(silenced, kept) == predictions).float().mean()
        works = (predict(silenced, stamped) == trigger.target).float().mean()
        print(
            f"{share:5.1%}  same prediction {same:6.1%}  trigger works {works:6.1%}"
            f"  |  ACC {given.acc(silenced)}  ASR {given.asr(silenced)}"
        )


if __name__ == "__main__":
    main()
