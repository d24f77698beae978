"""What every search for triggers starts from: images to fit and to measure on, and labels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self, SupportsIndex

from torch import nn

from ..core.data import CleanData
from ..core.passes import Passes, Task, Work
from ..core.predictions import check_labels, images_per_pass
from ..core.prepared import Prepared
from ..core.recovered import PixelRange


@dataclass(frozen=True, eq=False)
class Search:
    """A network, its images, and the labels to search.

    Attributes:
        model: A frozen copy.
        fit: Images that triggers are fitted to, without labels.
        held: Images that only measure success.
        groups: The labels, as many to a group as go through one forward pass.
        pixels: The valid range.
    """

    model: nn.Module
    fit: CleanData
    held: CleanData
    groups: list[list[int]]
    pixels: PixelRange

    @classmethod
    def of(
        cls,
        model: nn.Module,
        clean: CleanData | Iterable[Any],
        labels: Iterable[SupportsIndex] | None,
        pixels: PixelRange | None,
        *,
        held_out: float,
        batch_size: int,
        seed: int,
    ) -> Self:
        """Check and split.

        Args:
            labels: None: every class.
            pixels: None: the range seen in the images.
            held_out: share of the images that only measure success.
            batch_size: images for each label and step.

        Raises:
            DataError: images outside the range, too few to split, no such label.
            UnsupportedModelError: see `Prepared.of`.
        """
        # without labels, since splitting would look at them
        prepared = Prepared.of(model, clean, labels="ignored").moved()
        data, classes = prepared.clean, prepared.classes
        pixels = pixels or PixelRange.seen_in(data.images)
        pixels.check(data.images)
        wanted = check_labels(range(classes) if labels is None else labels, classes)
        fit, held = data.split(1 - held_out, held_out, seed=seed)
        size = labels_at_once(images_per_pass(fit.images, prepared.model), batch_size, len(fit))
        groups = [wanted[start : start + size] for start in range(0, len(wanted), size)]
        return cls(prepared.model, fit, held, groups, pixels)


def labels_at_once(at_once: int, batch_size: int, fit: int) -> int:
    """How many labels go through one pass.

    Args:
        at_once: images of a pass at most (`images_per_pass`).
        batch_size: images for each label and step.
        fit: number of images that triggers are fitted to.
    """
    return max(1, at_once // max(1, min(batch_size, fit)))


def search_passes(task: Task, fit: float, batch_size: int, steps: int, labels: int) -> Work:
    """What the steps of a search send through the network; arguments as of `labels_at_once`."""
    size = max(1, min(batch_size, round(fit)))
    together = labels_at_once(task.at_once, batch_size, round(fit))
    groups, rest = divmod(labels, together)
    full = Passes("images", size * together, steps * size * together * groups)
    return (full, Passes("images", size * max(1, rest), steps * size * rest))
