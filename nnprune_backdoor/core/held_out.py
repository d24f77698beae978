"""Held-out clean images: what a selection of neurons costs on them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..utils.tensors import placement
from .data import CleanData
from .masks import MaskedModel, Silencing
from .predictions import at_once
from .scores import Selection
from .sites import Site


class HeldOut:
    """Held-out clean images: which of them the model still gets right under a selection.

    Args:
        model: in eval mode, frozen; it is not changed.
        clean: labelled images that the criterion did not see.
        scored: clean images that the criterion saw: no measure of accuracy, but of use to a
            selector that looks for evidence.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: tuple[Site, ...],
        clean: CleanData,
        *,
        silencing: Silencing = "zero",
        scored: CleanData | None = None,
        progress: bool = False,
    ) -> None:
        self.clean = clean.near(model)
        self.scored = None if scored is None else scored.near(model)
        self.silencing = silencing
        self.progress = progress
        self._masked = MaskedModel(model, sites, silencing=silencing)
        self._masked.masks.requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The model itself, nothing silenced."""
        return self._masked.model

    def correct(self, selection: Selection) -> Tensor:
        """Bool (N,): the images that are classified rightly while the selection is silent."""
        return self.predict(selection, self.clean.images) == self.clean.targets

    @torch.no_grad()
    def predict(self, selection: Selection, images: Tensor) -> Tensor:
        """Labels (N,) for images (N, C, H, W) while the selection is silent."""
        masked = self._masked
        masked.masks.copy_(selection.keep())
        where = placement(masked.model)
        parts = images.split(max(16, at_once(images, masked.model)))
        return torch.cat([masked(part.to(**where)).argmax(1).cpu() for part in parts])
