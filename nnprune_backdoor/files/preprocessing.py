"""Prepare images for a model, with timm's transform for evaluation."""

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


_MAX_SIDE = 4096  # pixels


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize, crop the centre, scale pixels to [0, 1], then normalise: (x - mean) / std.

    Attributes:
        size: Height and width in pixels after the crop.
        mean: Mean of each channel, of pixels in [0, 1]; one or three values.
        std: Standard deviation of each channel.
        interpolation: "bilinear", "bicubic" or "nearest".
        crop_pct: Share of the resized image that the crop keeps along each side, in [0.1, 1].
        crop_mode: timm's "center", "squash" or "border".
        channel_order: "RGB" or "BGR", in which the model takes colours; mean and std are in it too.

    Raises:
        DataError: a value is out of range.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    channel_order: str = "RGB"

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise DataError(
                "expected mean and std with 1 or 3 values, one a channel of the model, got "
                f"{self.mean} and {self.std}"
            )
        numbers = (*self.mean, *self.std)
        if not all(map(math.isfinite, numbers)) or min(self.std) <= 0:
            raise DataError(f"expected finite mean and std > 0, got {self.mean} and {self.std}")
        if len(self.size) != 2 or not all(1 <= side <= _MAX_SIDE for side in self.size):
            raise DataError(f"expected height and width in [1, {_MAX_SIDE}], got {self.size}")
        if not 0.1 <= self.crop_pct <= 1:
            raise DataError(f"expected crop_pct in [0.1, 1], got {self.crop_pct}")
        for name, value, known in (
            ("interpolation", self.interpolation, ("bilinear", "bicubic", "nearest")),
            ("crop_mode", self.crop_mode, ("center", "squash", "border")),
            ("channel_order", self.channel_order, ("RGB", "BGR")),
        ):
            if value not in known:
                raise DataError(f"expected {name} to be one of {', '.join(known)}, got {value!r}")

    @classmethod
    def of(cls, config: Mapping[str, Any] | None, *, channels: int = 3, **overrides: Any) -> Self:
        """The preprocessing in a model's timm configuration (`model.pretrained_cfg`).

        Args:
            config: None for timm's defaults.
            channels: channels of the images that the model takes.
            **overrides: fields of this class that replace the configuration's, unless None.

        Raises:
            DataError: a value is out of range, or `mean` and `std` do not have one value a channel.
        """
        from timm.data.config import resolve_data_config

        given = {name: value for name, value in overrides.items() if value is not None}
        refuse_other_channels(given, channels)
        defaults = {"input_size": (3, 224, 224)}  # timm adds the rest, but refuses an empty one
        resolved = resolve_data_config({}, pretrained_cfg=dict(config or defaults))
        names = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
        settings = {
            "size": tuple(resolved["input_size"][-2:]),
            **{name: resolved[name] for name in names},
            **given,
        }
        if settings["interpolation"] == "random":  # in timm, bilinear or bicubic while training
            settings["interpolation"] = "bilinear"
        if any(len(settings[name]) != channels for name in ("mean", "std")):
            raise DataError(
                f"the model takes {channels} channel(s), and the configuration has mean and std "
                f"of {len(resolved['mean'])}; give the --mean and --std it was trained with"
            )
        return cls(**settings)

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """The inverse of `to_dict`.

        Raises:
            DataError: the data has another form.
        """
        try:
            return cls(
                size=(int(data["size"][0]), int(data["size"][1])),
                mean=tuple(map(float, data["mean"])),
                std=tuple(map(float, data["std"])),
                interpolation=str(data["interpolation"]),
                crop_pct=float(data["crop_pct"]),
                crop_mode=str(data["crop_mode"]),
                channel_order=str(data.get("channel_order", "RGB")),  # older records have none
            )
        except (TypeError, KeyError, IndexError, ValueError, OverflowError) as error:
            raise DataError(
                f"the preprocessing on record cannot be read ({error}); give it yourself"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @property
    def channels(self) -> int:
        """Channels of the images: 1 (grey) or 3 (RGB)."""
        return len(self.mean)

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """A function from a PIL image in mode L or RGB to a normalised tensor (C, H, W)."""
        from timm.data.transforms_factory import create_transform
        from torchvision.transforms import Compose

        transform: Callable[[Image.Image], Tensor] = create_transform(
            (self.channels, *self.size),
            is_training=False,
            mean=self._ordered(self.mean),
            std=self._ordered(self.std),
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        return Compose([transform, self._ordered]) if self.channel_order == "BGR" else transform

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels (N, C, H, W) in [0, 1], normalised as the model expects."""
        mean, std = self._statistics(pixels)
        ordered: Tensor = self._ordered(pixels)
        return (ordered - mean) / std

    def pixels(self, images: Tensor) -> Tensor:
        """The inverse of `normalise`, clamped to [0, 1]."""
        mean, std = self._statistics(images)
        pixels: Tensor = self._ordered((images * std + mean).clamp(0, 1))
        return pixels

    def _ordered(self, values: Any) -> Any:
        """Values a channel, or images (..., C, H, W), from RGB to the model's order, or back."""
        if self.channel_order == "RGB":
            return values
        return values.flip(-3) if isinstance(values, Tensor) else values[::-1]

    def _statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(x).to(images)[:, None, None] for x in (self.mean, self.std))
        return mean, std

    def __str__(self) -> str:
        mean, std = (", ".join(f"{x:g}" for x in values) for values in (self.mean, self.std))
        height, width = self.size
        return (
            f"{self.channels} x {height} x {width}, {self.interpolation}, crop "
            f"{self.crop_pct:g} ({self.crop_mode}), mean {mean}, std {std}"
            + (", BGR" if self.channel_order == "BGR" else "")
        )


def refuse_other_channels(given: Mapping[str, Any], channels: int) -> None:
    """Raise DataError if a `mean` or `std` that was given does not have one value a channel."""
    for name in ("mean", "std"):
        values = given.get(name)
        if values is not None and len(values) != channels:
            text = " ".join(f"{value:g}" for value in values)
            raise DataError(
                f"the model takes {channels} channel(s), and {name} was given as {text}; give "
                "one value a channel"
            )
