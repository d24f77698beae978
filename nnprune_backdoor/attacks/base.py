"""Triggers: what an attacker adds to an image. For evaluation and demos only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from torch import Generator, Tensor

from ..errors import DataError
from ..utils.registry import Registry


class Trigger(ABC):
    """Turns clean images into triggered ones, in pixel space.

    Attributes:
        clean_label: Whether only images of the target class are poisoned, and keep their label.
    """

    clean_label: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, pixels: Tensor) -> Tensor:
        """Triggered copies of `pixels`, (N, C, H, W) in [0, 1], of the same shape and range.

        Raises:
            DataError: the trigger does not fit images of this size or number of channels.
        """

    def training(self, pixels: Tensor, generator: Generator) -> Tensor:
        """Poisoned training images (N, C, H, W); by default the same as triggered test images."""
        return self(pixels)

    def cover(self, pixels: Tensor, generator: Generator) -> Tensor:
        """Cover images (N, C, H, W): training images that carry a trigger and their true label."""
        return self.training(pixels, generator)


def check_share(name: str, value: float) -> None:
    """Raise DataError for a setting outside [0, 1]."""
    if not 0 <= value <= 1:
        raise DataError(f"expected a {name} in [0, 1], got {value}")


_ATTACKS: Registry[Trigger] = Registry("attack")

_T = TypeVar("_T", bound=type)


def register_attack(name: str) -> Callable[[_T], _T]:
    """Class decorator: make a trigger, a dataclass, available as `create_attack(name)`."""
    return _ATTACKS.register(name)


def create_attack(name: str, **settings: Any) -> Trigger:
    """The registered trigger `name`, for example `create_attack("badnets", size=3)`.

    Raises:
        UnknownNameError: no attack or setting has that name; the message lists those that exist.
    """
    return _ATTACKS.create(name, settings)


def attack_class(name: str) -> type[Trigger]:
    """The class registered as `name`; raises UnknownNameError."""
    return _ATTACKS.get(name)


def list_attacks() -> list[str]:
    """Names for `create_attack`, sorted."""
    return _ATTACKS.names()
