"""Neurons and their scores: a number a channel, low = prune first (Torch-Pruning's sign)."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import DataError, ScoringError
from ..utils.short_repr import ShortRepr
from .neuron_files import Stored, read_stored, write_stored
from .recovered import RecoveredTrigger
from .sites import Neuron, Site

_OF_SCORES = ("criterion", "details", "made_from")  # what a file has of them besides neurons

_OF_SELECTIONS = ("neurons", "reason", "details", "curve", "made_from")


@dataclass(frozen=True, eq=False, repr=False)
class ChannelScores(ShortRepr):
    """A criterion's scores of all neurons.

    Attributes:
        sites: The layers scored.
        flat: Scores (number of neurons,), float32 on the CPU, in site order, then channel order.
        criterion: The criterion's repr.
        details: Plain data about the run (steps, accuracies, stops not reached) for the report.
        triggers: Triggers that the criterion recovered and used.
        made_from: What they depend on: "weights" and "images" by their SHA-256, "criterion", "seed"
            and "compute".
    """

    sites: tuple[Site, ...]
    flat: Tensor
    criterion: str
    details: dict[str, Any] = field(default_factory=dict)
    triggers: tuple[RecoveredTrigger, ...] = ()
    made_from: dict[str, str] = field(default_factory=dict)

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
        """Write a `.safetensors` file, whole or not at all; raises OutputError."""
        header = {name: getattr(self, name) for name in _OF_SCORES}
        stored = Stored(header, self.sites, self.triggers, {"scores": self.flat})
        write_stored(path, "scores", stored)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ChannelScores:
        """Read what `save` wrote; no pickle is involved.

        Raises:
            DataError: the file holds something else, or is damaged.
            OSError: there is no such file.
        """
        stored = read_stored(path, "scores", ("criterion", "details"))
        if "scores" not in stored.tensors:
            raise DataError(f"{os.fspath(path)!r} holds no scores; give a file that save() wrote")
        made_from = stored.header.get("made_from", {})  # older files have none
        return cls(
            stored.sites,
            stored.tensors["scores"],
            stored.header["criterion"],
            stored.header["details"],
            stored.triggers,
            made_from,
        )


def neurons_of(sites: tuple[Site, ...]) -> list[Neuron]:
    """Every neuron in site order, then channel order: the order of all flat tensors here."""
    return [Neuron(site.name, channel) for site in sites for channel in range(site.channels)]


class Point(NamedTuple):
    """What silencing the first neurons of a ranking did on held-out clean images.

    Attributes:
        neurons: Number of silent neurons.
        drop: Paired drop of accuracy as a share of the images; negative is a gain; NaN where the
            images have no labels.
        success: Success rate of the most successful recovered trigger, a proxy of the attack's.
        same: Share of the images that keep the label that they have with no neuron silent.
    """

    neurons: int
    drop: float
    success: float | None = None
    same: float | None = None


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
        made_from: What it depends on: that of the scores; of `purify` also the selector and what it
            was given.
    """

    sites: tuple[Site, ...]
    neurons: tuple[Neuron, ...]
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    curve: tuple[Point, ...] = ()
    triggers: tuple[RecoveredTrigger, ...] = ()
    made_from: dict[str, str] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `.safetensors` file, whole or not at all; raises OutputError."""
        header = {name: getattr(self, name) for name in _OF_SELECTIONS}
        write_stored(path, "selection", Stored(header, self.sites, self.triggers, {}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Selection:
        """Read what `save` wrote; no pickle is involved.

        Raises:
            DataError: the file holds something else, or is damaged.
            OSError: there is no such file.
        """
        stored = read_stored(path, "selection", _OF_SELECTIONS)
        header = stored.header
        try:
            neurons = tuple(Neuron(str(site), int(channel)) for site, channel in header["neurons"])
            curve = tuple(Point(*point) for point in header["curve"])
        except (TypeError, ValueError) as error:
            raise DataError(f"{os.fspath(path)!r} is damaged ({error}); delete it") from error
        reason, details, made_from = header["reason"], header["details"], header["made_from"]
        return cls(stored.sites, neurons, reason, details, curve, stored.triggers, made_from)

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
    made_from = dict(scores.made_from)
    return Selection(scores.sites, tuple(chosen), reason, details, made_from=made_from)
