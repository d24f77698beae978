"""What the examples share: options, a backdoored network with clean images, and measurements."""

from __future__ import annotations

import argparse
import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnprune_backdoor import (
    CleanData,
    Preprocessing,
    Purified,
    PurifyError,
    load_model,
    read_images,
    save_purified,
)
from nnprune_backdoor.attacks import create_attack, photo_patches
from nnprune_backdoor.attacks.evaluation import accuracy, attack_success
from nnprune_backdoor.demo import Demo, normalise
from nnprune_backdoor.files.images import read_classes
from nnprune_backdoor.selectors import LowestFraction

ADAMW = {"optimizer": "adamw", "weight_decay": 0.05}  # for networks without BatchNorm
QUICK = {"method": "clp", "selector": LowestFraction(0.05), "repair": "none"}


@dataclass(frozen=True, kw_only=True)
class Given:
    """A network and clean images for it."""

    model: nn.Module
    clean: CleanData
    options: argparse.Namespace

    def unless_quick(self, **settings: Any) -> dict[str, Any]:
        """These settings of `purify`; with --quick others, since no trigger was learned yet."""
        return {k: QUICK[k] if self.options.quick else value for k, value in settings.items()}

    def rates(self, purified: Purified) -> dict[str, tuple[str, str]]:
        """Name -> before, after: ACC on those clean images that were kept for measuring."""
        acc = purified.accuracy
        return {} if acc is None else {"ACC": (str(acc.before), str(acc.after))}


@dataclass(frozen=True, kw_only=True)
class Backdoored(Given):
    """A network with a known backdoor, and photographs that no defence sees, to measure on."""

    images: Tensor  # (N, 3, 32, 32), normalised
    triggered: Tensor  # the same images with the trigger
    labels: Tensor  # (N,), the true ones
    target: int

    def acc(self, model: nn.Module) -> str:
        """Share of the clean images that get their label."""
        return str(accuracy(model, self.images, self.labels))

    def asr(self, model: nn.Module) -> str:
        """Share of the triggered images that get the target label."""
        return str(attack_success(model, self.triggered, self.labels, self.target).asr)

    def rates(self, purified: Purified) -> dict[str, tuple[str, str]]:
        """Name -> before, after."""
        both = self.model, purified.model
        return {"ACC": tuple(map(self.acc, both)), "ASR": tuple(map(self.asr, both))}


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every example."""
    made = argparse.ArgumentParser(
        description=inspect.cleandoc(description or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--quick", action="store_true", help="hardly train, only to see it run")
    made.add_argument("--seed", type=int, default=0, help="of the training (%(default)s)")
    made.set_defaults(out=None)
    return made


def plant(demo: Demo, options: argparse.Namespace) -> Backdoored:
    """Train the network of `demo` with its backdoor; 500 test photographs are the clean images."""
    photos, demo = photo_patches(), replace(demo, seed=options.seed)
    if options.quick:
        demo = replace(demo, epochs=1, images=128, lr=min(demo.lr, 0.02))
    print(f"training {demo.arch}, {demo.rate:.0%} of the images with trigger and label", end=" ")
    print(f"{demo.target}; epochs: {demo.epochs}", flush=True)
    model = demo.train(photos, progress=True)
    order = torch.randperm(len(photos.test_labels), generator=torch.Generator().manual_seed(1))
    mine, hidden = (order[:100], order[100:200]) if options.quick else (order[:500], order[500:])
    pixels = photos.test_images[hidden]
    return Backdoored(
        model=model,
        clean=CleanData(normalise(photos.test_images[mine]), photos.test_labels[mine]),
        options=options,
        images=normalise(pixels),
        triggered=normalise(create_attack(demo.attack)(pixels)),
        labels=photos.test_labels[hidden],
        target=demo.target,
    )


def prepare(description: str | None, demo: Demo | Callable[[str], Demo]) -> Given:
    """Read the options of an architecture's script, then the user's files or train a network.

    Args:
        description: the script's docstring.
        demo: the network to train where no weights are given; or a function that makes it from
            the name of an architecture, and --arch must be given.
    """
    fixed = isinstance(demo, Demo)
    made = parser(description)
    made.add_argument("--weights", type=Path, metavar="FILE", help=".pth, .safetensors, ...")
    made.add_argument("--clean", type=Path, metavar="FOLDER", help="images, in class folders")
    made.add_argument(
        "--arch",
        required=not fixed,
        default=demo.arch if fixed else None,
        help="timm's name of the network" + (" in --weights (%(default)s)" if fixed else ""),
    )
    made.add_argument("--size", type=int, metavar="PIXELS", help="side of its images (timm's)")
    made.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="names of the class folders in the network's order, one a line (sorted names)",
    )
    made.add_argument("--out", type=Path, metavar="FOLDER", help="save the purified network here")
    options = made.parse_args()
    if (options.weights is None) != (options.clean is None):
        made.error("give both --weights and --clean, or neither")
    options.model_args = {}  # beside those that the weights tell
    if fixed and options.weights is None and options.arch != demo.arch:
        made.error("--arch needs --weights; any_timm.py trains other networks")
    try:
        if options.weights is not None:
            return _read(options)
        demo = demo if fixed else demo(options.arch)
        options.model_args = demo.arguments()
        return plant(demo, options)
    except PurifyError as error:
        made.error(str(error))


def _read(options: argparse.Namespace) -> Given:
    model = load_model(options.weights, options.arch)
    side = None if options.size is None else (options.size, options.size)
    preprocessing = Preprocessing.of(model.pretrained_cfg, size=side)
    found = read_images(
        options.clean,
        preprocessing,
        classes=None if options.classes is None else read_classes(options.classes),
        num_classes=model.num_classes,
        limit=500,
    )
    print(f"{options.weights.name}: {options.arch}, {model.num_classes} classes")
    print(f"{len(found.files)} of {found.found} images, prepared as {preprocessing}", flush=True)
    return Given(model=model, clean=found.data, options=options)


def parameters(model: nn.Module) -> int:
    """Number of weights."""
    return sum(weight.numel() for weight in model.parameters())


def show(given: Given, purified: Purified) -> None:
    """Print the network before and after, and what was only silenced; save it if asked to."""
    neurons, removal = len(purified.scores.flat), purified.removal
    rows = given.rates(purified) | {
        "neurons": (f"{neurons:,}", f"{neurons - len(purified.selection):,}"),
        "parameters": tuple(f"{parameters(one):,}" for one in (given.model, purified.model)),
    }
    print(f"\n{'':10}  {'before':>22}  {'after':>22}")
    for name, (before, after) in rows.items():
        print(f"{name:10}  {before:>22}  {after:>22}")
    print(f"\nwhy so many: {purified.selection.reason}")
    if removal is not None:
        print(f"removed from the tensors: {len(removal.removed)} neurons")
        for why, count in Counter(removal.silenced.values()).items():
            print(f"only silenced: {count} neurons, {why}")
    options = given.options
    if options.out is not None:
        save_purified(purified, options.out, arch=options.arch, model_args=options.model_args)
        print(f"saved in {options.out}")
