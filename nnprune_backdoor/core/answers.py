"""What two models answer to the same clean images, and to a few of them with recovered triggers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, Self

from torch import Tensor, nn

from ..utils.short_repr import ShortRepr
from .data import CleanData
from .predictions import predict

_SHOWN = 4  # images that are kept to be shown


class Stamp(Protocol):
    """A recovered trigger, of whatever kind: calling it changes images (N, C, H, W)."""

    @property
    def target(self) -> int:
        """The label that it sends images to."""

    def __call__(self, images: Tensor) -> Tensor:
        """Images with the trigger."""


@dataclass(frozen=True, eq=False, repr=False)
class Stamped(ShortRepr):
    """What two models answer to the images that are shown, with a recovered trigger.

    Attributes:
        trigger: Recovered from the first model.
        before: Labels by the first model, an image each.
        after: By the second.
    """

    trigger: Stamp
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Answers(ShortRepr):
    """Labels that two models give to the same clean images.

    Attributes:
        labels: Of the images, (N,); None where they have none.
        before: By the first model, (N,).
        after: By the second, (N,).
        shown: Which of the images are kept, numbers up to N.
        images: Those, (K, C, H, W), on the CPU.
        stamped: A recovered trigger each.
    """

    labels: Tensor | None
    before: Tensor
    after: Tensor
    shown: tuple[int, ...]
    images: Tensor
    stamped: tuple[Stamped, ...]

    @classmethod
    def of(
        cls, before: nn.Module, after: nn.Module, clean: CleanData, triggers: Iterable[Stamp]
    ) -> Self:
        """Of two models on these images, and with each trigger on a few of them."""
        triggers = tuple(triggers)
        first, second = (predict(model, clean.images) for model in (before, after))
        shown = _different(first.tolist(), {trigger.target for trigger in triggers})
        images = clean.images[shown].float().cpu()
        stamped = tuple(
            Stamped(trigger, *_labels(trigger, (before, after), images)) for trigger in triggers
        )
        return cls(clean.labels, first, second, tuple(shown), images, stamped)


def _different(labels: list[int], targets: set[int]) -> list[int]:
    """Numbers of a few images: of as many labels as can be, and no targets if others do."""
    order = sorted(range(len(labels)), key=lambda number: labels[number] in targets)
    seen = Counter[int]()
    places = []
    for number in order:
        places.append((labels[number] in targets, seen[labels[number]], number))
        seen[labels[number]] += 1
    return sorted(number for *_, number in sorted(places)[:_SHOWN])


def _labels(
    stamp: Callable[[Tensor], Tensor], models: tuple[nn.Module, nn.Module], images: Tensor
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    first, second = (tuple(predict(model, stamp(images)).tolist()) for model in models)
    return first, second
