"""How image files become what a model expects: timm's transform for evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from ..errors import DataError

if TYPE_CHECKING:
    from PIL import Image


_LARGEST = 4096  # pixels a side


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize, crop the centre, scale to [0, 1], then (x - mean) / std; all a channel.

    Raises:
        DataError: a value that no model can have been trained with.
    """

    size: tuple[int, int]  # height, width in pixels
    mean: tuple[float, ...]  # one a channel, of pixels in [0, 1]
    std: tuple[float, ...]
    interpolation: str = "bilinear"  # or bicubic, nearest
    crop_pct: float = 1.0  # the part of the resized image that the crop keeps, in (0, 1]
    crop_mode: str = "center"  # timm's: center, squash or border

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise DataError(
                "expected mean and std with 1 or 3 values, one a channel of the model, got "
                f"{self.mean} and {self.std}"
            )
        numbers = (*self.mean, *self.std)
        if not all(map(math.isfinite, numbers)) or min(self.std) <= 0:
            raise DataError(f"expected finite mean and std > 0, got {self.mean} and {self.std}")
        if len(self.size) != 2 or not all(1 <= side <= _LARGEST for side in self.size):
            raise DataError(f"expected height and width in [1, {_LARGEST}], got {self.size}")
        if not 0.1 <= self.crop_pct <= 1:
            raise DataError(f"expected crop_pct in [0.1, 1], got {self.crop_pct}")
        for name, value, known in (
            ("interpolation", self.interpolation, ("bilinear", "bicubic", "nearest")),
            ("crop_mode", self.crop_mode, ("center", "squash", "border")),
        ):
            if value not in known:
                raise DataError(f"expected {name} to be one of {', '.join(known)}, got {value!r}")

    @classmethod
    def of(cls, config: Mapping[str, Any] | None, *, channels: int = 3, **overrides: Any) -> Self:
        """What timm's configuration of a model (`model.pretrained_cfg`) says; None: what is usual.

        Args:
            channels: that the model takes; timm's configurations are of three.
            **overrides: fields of this class; None leaves what the configuration says.

        Raises:
            DataError: a value out of range; `mean` and `std` that are not one value a channel, or
                are not given where the configuration's are not.
        """
        from timm.data.config import resolve_data_config

        given = {name: value for name, value in overrides.items() if value is not None}
        refuse_other_channels(given, channels)
        usual = {"input_size": (3, 224, 224)}  # timm refuses an empty one, and fills in the rest
        found = resolve_data_config({}, pretrained_cfg=dict(config or usual))
        settings = {
            "size": tuple(found["input_size"][-2:]),
            **{name: found[name] for name in ("mean", "std", "interpolation", "crop_pct")},
            "crop_mode": found["crop_mode"],
            **given,
        }
        if settings["interpolation"] == "random":  # timm: one of two while training
            settings["interpolation"] = "bilinear"
        if any(len(settings[name]) != channels for name in ("mean", "std")):
            raise DataError(
                f"the model takes {channels} channel(s), and the configuration has mean and std "
                f"of {len(found['mean'])}; give --mean and --std as it was trained with"
            )
        return cls(**settings)

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """What `to_dict` gave; DataError where it is something else."""
        try:
            return cls(
                size=(int(data["size"][0]), int(data["size"][1])),
                mean=tuple(map(float, data["mean"])),
                std=tuple(map(float, data["std"])),
                interpolation=str(data["interpolation"]),
                crop_pct=float(data["crop_pct"]),
                crop_mode=str(data["crop_mode"]),
            )
        except (TypeError, KeyError, IndexError, ValueError, OverflowError) as error:
            raise DataError(f"the preprocessing on record cannot be read ({error})") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @property
    def channels(self) -> int:
        """Of the images: 1 (grey) or 3 (RGB)."""
        return len(self.mean)

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """From a PIL image in mode L or RGB to a normalised tensor (C, H, W)."""
        from timm.data.transforms_factory import create_transform

        made: Callable[[Image.Image], Tensor] = create_transform(
            (self.channels, *self.size),
            is_training=False,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        return made

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels (N, C, H, W) in [0, 1] -> what the model expects."""
        mean, std = self._statistics(pixels)
        return (pixels - mean) / std

    def pixels(self, images: Tensor) -> Tensor:
        """The inverse of `normalise`, kept in [0, 1]."""
        mean, std = self._statistics(images)
        return (images * std + mean).clamp(0, 1)

    def _statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(x).to(images)[:, None, None] for x in (self.mean, self.std))
        return mean, std

    def __str__(self) -> str:
        mean, std = (", ".join(f"{x:g}" for x in values) for values in (self.mean, self.std))
        height, width = self.size
        return (
            f"{self.channels} x {height} x {width}, {self.interpolation}, crop "
            f"{self.crop_pct:g} ({self.crop_mode}), mean {mean}, std {std}"
        )


def refuse_other_channels(given: Mapping[str, Any], channels: int) -> None:
    """Raise DataError where `mean` or `std` of somebody's are not one value a channel."""
    for name in ("mean", "std"):
        values = given.get(name)
        if values is not None and len(values) != channels:
            said = " ".join(f"{value:g}" for value in values)
            raise DataError(
                f"the model takes {channels} channel(s), and {name} was given as {said}; give "
                "one value a channel"
            )
