"""Do magnitude and clean saliency go together, as MNP's authors see them fail to?

Li, Jiang and Yi, "Magnitude-based Neuron Pruning for Backdoor Defense", arXiv 2405.17750, 2024.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .criteria.mnp import Norm, magnitudes
from .criteria.response import loss_gradient
from .data import CleanData, like
from .errors import ScoringError
from .guard import private_copy, private_randomness, refuse_recomputing, usual_passes
from .masking import MaskedModel
from .scores import Site
from .sites import find_sites


@dataclass(frozen=True)
class LayerCorrelation:
    """How magnitude and saliency go together in one layer."""

    site: str
    channels: int
    pearson: float
    spearman: float


@dataclass(frozen=True)
class MagnitudeSaliency:
    """Correlation of magnitude with clean saliency: by layer, and the means over the layers.

    Only a number. MNP's authors detect backdoors by it, but no threshold is known to us, and
    backdoored networks alone differ by a factor of two (docs/mnp.md).
    """

    layers: tuple[LayerCorrelation, ...]
    pearson: float
    spearman: float


@usual_passes()
def magnitude_saliency_correlation(
    model: nn.Module,
    clean: CleanData | Iterable[Any],
    sites: tuple[Site, ...] | None = None,
    *,
    norm: Norm = "l1",
) -> MagnitudeSaliency:
    """How well the size of a neuron's weights tells what the clean task makes of it.

    Saliency is first order: |dL/dm| at masks of one, running statistics, of the mean clean loss.
    `model` is left as it was. Layers of fewer than 32 neurons, and such as have all magnitudes or
    all saliencies alike, are left out.

    Args:
        model: a classifier, (N, C, H, W) -> (N, classes).
        clean: a loader of labelled clean images, normalised as the model expects.
        sites: the layers to look at; by default all that `find_sites` finds.
        norm: of the weights, see `magnitudes`.

    Raises:
        DataError, UnsupportedModelError: see there.
        ScoringError: no layer is left to correlate.
    """
    with private_randomness(0):  # a loader may shuffle
        data = CleanData.collect(clean)
    own = private_copy(model)
    data.targets  # noqa: B018 - raises where there are none
    data.check_against(own)
    refuse_recomputing(own, data.images[:2].to(**like(own)))
    if sites is None:
        sites = find_sites(own, data.images[:2].to(**like(own)))
    masked = MaskedModel(own, sites)
    total = torch.zeros_like(masked.masks)
    with torch.enable_grad():
        for batch in data.batches(_BATCH, torch.Generator().manual_seed(0)):
            total += len(batch) * loss_gradient(masked, batch)
    sizes = [site.channels for site in sites]
    saliency = total.abs().cpu().double().split(sizes)
    magnitude = magnitudes(own, sites, norm).double().split(sizes)
    layers = tuple(
        LayerCorrelation(site.name, site.channels, _pearson(m, s), _pearson(_ranks(m), _ranks(s)))
        for site, m, s in zip(sites, magnitude, saliency, strict=True)
        if site.channels >= _WIDE and m.min() < m.max() and s.min() < s.max()
    )
    if not layers:
        raise ScoringError(f"no layer has {_WIDE} or more neurons that differ in size")
    pearson = sum(layer.pearson for layer in layers) / len(layers)
    spearman = sum(layer.spearman for layer in layers) / len(layers)
    return MagnitudeSaliency(layers, pearson, spearman)


def _pearson(x: Tensor, y: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Place of each in ascending order, equal values sharing the mean of theirs."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    places: Tensor = counts.cumsum(0) - (counts - 1) / 2
    return places[group].double()


_BATCH = 128  # images a pass
_WIDE = 32  # neurons from which on a correlation says something
