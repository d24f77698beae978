"""Neurons and their scores: a number a channel, low = prune first (Torch-Pruning's sign)."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import DataError, ScoringError
from ..utils.short_repr import ShortRepr
from .recovered import RecoveredTrigger
from .sites import Neuron, Site


@dataclass(frozen=True, eq=False, repr=False)
class ChannelScores(ShortRepr):
    """A criterion's scores of all neurons.

    Attributes:
        sites: The layers scored.
        flat: Scores (number of neurons,), float32 on the CPU, in site order, then channel order.
        criterion: The criterion's repr.
        details: Plain data about the run (steps, accuracies, stops not reached) for the report.
        triggers: Triggers that the criterion recovered and used.
    """

    sites: tuple[Site, ...]
    flat: Tensor
    criterion: str
    details: dict[str, Any] = field(default_factory=dict)
    triggers: tuple[RecoveredTrigger, ...] = ()

    def __post_init__(self) -> None:
        total = sum(site.channels for site in self.sites)
        if self.flat.shape != (total,):
            raise ScoringError(f"expected {total} scores, got shape {tuple(self.flat.shape)}")
        if not torch.isfinite(self.flat).all():
            raise ScoringError(f"{self.criterion} gave scores that are NaN or inf")

    def __getitem__(self, site: str) -> Tensor:
        """Scores (C,) of one site."""
        return self.by_site()[site]

    def by_site(self) -> dict[str, Tensor]:
        """Site name -> scores (C,), in site order."""
        pieces = self.flat.split([site.channels for site in self.sites])
        return {site.name: piece for site, piece in zip(self.sites, pieces, strict=True)}

    @property
    def ranks_only(self) -> bool:
        """Whether the scores have an order and no scale on which a threshold would mean anything.

        A criterion says so in `details["ranks_only"]`.
        """
        return bool(self.details.get("ranks_only", False))

    def order(self) -> Tensor:
        """Indices into `flat`, lowest score first; ties keep site order, then channel order."""
        return self.flat.argsort(stable=True)

    def ranking(self) -> list[Neuron]:
        """All neurons, the first to prune first."""
        neurons = neurons_of(self.sites)
        return [neurons[index] for index in self.order().tolist()]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `.safetensors` file: the numbers, and sites and details as JSON in its header."""
        plain = ("target", "success", "tested", "steps")
        header = {
            "sites": [asdict(site) for site in self.sites],
            "criterion": self.criterion,
            "details": self.details,
            "triggers": [{name: getattr(t, name) for name in plain} for t in self.triggers],
        }
        tensors = {"scores": self.flat.contiguous()}
        for i, trigger in enumerate(self.triggers):
            tensors[f"mask{i}"] = trigger.mask.contiguous()
            tensors[f"pattern{i}"] = trigger.pattern.contiguous()
        save_file(tensors, os.fspath(path), {"scores": json.dumps(header)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ChannelScores:
        """Read what `save` wrote. No pickle is involved."""
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if "scores" not in metadata:
                raise DataError(f"{os.fspath(path)!r} holds no channel scores")
            header = json.loads(metadata["scores"])
            sites = tuple(Site(**site) for site in header["sites"])
            triggers = tuple(
                RecoveredTrigger(
                    mask=file.get_tensor(f"mask{i}"),
                    pattern=file.get_tensor(f"pattern{i}"),
                    **plain,
                )
                for i, plain in enumerate(header.get("triggers", []))
            )
            flat = file.get_tensor("scores")
            return cls(sites, flat, header["criterion"], header["details"], triggers)


def neurons_of(sites: tuple[Site, ...]) -> list[Neuron]:
    """Every neuron in site order, then channel order: the order of all flat tensors here."""
    return [Neuron(site.name, channel) for site in sites for channel in range(site.channels)]


class Point(NamedTuple):
    """What silencing the first neurons of a ranking did on held-out clean images.

    Attributes:
        neurons: Number of silent neurons.
        drop: Paired drop of accuracy as a share of the images; negative is a gain.
        success: Success rate of the most successful recovered trigger, a proxy of the attack's.
    """

    neurons: int
    drop: float
    success: float | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Selection(ShortRepr):
    """The neurons to prune, first to go first, and why these.

    Attributes:
        sites: The layers scored.
        neurons: The neurons to prune.
        reason: How the amount was decided, for people.
        details: Plain data about the decision, for the report.
        curve: The amounts that were tried, if any.
        triggers: The recovered triggers that decided, if any.
    """

    sites: tuple[Site, ...]
    neurons: tuple[Neuron, ...]
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    curve: tuple[Point, ...] = ()
    triggers: tuple[RecoveredTrigger, ...] = ()

    def __len__(self) -> int:
        return len(self.neurons)

    def keep(self) -> Tensor:
        """Float mask (number of neurons,) in flat order: 0 where a neuron goes, else 1."""
        index = {neuron: i for i, neuron in enumerate(neurons_of(self.sites))}
        mask = torch.ones(len(index))
        mask[[index[neuron] for neuron in self.neurons]] = 0
        return mask

    def by_site(self) -> dict[str, list[int]]:
        """Site name -> its channels that go, ascending; sites that lose none are absent."""
        found: dict[str, list[int]] = {}
        for site, channel in self.neurons:
            found.setdefault(site, []).append(channel)
        return {site.name: sorted(found[site.name]) for site in self.sites if site.name in found}


def lowest(scores: ChannelScores, count: int, reason: str = "", **details: Any) -> Selection:
    """The first `count` neurons of the ranking; a neuron that is its site's last one is skipped."""
    neurons = neurons_of(scores.sites)
    left = {site.name: site.channels for site in scores.sites}
    chosen: list[Neuron] = []
    for index in scores.order().tolist():
        if len(chosen) >= count:
            break
        neuron = neurons[index]
        if left[neuron.site] > 1:
            left[neuron.site] -= 1
            chosen.append(neuron)
    if reason and len(chosen) < count:
        reason += f"; only {len(chosen)} can go, since each layer keeps one"
    return Selection(scores.sites, tuple(chosen), reason, details)
