"""Scores as ranks over the whole model, which never tie."""

from __future__ import annotations

import torch

from ..core.scores import ChannelScores

_JITTER = 1e-3  # of a rank, to break ties of averages


def ranks_by_site(scores: ChannelScores) -> list[list[float]]:
    """For each site the ranks (C,) of its neurons, 0 = prune first.

    Equal scores are ranked by the relative position of the channel in its site. If they were ranked
    by the order of the sites, a global pruner would ask for whole layers, which Torch-Pruning
    silently leaves unpruned.

    A random fraction of a rank is added, since averages of whole numbers may tie: Torch-Pruning
    averages over channel groups (grouped convolutions, heads), and "mean" averages over sites.
    """
    sizes = [site.channels for site in scores.sites]
    position = torch.cat([(torch.arange(size) + 0.5) / size for size in sizes])
    by_position = position.argsort(stable=True)
    order = by_position[scores.flat[by_position].argsort(stable=True)]
    ranks = torch.empty(len(order), dtype=torch.float64)
    ranks[order] = torch.arange(len(order), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    ranks += _JITTER * torch.rand(len(ranks), dtype=torch.float64, generator=generator)
    return [piece.tolist() for piece in ranks.split(sizes)]
