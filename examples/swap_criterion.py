"""Swap the criterion in a Torch-Pruning script: magnitude, random, or a backdoor's trail.

Trains a backdoored ResNet on real photographs (about two minutes on two cores), then prunes the
same share of its channels three times, with the same pruner; only the importance differs. RNP is
given 500 clean images, and nothing is fine-tuned. Needs the extra `demo`.

    python examples/swap_criterion.py --ratio 0.05
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
import torch_pruning as tp
from torch import Tensor, nn

from nnprune_backdoor import CleanData
from nnprune_backdoor.attacks import Photos, create_attack, photo_patches
from nnprune_backdoor.attacks.evaluation import accuracy, attack_success
from nnprune_backdoor.demo import Demo, normalise
from nnprune_backdoor.importance import RNPImportance


def prune(model: nn.Module, importance: tp.importance.Importance, ratio: float) -> nn.Module:
    """What any Torch-Pruning script does; `model` is cut in place."""
    pruner = tp.pruner.BasePruner(
        model,
        (torch.zeros(2, 3, 32, 32),),
        importance=importance,
        pruning_ratio=ratio,
        global_pruning=True,
        ignored_layers=[model.fc],
    )
    pruner.step()
    return model


def measure(model: nn.Module, demo: Demo, pixels: Tensor, labels: Tensor) -> list[str]:
    """Channels, parameters, ACC and ASR, on photographs that training and pruning never saw."""
    triggered = create_attack(demo.attack)(pixels)
    acc = accuracy(model, normalise(pixels), labels)
    asr = attack_success(model, normalise(triggered), labels, demo.target).asr
    size = sum(parameter.numel() for parameter in model.parameters())
    width = sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    return [str(width), f"{size / 1e6:.2f} M", str(acc), str(asr)]


def compare(demo: Demo, photos: Photos, ratio: float, clean_images: int) -> list[list[str]]:
    """A row a criterion: name, channels, parameters, ACC, ASR, seconds."""
    order = torch.randperm(len(photos.test_labels), generator=torch.Generator().manual_seed(1))
    given, hidden = order[:clean_images], order[clean_images:]
    loader = CleanData(normalise(photos.test_images[given]), photos.test_labels[given])
    held_out = photos.test_images[hidden], photos.test_labels[hidden]

    trained = demo.train(photos, progress=True)
    rows = [["before", *measure(trained, demo, *held_out), ""]]
    for name in ("magnitude", "random", "rnp"):
        model, start = copy.deepcopy(trained), time.perf_counter()
        torch.manual_seed(demo.seed)
        if name == "magnitude":
            importance = tp.importance.MagnitudeImportance()
        elif name == "random":
            importance = tp.importance.RandomImportance()
        else:
            importance = RNPImportance(model, loader, seed=demo.seed)  # the swap
        prune(model, importance, ratio)
        taken = time.perf_counter() - start
        rows.append([name, *measure(model, demo, *held_out), f"{taken:.1f}"])
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=0.05, help="share of channels that goes")
    parser.add_argument("--epochs", type=int, default=Demo.epochs)
    parser.add_argument("--width", type=float, default=Demo.width, help="times the usual channels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clean", type=int, default=500, help="clean images for RNP")
    parser.add_argument("--train", type=int, default=None, help="training images; default all")
    options = parser.parse_args(arguments)

    photos = photo_patches()
    if options.train is not None:
        few = torch.randperm(
            len(photos.train_labels), generator=torch.Generator().manual_seed(options.seed)
        )[: options.train]
        photos = Photos(
            photos.train_images[few],
            photos.train_labels[few],
            photos.test_images,
            photos.test_labels,
            photos.class_names,
        )
    demo = Demo(epochs=options.epochs, width=options.width, seed=options.seed)
    rows = compare(demo, photos, options.ratio, options.clean)
    print(f"\n{options.ratio:.0%} of the channels pruned globally, no fine-tuning\n")
    widths = (9, 8, 10, 22, 22, 7)
    header = ["criterion", "channels", "parameters", "ACC", "ASR", "seconds"]
    for row in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)) + " |")


if __name__ == "__main__":
    main()
