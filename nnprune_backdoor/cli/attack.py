"""nnprune-backdoor attack: plant a backdoor in a model of one's own, for demos."""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import save

from ..attacks.base import list_attacks
from ..attacks.evaluation import accuracy, attack_success
from ..attacks.poisoning import poison
from ..attacks.training import train_classifier
from ..core.data import CleanData
from ..errors import DataError
from ..files.architecture import create
from ..files.saving import tensors_of
from .base import (
    Commands,
    MisuseError,
    Result,
    add_command,
    add_running,
    check_writable,
    write_whole,
)
from .inputs import (
    Model,
    add_architecture,
    add_images,
    device_of,
    label_of,
    load,
    note,
    preprocessing_of,
    read_folder,
)
from .name_value import read_plain
from .plugins import add_plugins
from .rates import add_trigger_settings, rates_as_data, rates_as_text, trigger_of

_HELD_OUT = 0.2  # of the images, to measure on


def add(commands: Commands) -> None:
    """The parser."""
    parser = add_command(
        commands,
        "attack",
        run,
        does="plant a backdoor in a model of your own, for a demo",
        usage="DIR --out FILE",
        more="Trains on images of which a share is stamped and relabelled, from scratch or from "
        "--model, and measures on a fifth of the images that it was not trained on.",
        example="attack photos/ --arch resnet18 --trigger badnets --target 0 \\\n"
        "      --epochs 8 --out backdoored.safetensors",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="images in class folders")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="weights to write, .safetensors"
    )
    parser.add_argument(
        "--model", type=Path, metavar="CHECKPOINT", help="train these weights further"
    )
    group = parser.add_argument_group("the attack")
    group.add_argument(
        "--trigger",
        default="badnets",
        metavar="NAME",
        help=f"{', '.join(list_attacks())} (badnets)",
    )
    add_trigger_settings(group)
    group.add_argument(
        "--target", default="0", metavar="LABEL", help="the attacker's label, number or name (0)"
    )
    group.add_argument(
        "--rate", type=float, default=0.05, metavar="X", help="share that is poisoned (0.05)"
    )
    group = parser.add_argument_group("the training")
    group.add_argument("--epochs", type=int, default=8, metavar="N", help="(8)")
    group.add_argument(
        "--lr", type=float, metavar="X", help="highest learning rate (0.1, with --model 0.01)"
    )
    group.add_argument("--batch-size", type=int, default=128, metavar="N", help="(128)")
    add_architecture(parser)
    add_images(parser, None)
    add_running(parser)
    add_plugins(parser)


def run(options: argparse.Namespace) -> Result:
    """Read, poison, train, measure, write."""
    trigger = trigger_of(options)
    _check(options)
    model = _given(options)
    preprocessing = preprocessing_of(options, model)
    fixed = options.model is not None
    images = read_folder(options, options.folder, model, preprocessing, fixed=fixed)
    if images.data.labels is None:
        raise MisuseError(f"{options.folder} has no class folders; sort images into one a class")
    target = label_of(options.target, images.classes, len(images.classes))
    network = model.network
    if not fixed:
        arguments = {**model.arguments, "num_classes": len(images.classes)}
        network = create(options.arch, arguments).to(device_of(options))
    train, test = images.data.split(1 - _HELD_OUT, _HELD_OUT, seed=options.seed)
    pixels, labels, chosen = poison(
        preprocessing.pixels(train.images),
        train.targets,
        trigger,
        target=target,
        rate=options.rate,
        seed=options.seed,
    )
    if len(chosen) == 0:
        raise DataError(
            f"--rate {options.rate:g} of {len(train)} images is none; raise it, or give more images"
        )
    note(options, f"training on {len(train)} images, {len(chosen)} of them poisoned")
    train_classifier(
        network.requires_grad_(True),
        preprocessing.normalise(pixels),
        labels,
        epochs=options.epochs,
        lr=options.lr or (0.01 if fixed else 0.1),
        batch_size=min(options.batch_size, len(train)),
        seed=options.seed,
        progress=not options.quiet,
    )
    stamped = CleanData(preprocessing.normalise(trigger(preprocessing.pixels(test.images))))
    rates = {"ACC": accuracy(network, test.images, test.targets)}
    found = attack_success(network, stamped.images, test.targets, target)
    rates |= {"ASR": found.asr, "RA": found.ra}
    write_whole(options.out, save(tensors_of(network), {"format": "pt"}))
    text = f"{rates_as_text(rates, target, images.classes)}\n\nsaved {options.out}"
    return Result(text, {**rates_as_data(rates, target), "out": str(options.out)})


def _check(options: argparse.Namespace) -> None:
    """What can be known before any work."""
    if options.out.suffix != ".safetensors":
        raise MisuseError(f"--out {options.out}: expected a name ending in .safetensors")
    if options.out.exists():
        raise MisuseError(f"--out {options.out} is there already; give another name")
    check_writable(options.out, "--out")
    if options.model is None and options.arch is None:
        raise MisuseError("give --arch NAME to train from scratch, or --model CHECKPOINT")
    if not 0 < options.rate <= 1:
        raise MisuseError(f"--rate {options.rate:g}: expected a share in (0, 1]")
    if options.epochs < 1 or options.batch_size < 2 or (options.lr is not None and options.lr <= 0):
        raise MisuseError("expected --epochs of 1 or more, --batch-size of 2 or more, --lr > 0")


def _given(options: argparse.Namespace) -> Model:
    """The model to begin with; a fresh one is only asked what images it takes."""
    if options.model is not None:
        if options.model.is_dir():
            raise MisuseError(f"{options.model} is a folder; --model takes a checkpoint file")
        return load(options, options.model)
    arguments = read_plain(options.arch_arg)
    return Model(create(options.arch, arguments), options.arch, arguments, {})
