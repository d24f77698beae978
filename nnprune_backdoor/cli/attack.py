"""nnprune-backdoor attack: plant a backdoor in a model of one's own, for demos."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError
from ..utils.whole_file import write_whole
from .base import (
    Commands,
    MisuseError,
    Result,
    add_command,
    check_writable,
    note,
)
from .names import ATTACKS
from .options import add_architecture, add_images, add_running, add_trigger_settings
from .plugins import add_plugins

if TYPE_CHECKING:
    from torch import nn

    from ..attacks.base import Trigger
    from ..core.data import CleanData
    from ..files.preprocessing import Preprocessing
    from ..utils.statistics import Rate
    from .inputs import Model

TOOK = 0.5  # attack success from which the backdoor is said to have taken

_HELD_OUT = 0.2  # share of the images that rates are measured on


def add(commands: Commands) -> None:
    """Add the command's options."""
    parser = add_command(
        commands,
        "attack DIR --out FILE",
        run,
        does="plant a backdoor in a model of your own, for a demo",
        more="Stamps a trigger on a share of the images, gives these the target label, and trains "
        "a model on all images, from scratch or from --model. A fifth of the images is held "
        f"out to measure on; where the trigger fools less than {TOOK:.0%} of them, a caution says "
        "so.",
        example="attack photos/ --arch resnet18 --trigger badnets --target 0 \\\n"
        "      --epochs 8 --out backdoored.safetensors",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="images in class folders")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="file to write the weights to, .safetensors",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    parser.add_argument(
        "--model",
        type=Path,
        metavar="CHECKPOINT",
        help="train this model further (default: from scratch)",
    )
    _add_attack(parser)
    add_architecture(parser)
    add_images(parser, None)
    add_running(parser)
    add_plugins(parser)


