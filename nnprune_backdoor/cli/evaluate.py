"""nnprune-backdoor evaluate: accuracy, and what triggered images do where there are some."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

from ..attacks.base import list_attacks
from ..attacks.evaluation import accuracy, attack_success
from ..core.predictions import predict
from ..utils.statistics import Rate
from .base import Commands, MisuseError, Result, add_command, add_running
from .inputs import (
    Model,
    add_architecture,
    add_images,
    classes_of,
    label_of,
    load,
    preprocessing_of,
    read_folder,
)
from .plugins import add_plugins
from .rates import add_trigger_settings, rates_as_data, rates_as_text, trigger_of


def add(commands: Commands) -> None:
    """The parser."""
    parser = add_command(
        commands,
        "evaluate",
        run,
        does="measure accuracy, and a backdoor's success if you have its trigger",
        usage="MODEL",
        more="ACC: clean images that get their label. ASR: triggered images of other classes "
        "that are sent to the target. RA: triggered images that still get their label. "
        "All with 95 % intervals.",
        example="evaluate purified --clean images/ \\\n      --triggered triggered/ --target 0",
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="a checkpoint, or a folder that purify wrote"
    )
    parser.add_argument(
        "--clean", type=Path, metavar="DIR", help="clean images in class folders, or a data set"
    )
    group = parser.add_argument_group("the attack, if known")
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--trigger",
        metavar="NAME",
        help=f"stamp the clean images with a known trigger: {', '.join(list_attacks())}",
    )
    which.add_argument(
        "--triggered",
        type=Path,
        metavar="DIR",
        help="triggered images, in folders of their true class; without class folders all count",
    )
    add_trigger_settings(group)
    group.add_argument("--target", metavar="LABEL", help="the attacker's label, number or name")
    add_architecture(parser)
    add_images(parser, 2000)
    add_running(parser)
    add_plugins(parser)


def run(options: argparse.Namespace) -> Result:
    """Read, predict, count."""
    attacked = options.trigger is not None or options.triggered is not None
    if attacked != (options.target is not None):
        raise MisuseError("give --target together with --trigger or --triggered")
    if options.trigger is not None and options.clean is None:
        raise MisuseError("--trigger stamps clean images; give --clean DIR too")
    if options.clean is None and options.triggered is None:
        raise MisuseError("nothing to measure; give --clean DIR, --triggered DIR, or both")
    if options.trigger_set and options.trigger is None:
        raise MisuseError("--trigger-set needs --trigger")
    trigger = None if options.trigger is None else trigger_of(options)
    model = load(options, options.model)
    preprocessing = preprocessing_of(options, model)
    rates: dict[str, Rate] = {}
    clean = triggered = None
    if options.clean is not None:
        clean = read_folder(options, options.clean, model, preprocessing)
        if clean.data.labels is None:
            raise MisuseError(f"{options.clean} has no class folders, so there is no accuracy")
        rates["ACC"] = accuracy(
            model.network, clean.data.images, clean.data.labels, progress=not options.quiet
        )
    if options.triggered is not None:
        triggered = read_folder(options, options.triggered, model, preprocessing, named=False)
    known = next((images.classes for images in (clean, triggered) if images), ())
    if not attacked:
        return Result(rates_as_text(rates, None, known), rates_as_data(rates, None))
    target = label_of(options.target, known, classes_of(model, preprocessing))
    if trigger is not None and clean is not None:
        pixels = trigger(preprocessing.pixels(clean.data.images))
        stamped = preprocessing.normalise(pixels)
        rates |= _attack(options, model, stamped, clean.data.labels, target)
    if triggered is not None:
        rates |= _attack(options, model, triggered.data.images, triggered.data.labels, target)
    text = rates_as_text(rates, target, known)
    if triggered is not None and triggered.data.labels is None:
        text += "\nThe triggered images have no class folders, so those of the target itself count."
    return Result(text, rates_as_data(rates, target))


def _attack(
    options: argparse.Namespace, model: Model, images: Tensor, labels: Tensor | None, target: int
) -> dict[str, Rate]:
    progress = not options.quiet
    if labels is None:
        hits = predict(model.network, images, progress=progress) == target
        return {"ASR": Rate(int(hits.sum()), len(hits))}
    found = attack_success(model.network, images, labels, target, progress=progress)
    return {"ASR": found.asr, "RA": found.ra}
