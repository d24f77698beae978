"""preprocessor_config.json of `transformers`, as a `Preprocessing`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import DataError
from .preprocessing import Preprocessing
from .strict_json import read_json
from .transformers_models import PROCESSOR, check_installed

# what is read; "size" and others have defaults in the class of the processor
_READ = (
    *("image_processor_type", "feature_extractor_type", "do_resize", "size", "resample"),
    *("do_center_crop", "crop_size", "crop_pct", "do_rescale", "rescale_factor", "rescale_offset"),
    *("do_normalize", "image_mean", "image_std", "do_flip_channel_order", "do_pad"),
    "include_top",  # EfficientNet's: divides by the deviation once more
)

_INTERPOLATION = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers

_SQUASHED_FROM = 384  # pixels; ConvNeXt's processor does not crop larger images

_ALIKE = 0.03  # of the range of pixels: they round at other steps

_ADVICE = "give --size, --mean and --std (Preprocessing) yourself"


def read_processor(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in preprocessor_config.json that say how images are prepared.

    Raises:
        CheckpointError: there is no such file, or no JSON in it.
    """
    content = read_json(Path(folder) / PROCESSOR, "a folder with one, or --size, --mean and --std")
    return {name: content[name] for name in _READ if name in content}


def read_preprocessing(folder: str | os.PathLike[str]) -> Preprocessing:
    """How a folder of `transformers` says that images are prepared.

    Raises:
        CheckpointError: there is no preprocessor_config.json, or no JSON in it.
        DataError: it says something that `Preprocessing` cannot do.
    """
    return preprocessing_of(read_processor(folder))


def preprocessing_of(processor: Mapping[str, Any]) -> Preprocessing:
    """The same of settings that were read; raises DataError."""
    made = _made(processor)
    full: dict[str, Any] = {name: getattr(made, name, None) for name in _READ[2:]}
    if not full["do_resize"] or full["rescale_offset"] or full["do_pad"]:
        raise DataError(
            f"{PROCESSOR} does not resize, or pads, or shifts pixels: not supported; {_ADVICE}"
        )
    try:
        size, crop_pct, mode = _geometry(full)
        mean, std = _statistics(full)
        preprocessing = Preprocessing(
            size=size,
            mean=mean,
            std=std,
            interpolation=_INTERPOLATION[int(full["resample"])],
            crop_pct=crop_pct,
            crop_mode=mode,
            channel_order="BGR" if full["do_flip_channel_order"] else "RGB",
        )
    except (TypeError, KeyError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{PROCESSOR} cannot be read ({error!r}); {_ADVICE}") from error
    _compare(made, preprocessing)
    return preprocessing


def _compare(made: Any, preprocessing: Preprocessing) -> None:
    """Raise DataError unless both prepare an image alike; a processor may do more than it says."""
    height, width = (side + side // 4 for side in preprocessing.size)
    grey = np.add.outer(np.linspace(0, 128, height), np.linspace(0, 127, width))
    image = Image.fromarray(np.stack([grey, 255 - grey, grey / 2], 2).astype(np.uint8))
    ours = preprocessing.transform()(image)
    try:
        theirs = made(image, return_tensors="pt")["pixel_values"][0]
        gap = ((ours - theirs) * torch.tensor(preprocessing.std)[:, None, None]).abs().max().item()
    except Exception as error:  # other shapes, or settings that it only now looks at
        raise DataError(f"{PROCESSOR} cannot be used ({error}); {_ADVICE}") from error
    if not gap <= _ALIKE:
        raise DataError(
            f"{PROCESSOR}: {type(made).__name__} does more than is understood here (pixels differ "
            f"by {gap:.2g} of the range); {_ADVICE}"
        )


def _made(processor: Mapping[str, Any]) -> Any:
    """A processor of transformers' own with these settings, and its defaults."""
    check_installed()
    from transformers.models.auto import image_processing_auto

    given = processor.get("image_processor_type") or processor.get("feature_extractor_type")
    name = str(given).removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    kind = image_processing_auto.get_image_processor_class_from_name(name)
    if kind is None:
        raise DataError(
            f"{PROCESSOR}: transformers has no image processor {str(given)[:100]!r}; {_ADVICE}"
        )
    try:
        return kind.from_dict({name: processor[name] for name in _READ[2:] if name in processor})
    except Exception as error:  # settings may be untrusted
        raise DataError(f"{PROCESSOR} cannot be used ({error}); {_ADVICE}") from error


def _geometry(full: Mapping[str, Any]) -> tuple[tuple[int, int], float, str]:
    """Height and width, share that a crop keeps, and timm's crop mode."""
    size, crop = full["size"], full["crop_size"] if full["do_center_crop"] else None
    edge, share = _side(size, "shortest_edge"), full["crop_pct"]
    height, width = (_side(size, side) for side in ("height", "width"))
    if edge and share and (crop or edge < _SQUASHED_FROM):
        side = _side(crop, "height") or edge
        return (side, side), float(share), "center"
    if edge and share:
        return (edge, edge), 1.0, "squash"
    if crop:
        sides = _side(crop, "height"), _side(crop, "width")
        if height == width and (edge or height) and sides[0] == sides[1]:
            resized = edge or height
            if sides[0] <= resized:
                return sides, _share(sides[0], resized), "center" if edge else "squash"
    elif height and width:
        return (height, width), 1.0, "squash"
    raise DataError(f"{PROCESSOR}: size {size} with crop {crop} is not supported; {_ADVICE}")


def _side(size: Any, name: str) -> int:
    """A side in pixels; 0 if there is none."""
    value = size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)
    return int(value or 0)


def _share(cropped: int, resized: int) -> float:
    """With it timm, which rounds down, resizes to just this many pixels."""
    share = cropped / resized
    return share if math.floor(cropped / share) == resized else cropped / (resized + 1e-3)


def _statistics(full: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of pixels in [0, 1]."""
    mean, std = [0.0] * 3, [1.0] * 3
    if full["do_normalize"]:
        mean, std = ([float(value) for value in full[name]] for name in ("image_mean", "image_std"))
    if full["do_normalize"] and full["include_top"]:
        std = [value**2 for value in std]
    unit = 255 * float(full["rescale_factor"]) if full["do_rescale"] else 255.0
    return tuple(value / unit for value in mean), tuple(value / unit for value in std)
