"""Models and images that the options ask for. The options themselves are in `options`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.outputs import logits_alone
from ..errors import DataError, unknown_name
from ..files.architecture import built, load_model
from ..files.checkpoint import load_weights
from ..files.datasets import list_datasets, read_dataset
from ..files.image_processor import read_processor
from ..files.images import FolderImages, read_classes, read_images, shown
from ..files.preprocessing import Preprocessing
from ..files.record_file import purified_folder, read_record
from ..files.remote import refuse_address
from ..files.saving import load_purified
from ..files.transformers_models import CONFIG, HF, PROCESSOR, config_of
from ..removal.recipe import Recipe
from .base import MisuseError, note
from .name_value import read_plain

_NAMED = 5  # skipped files that a note names
_LISTED = 20  # lines of classes that a note shows


@dataclass(frozen=True)
class Model:
    """A network and what is known of it.

    Attributes:
        arch: Its name, as for `load_model`.
        arguments: What it was made with; of transformers "config" and "processor".
        source: What a purified model's record says of preprocessing and classes; else empty.
        shape: Of an image, (C, H, W), from a purified model's record; else empty.
        earlier: What was cut out of it when it was purified before; None if it was not.
        mapping: Which tensors of the file were taken (see `Weights`).
    """

    network: nn.Module
    arch: str | None
    arguments: dict[str, Any]
    source: dict[str, Any]
    shape: tuple[int, ...] = ()
    earlier: Recipe | None = None
    mapping: dict[str, Any] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        """Number of channels of the images that it takes."""
        known = self.shape[0] if self.shape else self.config.get("num_channels", 3)
        given = self.arguments.get("in_chans", known)
        return given if isinstance(given, int) else 3

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json; empty where it is no model of transformers."""
        return self.arguments.get("config") or {}


def device_of(options: argparse.Namespace) -> torch.device:
    """The device asked for; MisuseError where it does not work."""
    try:
        device = torch.device(options.device)
        torch.zeros(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0][:150]
        raise MisuseError(
            f"--device {options.device}: not usable here ({first}); try cpu"
        ) from error
    return device


def load(options: argparse.Namespace, path: Path) -> Model:
    """A checkpoint, a folder of transformers, or what `purify` wrote, on the device asked for."""
    refuse_address(path)
    device = device_of(options)
    folder = purified_folder(path)
    if options.arch == HF:
        found = _load_transformers(options, path)
    else:
        found = _load_checkpoint(options, path) if folder is None else _load_folder(options, folder)
    found.network.to(device)
    return found


def _load_transformers(options: argparse.Namespace, path: Path) -> Model:
    for name in ("arch_arg", "key", "prefix", "drop", "weights"):
        if getattr(options, name):
            raise MisuseError(
                f"{path}: with --arch {HF}, {CONFIG} says all; leave out --{name.replace('_', '-')}"
            )
    network = load_model(path, HF)
    arguments: dict[str, Any] = {"config": config_of(network)}
    if (path / PROCESSOR).is_file():
        arguments["processor"] = read_processor(path)
    return Model(network, HF, arguments, {})


def _load_folder(options: argparse.Namespace, path: Path) -> Model:
    for name in ("arch", "arch_arg", "key", "prefix", "drop", "weights"):
        if getattr(options, name):
            raise MisuseError(
                f"{path} is a purified model, and its record says how to build it; leave out "
                f"--{name.replace('_', '-')}"
            )
    record = read_record(path)
    architecture = record["architecture"]
    shape = tuple(n for n in record["input"] or () if isinstance(n, int))
    return Model(
        load_purified(path),
        architecture["name"],
        architecture["arguments"],
        record.get("source", {}),
        shape if len(shape) == 3 else (),
        Recipe.from_dict(record["recipe"]),
    )


