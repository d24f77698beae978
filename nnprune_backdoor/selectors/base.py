"""What every selector promises, and the registry through which it is found by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from torch import nn

from ..core.held_out import HeldOut
from ..core.passes import Task, Work
from ..core.scores import ChannelScores, Selection
from ..utils.registry import Registry


class Selector(ABC):
    """Decides how much of a ranking goes. Concrete ones are frozen dataclasses."""

    needs_labels: ClassVar[bool] = False  # True: refuses clean images without labels
    recovers_triggers: ClassVar[bool] = False  # True: the selection carries what inversion found

    @abstractmethod
    def __call__(self, scores: ChannelScores, held_out: HeldOut | None = None) -> Selection:
        """The neurons that go; `held_out` is needed by selectors that measure accuracy."""

    def passes(self, task: Task) -> Work | None:
        """What selecting sends through the network; None where that is not known beforehand."""
        return None

    def review(self, selection: Selection, repaired: nn.Module, held_out: HeldOut) -> Selection:
        """The same neurons; a selector that sought evidence says what a repair left of it."""
        return selection


_SELECTORS: Registry[Selector] = Registry("selector")

_S = TypeVar("_S", bound=type)


def register_selector(name: str) -> Callable[[_S], _S]:
    """Class decorator: make a selector available by name."""
    return _SELECTORS.register(name)


def create_selector(name: str, **settings: Any) -> Selector:
    """The registered selector `name`, for example `create_selector("count", count=24)`.

    Raises:
        UnknownNameError: no such selector or setting; the message names close ones.
        DataError: a setting without a default is missing.
    """
    return _SELECTORS.create(name, settings)


def selector_class(name: str) -> type[Selector]:
    """The class registered as `name`; raises UnknownNameError."""
    return _SELECTORS.get(name)


def list_selectors() -> list[str]:
    """Names for `create_selector`, sorted."""
    return _SELECTORS.names()
