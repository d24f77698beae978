"""Options for models and image folders, and what they are read into."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import DataError, unknown_name
from ..files.architecture import built, create
from ..files.checkpoint import load_weights
from ..files.datasets import list_datasets, read_dataset
from ..files.images import FolderImages, read_classes, read_images, shown
from ..files.preprocessing import Preprocessing, refuse_other_channels
from ..files.record_file import read_record
from ..files.saving import load_purified
from .base import MisuseError, printable
from .name_value import read_plain

_FEW = 5  # files that are named where more were skipped


@dataclass(frozen=True)
class Model:
    """A network and what is known of it."""

    network: nn.Module
    arch: str | None  # timm's name
    arguments: dict[str, Any]  # of timm.create_model
    source: dict[str, Any]  # on record where it was purified: preprocessing and classes, if any
    shape: tuple[int, ...] = ()  # (C, H, W) on record

    @property
    def channels(self) -> int:
        """Of the images that it takes."""
        given = self.arguments.get("in_chans", self.shape[0] if self.shape else 3)
        return given if isinstance(given, int) else 3


def add_architecture(parser: argparse.ArgumentParser) -> None:
    """How a checkpoint is read."""
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--arch", metavar="NAME", help="timm's name of the architecture, such as resnet18"
    )
    group.add_argument(
        "--arch-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of timm.create_model, such as img_size=64; may be repeated. The number "
        "of classes and of channels are found from the weights",
    )
    group.add_argument(
        "--key", metavar="NAME", help="entry of the file that holds the weights, such as model_ema"
    )


def add_images(parser: argparse.ArgumentParser, most: int | None) -> None:
    """How images are read; `most` is how many are used unless told otherwise."""
    group = parser.add_argument_group("the images")
    group.add_argument(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="then the images are not a folder but a data set that torchvision keeps in DIR: "
        f"{', '.join(list_datasets())}; nothing is downloaded",
    )
    group.add_argument(
        "--split", choices=("test", "train"), help="of that data set, used with --data-root (test)"
    )
    group.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="names of the class folders in the model's order, one a line; else their names, "
        "sorted (as numbers where all are), are the classes 0, 1, ...",
    )
    group.add_argument(
        "--images",
        type=int,
        default=most,
        metavar="N",
        help=f"use N images, drawn by seed and balanced over classes ({most or 'all'})",
    )
    group.add_argument(
        "--size", type=int, nargs="+", metavar="PX", help="side, or height and width (timm's)"
    )
    for name in ("mean", "std"):
        group.add_argument(
            f"--{name}",
            type=float,
            nargs="+",
            metavar="X",
            help=f"{name} of the normalisation, one a channel, of pixels in [0, 1] (timm's)",
        )
    group.add_argument(
        "--interpolation", choices=("bilinear", "bicubic", "nearest"), help="(timm's)"
    )
    group.add_argument(
        "--crop-pct", type=float, metavar="X", help="part that the centre crop keeps (timm's)"
    )


def note(options: argparse.Namespace, text: str) -> None:
    """On standard error, unless --quiet."""
    if not options.quiet:
        print(printable(text), file=sys.stderr, flush=True)


def device_of(options: argparse.Namespace) -> torch.device:
    """The device asked for, tried."""
    try:
        device = torch.device(options.device)
        torch.zeros(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0][:150]
        raise MisuseError(f"--device {options.device}: not usable here ({first})") from error
    return device


def load(options: argparse.Namespace, path: Path) -> Model:
    """A checkpoint, or a folder that `purify` wrote, on the device asked for."""
    device = device_of(options)
    arguments = read_plain(options.arch_arg)
    if path.is_dir():
        if options.arch is not None or arguments or options.key is not None:
            raise MisuseError(f"{path} is a folder that says its architecture; leave --arch out")
        record = read_record(path)
        architecture = record["architecture"]
        network = load_purified(path)
        shape = tuple(n for n in record["input"] or () if isinstance(n, int))
        found = Model(
            network,
            architecture["name"],
            architecture["arguments"],
            record.get("source", {}),
            shape if len(shape) == 3 else (),
        )
    else:
        weights = load_weights(path, key=options.key)
        for line in weights.notes:
            note(options, f"{path.name}: {shown(line)}")
        if options.arch is None and weights.arch is None:
            raise MisuseError(
                f"{path} does not name its architecture; give --arch NAME, timm's name for it"
            )
        network, arch, arguments = built(weights, options.arch, arguments, what=str(path))
        found = Model(network, arch, arguments, {})
    found.network.to(device)
    return found


def preprocessing_of(options: argparse.Namespace, model: Model) -> Preprocessing:
    """What is on record, else timm's, with what the options say; it is printed."""
    size = options.size
    if size is not None and len(size) > 2:
        raise MisuseError("--size: expected one side, or height and width")
    overrides = {
        "size": None if size is None else (size[0], size[-1]),
        "mean": None if options.mean is None else tuple(options.mean),
        "std": None if options.std is None else tuple(options.std),
        "interpolation": options.interpolation,
        "crop_pct": options.crop_pct,
    }
    recorded = model.source.get("preprocessing")
    if recorded is not None:
        base = Preprocessing.from_dict(recorded)
        changed = {name: value for name, value in overrides.items() if value is not None}
        refuse_other_channels(changed, base.channels)
        made = Preprocessing(**{**vars(base), **changed})
    else:
        side = model.arguments.get("img_size")
        if overrides["size"] is None and (model.shape or isinstance(side, int)):
            overrides["size"] = model.shape[1:] or (side, side)
        config = getattr(model.network, "pretrained_cfg", None)
        if config is None and model.arch is not None:
            config = getattr(create(model.arch, model.arguments), "pretrained_cfg", None)
        made = Preprocessing.of(config, channels=model.channels, **overrides)
    note(options, f"preprocessing: {made}")
    return made