def _load_checkpoint(options: argparse.Namespace, path: Path) -> Model:
    arguments = read_plain(options.arch_arg)
    weights = load_weights(
        path,
        key=options.key,
        prefix=options.prefix,
        drop=options.drop,
        weights=options.weights,
    )
    _say(options, path, weights.notes)
    if options.arch is None and weights.arch is None:
        raise MisuseError(
            f"{path} does not name its architecture; give --arch NAME, timm's name for it, "
            f"or --arch {HF} if transformers wrote it"
        )
    network, arch, arguments, fitted = built(weights, options.arch, arguments, what=str(path))
    _say(options, path, fitted.notes[len(weights.notes) :])
    if arch == weights.config.get("architecture"):  # which says how images are prepared
        known = {**getattr(network, "pretrained_cfg", {}), **weights.config["pretrained_cfg"]}
        network.pretrained_cfg = known  # type: ignore[assignment]
    return Model(network, arch, arguments, {}, mapping=fitted.mapping)


def _say(options: argparse.Namespace, path: Path, notes: Iterable[str]) -> None:
    """Print what was taken from a checkpoint, whole; a name in it cannot begin a line."""
    for line in notes:
        note(options, f"{path.name}: {line}".replace("\n", "?"))


def classes_of(model: Model, preprocessing: Preprocessing) -> int:
    """Number of classes that the model has, found by running it once."""
    weight = next(model.network.parameters())
    blank = torch.zeros(2, preprocessing.channels, *preprocessing.size).to(weight)
    try:
        with torch.no_grad():
            count = logits_alone(model.network, blank)(blank).shape[1]
    except Exception as error:  # whatever a network does with images it was not made for
        first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError(
            "the model does not run on images of "
            f"{preprocessing.size[0]} x {preprocessing.size[1]} pixels ({first}); give the --size "
            "that it was trained with"
        ) from error
    return int(count)


def read_folder(
    options: argparse.Namespace,
    folder: Path,
    model: Model,
    preprocessing: Preprocessing,
    *,
    classes_of_model: bool = True,
    may_be_dataset: bool = True,
) -> FolderImages:
    """Images of a folder, or of a data set; notes say which classes and which files were read.

    Args:
        classes_of_model: the classes must be as many as the model has.
        may_be_dataset: with --data-root, `folder` is the name of a data set.
    """
    classes = classes_of(model, preprocessing) if classes_of_model else None
    if may_be_dataset and options.data_root is not None:
        return _read_dataset(options, str(folder), preprocessing, classes)
    if options.split is not None:
        raise MisuseError("--split needs a data set; give --data-root DIR too")
    if not folder.exists() and str(folder) in list_datasets():
        raise MisuseError(
            f"{folder} is a data set of torchvision; give --data-root DIR, the folder that holds it"
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
        if len(lines) > _LISTED:
            lines[_LISTED:] = ["      ..."]
        note(options, "\n".join(lines))
    for line in found.skipped[:_NAMED]:
        note(options, f"skipped: {line}")
    if len(found.skipped) > _NAMED:
        note(options, f"skipped: {len(found.skipped) - _NAMED} more")
    return found


def _read_dataset(
    options: argparse.Namespace, name: str, preprocessing: Preprocessing, classes: int | None
) -> FolderImages:
    """The data set of this name; DataError where the model has another number of classes."""
    if options.classes is not None:
        raise MisuseError(
            "--classes is for class folders, and a data set has its own; leave it out"
        )
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
            f"{name} has {len(found.classes)} classes, and the model has {classes}; give the data "
            "set that it was trained on"
        )
    note(options, f"{name}, {split}: {len(found.files)} of {found.found} images, {classes} classes")
    return found


def label_of(text: str, classes: tuple[str, ...], count: int, option: str) -> int:
    """A label given as a number or as the name of a class.

    Args:
        classes: the names by label; may be empty.
        count: how many labels there are.
        option: that `text` was given to.

    Raises:
        UnknownNameError: neither a number nor a class.
        MisuseError: a number that is no label, or that is the name of another label's class.
    """
    if text in classes and not (text.isdecimal() and classes.index(text) != int(text)):
        return classes.index(text)
    if text.isdecimal():
        if text in classes:
            raise MisuseError(
                f"{option} {text}: the class folder {text!r} is label {classes.index(text)}; "
                "rename the folders, or give --classes with names that are not numbers"
            )
        if int(text) < count:
            return int(text)
        raise MisuseError(f"{option} {text}: no such label; the model has labels 0 to {count - 1}")
    raise unknown_name("class", text, map(shown, classes))
