"""Held-out clean images: what a selection of neurons costs on them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .data import CleanData
from .masks import MaskedModel, Silencing
from .predictions import predict_labels
from .scores import Selection
from .sites import Site


class HeldOut:
    """Held-out clean images: which of them the model classifies correctly under a selection.

    Args:
        model: in eval mode, frozen; it is not changed.
        clean: labelled images that the criterion did not see.
        scored: clean images that the criterion has used; a selector may look for evidence in
            them, but must not measure accuracy on them.
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
        self.clean = clean.moved_to(model)
        self.scored = None if scored is None else scored.moved_to(model)
        self.silencing = silencing
        self.progress = progress
        self._masked = MaskedModel(model, sites, silencing=silencing)
        self._masked.masks.requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The model itself, nothing silenced."""
        return self._masked.model

    def correct(self, selection: Selection) -> Tensor:
        """Bool (N,): whether each image is classified correctly while the selection is silent."""
        return self.predict(selection, self.clean.images) == self.clean.targets

    @torch.no_grad()
    def predict(self, selection: Selection, images: Tensor) -> Tensor:
        """Labels (N,) for images (N, C, H, W) while the selection is silent."""
        masked = self._masked
        masked.masks.copy_(selection.keep())
        return predict_labels(masked.model, images, run=masked)
