"""How images are prepared for the model: by its record, its library, its files and the options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import torchvision_models
from ..files.architecture import create
from ..files.datasets import size_of_dataset
from ..files.image_processor import preprocessing_of as preprocessing_of_processor
from ..files.images import size_of_files
from ..files.preprocessing import Preprocessing, refuse_other_channels
from ..files.transformers_models import CONFIG, HF, PROCESSOR
from .base import MisuseError, note
from .inputs import Model, classes_of


def preprocessing_of(
    options: argparse.Namespace, model: Model, folder: Path | None
) -> Preprocessing:
    """That of the record or folder, else the library's, as the options change it; with a note.

    Where nothing says of what size images are, they are taken as the files have it, if the model
    runs on them so.

    Args:
        folder: of images, or with --data-root the name of a data set.
    """
    overrides = _overrides(options)
    recorded, processor = model.source.get("preprocessing"), model.arguments.get("processor")
    if None not in (options.size, options.mean, options.std):
        processor = None  # it may say what cannot be done here
    if recorded is not None or processor is not None:
        base = (
            preprocessing_of_processor(processor or {})
            if recorded is None
            else Preprocessing.from_dict(recorded)
        )
        changed = {name: value for name, value in overrides.items() if value is not None}
        refuse_other_channels(changed, base.channels)
        made = Preprocessing(**{**vars(base), **changed})
    else:
        if model.arch == HF and None in (options.mean, options.std):
            raise MisuseError(
                f"no {PROCESSOR} beside {CONFIG}; give the --mean and --std that the model was "
                "trained with"
            )
        made = _of_library(model, overrides)
        if options.size is None:
            made = _of_files(options, model, made, folder, fixed=overrides["size"] is not None)
    note(options, f"preprocessing: {made}")
    return made


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    """What the options say of each field; None where they say nothing."""
    size = options.size
    if size is not None and len(size) > 2:
        raise MisuseError(
            f"--size: expected one side, or height and width, got {len(size)} numbers"
        )
    return {
        "size": None if size is None else (size[0], size[-1]),
        "mean": None if options.mean is None else tuple(options.mean),
        "std": None if options.std is None else tuple(options.std),
        "interpolation": options.interpolation,
        "crop_pct": options.crop_pct,
    }


def _of_library(model: Model, overrides: dict[str, Any]) -> Preprocessing:
    """The library's; a size that the model was built for becomes one of the overrides."""
    names = (model.arguments.get(name) for name in ("img_size", "image_size"))
    side = next((n for n in names if n is not None), model.config.get("image_size"))
    if overrides["size"] is None and (model.shape or isinstance(side, int)):
        overrides["size"] = model.shape[1:] or (side, side)
    config = getattr(model.network, "pretrained_cfg", None)
    if model.arch is not None and model.arch.startswith(torchvision_models.PREFIX):
        config = torchvision_models.config_of(model.arch)
    elif config is None and model.arch not in (None, HF):
        config = getattr(create(str(model.arch), model.arguments), "pretrained_cfg", None)
    return Preprocessing.of(config, channels=model.channels, **overrides)


def _of_files(
    options: argparse.Namespace,
    model: Model,
    usual: Preprocessing,
    folder: Path | None,
    *,
    fixed: bool,
) -> Preprocessing:
    """The same at the size of the files, uncropped, where they have one and the model takes it.

    Args:
        fixed: the model was built for one size, which stays.
    """
    found = None
    if folder is not None and options.data_root is not None:
        found = size_of_dataset(str(folder), options.data_root, options.split or "test")
    elif folder is not None:
        found = size_of_files(folder)
    if found is None or (fixed and found != usual.size):
        return usual
    files, library = (f"{height} x {width}" for height, width in (found, usual.size))
    if max(found) > max(usual.size):
        note(
            options,
            f"size: the images are {files} pixels, and are scaled down to {library}, as is usual "
            "for this architecture; if the model was trained with another size, give --size",
        )
        return usual
    changed = {"size": found, "crop_pct": 1.0 if options.crop_pct is None else options.crop_pct}
    made = Preprocessing(**{**vars(usual), **changed})
    if found == usual.size:
        return made  # already cropped, or never to be
    try:
        classes_of(model, made)
    except DataError:
        note(
            options,
            f"size: the model does not run on images of {files} pixels, as the files have; they "
            f"are scaled to {library}",
        )
        return usual
    note(
        options,
        f"size: images are taken as the files have it, {files} pixels, not scaled to {library}, "
        "which is usual for this architecture; if the model was trained with another size, give "
        "--size",
    )
    return made
