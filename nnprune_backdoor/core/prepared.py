"""A private copy of the user's model and checked clean images: where every computation starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

from torch import Tensor, nn

from ..utils.tensors import placement
from .checks import check_repeatable, validate_model
from .copies import frozen_copy, refuse_recomputing
from .data import CleanData
from .sites import Site, find_sites


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model and clean images that fit each other.

    Attributes:
        model: A frozen copy in eval mode.
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
        labels: Literal["needed", "used", "ignored"] = "used",
        repeatable: bool = True,
        gradients: bool = True,
    ) -> Self:
        """Copy the model, read the images, and check that they fit.

        Args:
            model: (N, C, H, W) -> (N, classes); it is left as it was.
            clean: a loader of clean images, normalised as the model expects.
            labels: needed: refuse images without; used: check them where there are any; ignored:
                leave them out.
            repeatable: refuse a model whose logits for an image depend on chance or on the batch.
            gradients: refuse a model that computes parts again in its backward pass.

        Raises:
            DataError: see `CleanData.collect` and `validate_model`.
            UnsupportedModelError: see `frozen_copy`, `validate_model`, `check_repeatable` and
                `refuse_recomputing`.
        """
        data = CleanData.collect(clean)
        if labels == "ignored":
            data = CleanData(data.images)
        elif labels == "needed":
            data.targets  # noqa: B018 - raises where there are none
        frozen = frozen_copy(model)
        prepared = cls(frozen, data, validate_model(frozen, data))
        if repeatable:
            check_repeatable(frozen, data.images)
        if gradients:
            refuse_recomputing(frozen, prepared.probe)
        return prepared

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
