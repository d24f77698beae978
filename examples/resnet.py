"""ResNets: plant a backdoor, purify, save, and see what could be taken out, and why.

Half the channels of a ResNet's BatchNorms lie on the residual stream: what one block writes is
added to what the others wrote. Such a channel is silenced at once, but leaves the tensors only
when every block that writes to it is silent. The inner channels of a block go whenever they are
silent.

    python examples/resnet.py            # the whole thing, some minutes on two cores
    python examples/resnet.py --quick    # a network that has learned little, to see it run
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from nnprune_backdoor import load_purified, save_purified
from nnprune_backdoor.demo import Demo, run_demo
from nnprune_backdoor.selectors import LowestFraction, TriggerGone

DRILL = {
    "arch": "resnet18",
    "width": 0.5,
    "settings": {},
    "epochs": 8,
    "lr": 0.1,
}


def main(arguments: list[str] | None = None) -> None:
    """Train, purify, measure, save, load."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="so young that nothing is learned")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the purified model")
    options = parser.parse_args(arguments)

    demo, measured = Demo(seed=options.seed, **DRILL), None
    method, selector = "tac", TriggerGone()
    if options.quick:  # nothing to recover in so young a network: a criterion that asks no image
        demo = replace(demo, epochs=1, images=640)
        method, selector, measured = "clp", LowestFraction(0.05), 200
    outcome = run_demo(
        demo, method=method, selector=selector, measured_images=measured, progress=True
    )
    purified = outcome.purified
    print(f"\n{purified.summary()}\n\n{outcome.table()}\n")

    if purified.removal is not None:
        print(f"removed from the tensors: {len(purified.removal.removed)} neurons")
        for why, count in Counter(purified.removal.silenced.values()).items():
            print(f"only silenced: {count} neurons, {why}")

    with TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch) / "purified"
        save_purified(purified, folder, arch=demo.arch, model_args=demo.arguments())
        again = load_purified(folder)
        images = torch.randn(4, 3, 32, 32)
        with torch.no_grad():
            same = torch.equal(purified.model.eval()(images), again(images))
        size = (folder / "model.safetensors").stat().st_size
        print(f"saved {size:,} bytes of weights; loaded again, equal logits: {same}")


if __name__ == "__main__":
    main()