def classes_of(model: Model, preprocessing: Preprocessing) -> int:
    """How many classes the model has, by running it once."""
    where = next(model.network.parameters())
    blank = torch.zeros(2, preprocessing.channels, *preprocessing.size).to(where)
    try:
        with torch.no_grad():
            logits = model.network(blank)
        count = logits.shape[1]
    except Exception as error:  # whatever a network does with images it was not made for
        first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError(
            f"the model does not run on images {preprocessing.size[0]} x {preprocessing.size[1]} "
            f"({first}); give --size as it was trained with"
        ) from error
    return int(count)


def read_folder(
    options: argparse.Namespace,
    folder: Path,
    model: Model,
    preprocessing: Preprocessing,
    *,
    fixed: bool = True,
    named: bool = True,
) -> FolderImages:
    """Images of a folder, or of a data set; what was mapped and what was skipped is printed.

    Args:
        fixed: the classes are those of the model; False: it will be made for those of the folder.
        named: with --data-root, `folder` is the name of a data set.
    """
    classes = classes_of(model, preprocessing) if fixed else None
    if named and options.data_root is not None:
        return _read_dataset(options, str(folder), preprocessing, classes)
    if options.split is not None:
        raise MisuseError("--split is of a data set; give --data-root DIR too")
    if not folder.exists() and str(folder) in list_datasets():
        raise MisuseError(
            f"{folder} is a data set of torchvision's; give --data-root DIR, where it keeps it"
        )
    names = read_classes(options.classes) if options.classes is not None else None
    recorded = model.source.get("classes")
    if names is None and isinstance(recorded, list):
        names = tuple(str(name) for name in recorded) or None
    found = read_images(
        folder,
        preprocessing,
        classes=names,
        num_classes=classes,
        limit=options.images,
        seed=options.seed,
        progress=not options.quiet,
    )
    kind = f"{len(found.classes)} classes" if found.classes else "no class folders, so no labels"
    note(options, f"{folder}: {len(found.files)} of {found.found} files, {kind}")
    if found.notice:
        note(options, found.notice)
    if found.classes:
        lines = found.mapping().splitlines()
        note(options, "\n".join(lines if len(lines) <= 20 else [*lines[:20], "      ..."]))
    for line in found.skipped[:_FEW]:
        note(options, f"skipped: {line}")
    if len(found.skipped) > _FEW:
        note(options, f"skipped: {len(found.skipped) - _FEW} more")
    return found


def _read_dataset(
    options: argparse.Namespace, name: str, preprocessing: Preprocessing, classes: int | None
) -> FolderImages:
    """The data set of this name; its classes must be the model's."""
    if options.classes is not None:
        raise MisuseError("--classes names class folders; a data set of --data-root has its own")
    split = options.split or "test"
    found = read_dataset(
        name,
        options.data_root,
        preprocessing,
        split=split,
        limit=options.images,
        seed=options.seed,
        progress=not options.quiet,
    )
    if classes is not None and len(found.classes) != classes:
        raise DataError(
            f"{name} has {len(found.classes)} classes, and the model has {classes}; was it trained "
            "on this data set?"
        )
    note(options, f"{name}, {split}: {len(found.files)} of {found.found} images, {classes} classes")
    return found


def label_of(text: str, classes: tuple[str, ...], count: int) -> int:
    """A label given as a number or as the name of a class."""
    if text in classes and not (text.isdecimal() and classes.index(text) != int(text)):
        return classes.index(text)
    if text.isdecimal():
        if text in classes:
            raise MisuseError(
                f"--target {text}: class folder {text!r} is label {classes.index(text)}; rename "
                "the folders, or give --classes with names that are no numbers"
            )
        if int(text) < count:
            return int(text)
        raise MisuseError(f"--target {text}: the model has labels 0 to {count - 1}")
    raise unknown_name("class", text, map(shown, classes))
