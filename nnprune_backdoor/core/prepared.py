"""A private copy of the user's model and checked clean images: where every computation starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

from torch import Tensor, nn

from ..utils.short_repr import ShortRepr
from ..utils.tensors import placement
from .checks import check_repeatable, validate_model
from .copies import frozen_copy, refuse_recomputing
from .data import CleanData
from .originals import refuse_originals
from .outputs import give_logits_alone_, take_images_by_name_
from .sites import Site, find_sites

Labels = Literal["needed", "used", "ignored"]


@dataclass(frozen=True, eq=False, repr=False)
class Prepared(ShortRepr):
    """A model and clean images that fit each other.

    Attributes:
        model: A frozen copy in eval mode, which returns its logits alone (see `core.outputs`).
        clean: The clean images; on the CPU.
        classes: Number of classes of the model.
    """

    model: nn.Module
    clean: CleanData
    classes: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        clean: CleanData | Iterable[Any],
        *,
        labels: Labels = "used",
    ) -> Self:
        """Copy the model, read the images, and check that they fit.

        Args:
            model: (N, C, H, W) -> (N, classes), or an output with these logits in it; it is left
                as it was.
            clean: a loader of clean images, normalised as the model expects.
            labels: needed: refuse images without; used: check them where there are any; ignored:
                leave them out.

        Raises:
            DataError: see `CleanData.collect` and `validate_model`.
            UnsupportedModelError: see `frozen_copy` and `validate_model`.
        """
        data = CleanData.collect(clean)
        if labels == "ignored":
            data = CleanData(data.images)
        elif labels == "needed":
            data.targets  # noqa: B018 - raises where there are none
        frozen = frozen_copy(model)
        take_images_by_name_(frozen)
        refuse_originals(model, frozen, data.images[:2].to(**placement(frozen)))
        logits = give_logits_alone_(frozen, data.images)
        return cls(frozen, data, validate_model(frozen, data, logits))

    def check_runs(self, *, gradients: bool = True) -> None:
        """Raise UnsupportedModelError where passes cannot be relied on.

        Args:
            gradients: refuse a model that computes parts again in its backward pass, too.
        """
        check_repeatable(self.model, self.clean.images)
        if gradients:
            refuse_recomputing(self.model, self.probe)

    @property
    def probe(self) -> Tensor:
        """Two of the images, as the model takes them."""
        return self.clean.images[:2].to(**placement(self.model))

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The layers whose neurons are scored; UnsupportedModelError where there are none."""
        return find_sites(self.model, self.probe)

    def moved(self) -> Self:
        """With the images on the model's device, where they fit (`CleanData.moved_to`)."""
        return replace(self, clean=self.clean.moved_to(self.model))
