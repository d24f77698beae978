"""A network of your own: any torch.nn.Module that turns images into logits.

This one is not timm's, has two branches that are concatenated, a hand-written sum and a gate.
Nothing is declared anywhere: neurons are found by watching a forward pass. Plant a backdoor, read
the weights from a file as a stranger's, purify, see what could be taken out, save, and load again
by giving the class. With 288 neurons, all of them busy, so small a network may be beyond pruning;
then the line `because` says that the aim was missed, and the attack's success at the end agrees.
Needs the extra `demo`.

    python examples/custom_model.py            # about two minutes on two cores
    python examples/custom_model.py --quick    # a network that has learned little, to see it run
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from nnprune_backdoor import CleanData, load_purified, load_weights, purify, save_purified
from nnprune_backdoor.attacks import create_attack, photo_patches, poison, train_classifier
from nnprune_backdoor.attacks.evaluation import accuracy, attack_success
from nnprune_backdoor.core.sites import find_sites
from nnprune_backdoor.demo import normalise
from nnprune_backdoor.selectors import LowestFraction, TriggerGone

TARGET = 3


class Block(nn.Module):
    """Two branches side by side, gated, added to what came in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(width, width // 2, 3, padding=1), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(width, width // 2, 5, padding=2), nn.ReLU())
        self.mix = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.gate = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) -> the same."""
        y = self.mix(torch.cat([self.fine(x), self.coarse(x)], 1))
        gate = torch.sigmoid(self.gate(y.mean((2, 3))))
        return torch.relu(x + y * gate[:, :, None, None])


class MyNet(nn.Module):
    """Images (N, 3, 32, 32) -> logits (N, 10)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.blocks = nn.Sequential(Block(width), nn.MaxPool2d(2), Block(width))
        self.hidden = nn.Linear(width * 16, 64)
        self.out = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """The hidden layer sees where things are, so `flatten`, no pooling to one pixel."""
        x = nn.functional.max_pool2d(self.blocks(self.stem(images)), 2)
        return self.out(torch.relu(self.hidden(x.flatten(1))))


def main(arguments: list[str] | None = None) -> None:
    """Train, purify, measure, save, load."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="so young that nothing is learned")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    photos, trigger = photo_patches(), create_attack("badnets")
    some = torch.randperm(
        len(photos.train_labels), generator=torch.Generator().manual_seed(options.seed)
    )[: 640 if options.quick else None]
    pixels, labels, _ = poison(
        photos.train_images[some],
        photos.train_labels[some],
        trigger,
        target=TARGET,
        rate=0.05,
        seed=options.seed,
    )
    torch.manual_seed(options.seed)
    trained = train_classifier(
        MyNet(),
        normalise(pixels),
        labels,
        epochs=1 if options.quick else 10,
        lr=0.05,
        seed=options.seed,
        progress=True,
    )

    with TemporaryDirectory() as scratch:
        # what a stranger would send; tensors alone are read from it
        torch.save({"state_dict": trained.state_dict(), "epoch": 10}, Path(scratch) / "my.pth")
        weights = load_weights(Path(scratch) / "my.pth")
        print(f"read {len(weights)} tensors; {'; '.join(weights.notes)}")
        model = MyNet()
        model.load_state_dict(weights)
        model.eval()

        order = torch.randperm(len(photos.test_labels), generator=torch.Generator().manual_seed(1))
        given, hidden = order[:500], order[500 : 700 if options.quick else None]
        clean = CleanData(normalise(photos.test_images[given]), photos.test_labels[given])
        print("\nneurons that were found:")
        for site in find_sites(model, clean.images[:2]):
            print(f"  {site.name:20} {site.channels:4} channels")

        if options.quick:  # nothing to recover in so young a network
            purified = purify(model, clean, "clp", selector=LowestFraction(0.05))
        else:
            purified = purify(model, clean, "tac", selector=TriggerGone(), seed=options.seed)
        print(f"\n{purified.summary()}\n")
        if purified.removal is not None:
            for why, count in Counter(purified.removal.silenced.values()).items():
                print(f"only silenced: {count} neurons, {why}")

        save_purified(purified, Path(scratch) / "purified", arch=None)
        again = load_purified(Path(scratch) / "purified", model=MyNet())  # the original shape
        with torch.no_grad():
            same = torch.equal(purified.model(clean.images), again(clean.images))
        print(f"saved and loaded again, equal logits: {same}\n")

    pixels, labels = photos.test_images[hidden], photos.test_labels[hidden]
    triggered = normalise(trigger(pixels))
    for name, each in (("before", model), ("after", again)):
        attack = attack_success(each, triggered, labels, TARGET)
        size = sum(weight.numel() for weight in each.parameters())
        acc = accuracy(each, normalise(pixels), labels)
        print(f"{name:6} {size:9,} parameters  ACC {acc}  ASR {attack.asr}  RA {attack.ra}")


if __name__ == "__main__":
    main()
