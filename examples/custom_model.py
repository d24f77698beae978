"""A network of your own: any torch.nn.Module that turns images into logits.

This one is not timm's. It has two branches that are concatenated, a hand-written sum and a gate.
Nothing is declared: neurons are found by watching a forward pass. Its weights are read from a file
as a stranger's would be, and the purified network is saved and loaded again by giving the class.
In our run it was not purified: the trigger that was recovered is one of another label, and all 288
neurons are busy.

    python examples/custom_model.py    # about two minutes on two cores
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from _shared import parser, plant, show
from torch import Tensor, nn

from nnprune_backdoor import load_purified, load_weights, purify, save_purified
from nnprune_backdoor.core.sites import find_sites
from nnprune_backdoor.demo import Demo


class Block(nn.Module):
    """Two branches side by side, gated, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(width, width // 2, 3, padding=1), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(width, width // 2, 5, padding=2), nn.ReLU())
        self.mix = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.gate = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) -> the same shape."""
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
        """Positions matter to the hidden layer, so its input is flattened, not pooled."""
        x = nn.functional.max_pool2d(self.blocks(self.stem(images)), 2)
        return self.out(torch.relu(self.hidden(x.flatten(1))))


class MyDemo(Demo):
    """Trains MyNet with a backdoor."""

    def model(self) -> nn.Module:
        """Before training."""
        torch.manual_seed(self.seed)
        return MyNet()


def main() -> None:
    """Train, read, purify, save, load, measure."""
    options = parser(__doc__).parse_args()
    given = plant(MyDemo(arch="MyNet", target=3, epochs=10, lr=0.05), options)

    with TemporaryDirectory() as folder:
        file, saved = Path(folder) / "my.pth", Path(folder) / "purified"
        torch.save({"state_dict": given.model.state_dict(), "epoch": 10}, file)
        weights = load_weights(file)  # tensors only; no code in the file runs
        print(f"read {len(weights)} tensors; {'; '.join(weights.notes)}")
        model = MyNet().eval()
        model.load_state_dict(weights)

        print("\nneurons that were found:")
        for site in find_sites(model, given.clean.images[:2]):
            print(f"  {site.name:20} {site.channels:4} channels")
        settings = given.unless_quick(method="tac", selector="trigger", repair="unlearn")
        purified = purify(model, given.clean, seed=options.seed, **settings)

        save_purified(purified, saved, arch=None)
        again = load_purified(saved, model=MyNet())  # of the original shape
        with torch.no_grad():
            same = torch.equal(purified.model(given.clean.images), again(given.clean.images))
        print(f"\nsaved and loaded again, equal logits: {same}")
    show(given, replace(purified, model=again))


if __name__ == "__main__":
    main()
