"""Triggers: what an attacker adds to an image. For evaluation and drills only.

No criterion, selector or scanner may import this package (a test reads the imports).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from ..registry import Registry


class Trigger(ABC):
    """Turns clean images into triggered ones, in pixel space."""

    @abstractmethod
    def __call__(self, pixels: Tensor) -> Tensor:
        """`pixels`: (N, C, H, W) in [0, 1]. Returns a new tensor of that shape and range."""


_ATTACKS: Registry[Trigger] = Registry("attack")
_T = TypeVar("_T", bound=type)


def register_attack(name: str) -> Callable[[_T], _T]:
    """Class decorator: make a trigger available as `create_attack(name)`."""
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