def _add_attack(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the attack")
    group.add_argument(
        "--trigger",
        default="badnets",
        metavar="NAME",
        help=f"{', '.join(ATTACKS)} (default: badnets)",
    )
    add_trigger_settings(group)
    group.add_argument(
        "--target",
        default="0",
        metavar="LABEL",
        help="the attacker's label, a number or the name of a class (default: 0)",
    )
    group.add_argument(
        "--rate",
        type=float,
        default=0.05,
        metavar="X",
        help="share of the training images to poison (default: 0.05)",
    )
    group = parser.add_argument_group("the training")
    group.add_argument(
        "--epochs",
        type=int,
        default=8,
        metavar="N",
        help="passes over the training images (default: 8)",
    )
    group.add_argument(
        "--lr",
        type=float,
        metavar="X",
        help="highest learning rate (default: 0.1, with --model 0.01)",
    )
    group.add_argument(
        "--batch-size", type=int, default=128, metavar="N", help="images a step (default: 128)"
    )


def run(options: argparse.Namespace) -> Result:
    """Read the images, poison some, train, measure, write the weights."""
    from safetensors.torch import save

    from ..files.architecture import create
    from ..files.saving import tensors_of
    from .inputs import device_of, label_of, read_folder
    from .preprocessing import preprocessing_of
    from .rates import rates_as_data, rates_as_text, trigger_of

    trigger = trigger_of(options)
    _check(options)
    model = _start(options)
    preprocessing = preprocessing_of(options, model, options.folder)
    further = options.model is not None
    images = read_folder(options, options.folder, model, preprocessing, classes_of_model=further)
    if images.data.labels is None:
        raise MisuseError(
            f"{options.folder} has no class folders; sort the images into one folder per class"
        )
    target = label_of(options.target, images.classes, len(images.classes), "--target")
    network = model.network
    if not further:
        arguments = {**model.arguments, "num_classes": len(images.classes)}
        network = create(options.arch, arguments).to(device_of(options))
    train, test = images.data.split(1 - _HELD_OUT, _HELD_OUT, seed=options.seed)
    _train(options, network, train, preprocessing=preprocessing, trigger=trigger, target=target)
    rates = _measure(network, test, preprocessing, trigger, target)
    write_whole(options.out, save(tensors_of(network), {"format": "pt"}))
    text = f"{rates_as_text(rates, target, images.classes)}\n\nsaved {options.out}"
    took = rates["ASR"].value >= TOOK
    if not took:
        text += (
            f"\n\nCaution: the backdoor did not take, ASR {rates['ASR'].value:.1%}, under "
            f"{TOOK:.0%}. The file holds a model without a working\nbackdoor; give more --epochs, "
            "a higher --rate or a larger trigger, and --overwrite."
        )
        if options.format != "text":  # which shows no text
            note(options, f"caution: the backdoor did not take (ASR {rates['ASR'].value:.1%})")
    data = {**rates_as_data(rates, target), "took": took, "out": str(options.out)}
    return Result(text, data)


def _check(options: argparse.Namespace) -> None:
    """Raise MisuseError for what can be known to fail before any work."""
    if options.out.suffix != ".safetensors":
        raise MisuseError(f"--out {options.out}: expected a name ending in .safetensors")
    if options.out.exists() and not options.overwrite:
        raise MisuseError(f"--out {options.out} exists already; give another name, or --overwrite")
    for option in ("model", "classes"):
        given = getattr(options, option)
        if given is not None and options.out.resolve() == given.resolve():
            raise MisuseError(f"--out {options.out} is --{option} itself; give another name")
    check_writable(options.out, "--out")
    if options.model is None and options.arch is None:
        raise MisuseError(
            "there is no model to train; give --arch NAME to train from scratch, or "
            "--model CHECKPOINT"
        )
    if not 0 < options.rate <= 1:
        raise MisuseError(f"--rate {options.rate:g}: expected a share in (0, 1]")
    if options.epochs < 1:
        raise MisuseError(f"--epochs {options.epochs}: expected 1 or more")
    if options.batch_size < 2:
        raise MisuseError(f"--batch-size {options.batch_size}: expected 2 or more")
    if options.lr is not None and options.lr <= 0:
        raise MisuseError(f"--lr {options.lr:g}: expected a number above 0")


def _start(options: argparse.Namespace) -> Model:
    """The model to train further, or one of --arch from which only the input's size is read."""
    from ..files.architecture import create
    from ..files.record_file import purified_folder
    from .inputs import Model, load
    from .name_value import read_plain

    if options.model is not None:
        if purified_folder(options.model):
            raise MisuseError(
                f"--model {options.model} is a purified model, whose layers may be smaller than "
                "those of its architecture, and attack writes weights alone; give a checkpoint"
            )
        return load(options, options.model)
    arguments = read_plain(options.arch_arg)
    return Model(create(options.arch, arguments), options.arch, arguments, {})


def _train(
    options: argparse.Namespace,
    network: nn.Module,
    train: CleanData,
    *,
    preprocessing: Preprocessing,
    trigger: Trigger,
    target: int,
) -> None:
    """Poison the training images, and train the network on them in place."""
    from ..attacks.poisoning import poison
    from ..attacks.training import train_classifier

    pixels, labels, poisoned = poison(
        preprocessing.pixels(train.images),
        train.targets,
        trigger,
        target=target,
        rate=options.rate,
        seed=options.seed,
    )
    if len(poisoned) == 0:
        raise DataError(
            f"--rate {options.rate:g} of {len(train)} images is less than one image; give a "
            "higher rate, or more images"
        )
    note(options, f"training on {len(train)} images, {len(poisoned)} of them poisoned")
    train_classifier(
        network.requires_grad_(True),
        preprocessing.normalise(pixels),
        labels,
        epochs=options.epochs,
        lr=options.lr or (0.1 if options.model is None else 0.01),
        batch_size=min(options.batch_size, len(train)),
        seed=options.seed,
        progress=not options.quiet,
    )


def _measure(
    network: nn.Module, test: CleanData, preprocessing: Preprocessing, trigger: Trigger, target: int
) -> dict[str, Rate]:
    """ACC, ASR and RA on the images held out."""
    from ..attacks.evaluation import accuracy, attack_success

    stamped = preprocessing.normalise(trigger(preprocessing.pixels(test.images)))
    attack = attack_success(network, stamped, test.targets, target)
    return {
        "ACC": accuracy(network, test.images, test.targets),
        "ASR": attack.asr,
        "RA": attack.ra,
    }
