"""nnprune-backdoor evaluate: accuracy, and the success of an attack whose trigger is known."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import Commands, MisuseError, Result, add_command
from .names import ATTACKS
from .options import add_architecture, add_images, add_running, add_trigger_settings
from .plugins import add_plugins

if TYPE_CHECKING:
    from torch import Tensor

    from ..files.images import FolderImages
    from ..utils.statistics import Rate
    from .inputs import Model


def add(commands: Commands) -> None:
    """Add the command's options."""
    parser = add_command(
        commands,
        "evaluate MODEL",
        run,
        does="measure accuracy, and a backdoor's success if you have its trigger",
        more="ACC: share of clean images classified correctly. ASR: share of triggered images of "
        "other classes that are classified as the target. RA: share of these that are still "
        "classified correctly. All with 95 % intervals.",
        example="evaluate purified --clean images/ \\\n      --triggered triggered/ --target 0",
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="a checkpoint, or a folder that purify wrote"
    )
    parser.add_argument(
        "--clean",
        type=Path,
        metavar="DIR",
        help="clean images in class folders, or with --data-root the name of a data set",
    )
    group = parser.add_argument_group("the attack, if known")
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--trigger",
        metavar="NAME",
        help=f"stamp a known trigger on the clean images: {', '.join(ATTACKS)}",
    )
    which.add_argument(
        "--triggered",
        type=Path,
        metavar="DIR",
        help="triggered images in folders of their true class; without class folders, images of "
        "the target class count as well",
    )
    add_trigger_settings(group)
    group.add_argument(
        "--target", metavar="LABEL", help="the attacker's label, a number or the name of a class"
    )
    add_architecture(parser)
    add_images(parser, 2000)
    add_running(parser)
    add_plugins(parser)


def run(options: argparse.Namespace) -> Result:
    """Read the model and the images, predict, count."""
    _check(options)

    from ..attacks.evaluation import accuracy
    from .inputs import classes_of, label_of, load, read_folder
    from .preprocessing import preprocessing_of
    from .rates import rates_as_data, rates_as_text, trigger_of

    trigger = None if options.trigger is None else trigger_of(options)
    model = load(options, options.model)
    preprocessing = preprocessing_of(options, model, options.clean or options.triggered)
    rates: dict[str, Rate] = {}
    clean = triggered = None
    if options.clean is not None:
        clean = read_folder(options, options.clean, model, preprocessing)
        if clean.data.labels is None:
            raise MisuseError(
                f"{options.clean} has no class folders to measure accuracy by; sort the images "
                "into one folder per class"
            )
        rates["ACC"] = accuracy(
            model.network, clean.data.images, clean.data.labels, progress=not options.quiet
        )
    if options.triggered is not None:
        triggered = read_folder(
            options, options.triggered, model, preprocessing, may_be_dataset=False
        )
    known = next((images.classes for images in (clean, triggered) if images), ())
    measured = _measured(options, clean, triggered)
    if options.target is None:
        text, data = rates_as_text(rates, None, known), rates_as_data(rates, None)
        return Result(text, {**measured, **data})
    target = label_of(options.target, known, classes_of(model, preprocessing), "--target")
    if trigger is not None and clean is not None:
        stamped = preprocessing.normalise(trigger(preprocessing.pixels(clean.data.images)))
        rates |= _attack(options, model, stamped, clean.data.labels, target)
    if triggered is not None:
        rates |= _attack(options, model, triggered.data.images, triggered.data.labels, target)
    text = rates_as_text(rates, target, known)
    if triggered is not None and triggered.data.labels is None:
        text += "\nwithout class folders, triggered images of the target class count as well"
    return Result(text, {**measured, **rates_as_data(rates, target)})


def _measured(
    options: argparse.Namespace, clean: FolderImages | None, triggered: FolderImages | None
) -> dict[str, Any]:
    """Which weights and images were measured, and how."""
    from ..utils.fingerprint import fingerprint
    from .source import shown_path, weights_sha256

    sets = {"clean": clean, "triggered": triggered}
    return {
        "model": {"file": shown_path(options.model), "sha256": weights_sha256(options.model)},
        "images": {
            name: {
                "folder": getattr(options, name).resolve().name,
                "count": len(images.data),
                "sha256": fingerprint({"images": images.data.images}),
            }
            for name, images in sets.items()
            if images is not None
        },
        "seed": options.seed,
        "settings": {"trigger": options.trigger, "trigger-set": options.trigger_set},
    }


def _check(options: argparse.Namespace) -> None:
    """Raise MisuseError where options lack others that they need."""
    attacked = options.trigger is not None or options.triggered is not None
    if attacked and options.target is None:
        raise MisuseError("the attacker's label is not known; give --target LABEL")
    if options.target is not None and not attacked:
        raise MisuseError("--target needs triggered images; give --trigger NAME or --triggered DIR")
    if options.trigger is not None and options.clean is None:
        raise MisuseError("--trigger needs images to stamp; give --clean DIR too")
    if options.clean is None and options.triggered is None:
        raise MisuseError("nothing to measure; give --clean DIR, --triggered DIR, or both")
    if options.trigger_set and options.trigger is None:
        raise MisuseError("--trigger-set needs a trigger; give --trigger NAME too")


def _attack(
    options: argparse.Namespace, model: Model, images: Tensor, labels: Tensor | None, target: int
) -> dict[str, Rate]:
    """ASR and RA; without labels ASR alone, over all images."""
    from ..attacks.evaluation import attack_success
    from ..core.predictions import predict
    from ..utils.statistics import Rate

    progress = not options.quiet
    if labels is None:
        hits = predict(model.network, images, progress=progress) == target
        return {"ASR": Rate(int(hits.sum()), len(hits))}
    found = attack_success(model.network, images, labels, target, progress=progress)
    return {"ASR": found.asr, "RA": found.ra}
