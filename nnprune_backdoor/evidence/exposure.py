"""The exposed model: clean function unlearned by gradient ascent, so that the backdoor shows.

Li et al., "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023, call the first half of
RNP unlearning and propose its model for finding the target and poisoned samples as well; MNP calls
it clean suppression. SGD with weight decay wd on -L is ascent on L - mu ||theta||^2 with
mu = wd / 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.data import CleanData
from ..core.predictions import predict_labels
from ..core.prepared import Prepared
from ..criteria.parts.unlearning import Look, Unlearning, label_shares
from ..utils.randomness import checked_seed, private_randomness
from ..utils.short_repr import ShortRepr

UNLEARNING = Unlearning(missed="flag", stop=None)  # RNP's way with our defaults


@dataclass(frozen=True, eq=False, repr=False)
class Exposed(ShortRepr):
    """A model that has forgotten the clean task, and how it got there.

    Attributes:
        model: In eval mode, without gradients.
        trajectory: What the model did in each epoch, with the BatchNorm statistics used while
            unlearning.
        predicted: Share of the clean images that each label gets in the end, (classes,).
        reached: Whether accuracy fell to the stop.
    """

    model: nn.Module
    trajectory: tuple[Look, ...]
    predicted: tuple[float, ...]
    reached: bool

    @property
    def label(self) -> int:
        """The label that most clean images get in the end."""
        return max(range(len(self.predicted)), key=self.predicted.__getitem__)


def expose(
    model: nn.Module,
    clean: CleanData | Iterable[Any],
    unlearning: Unlearning | None = None,
    *,
    seed: int = 0,
    progress: bool = False,
) -> Exposed:
    """Unlearn what the model says of clean images until little of it is left.

    The labels unlearned are the model's own, so the images need none. What remains is what those
    images did not need, a backdoor among it. Networks without BatchNorm take smaller steps, and
    those that a batch's statistics confuse are unlearned with their own (`Unlearning.fitting`).

    Args:
        model: a classifier, (N, C, H, W) -> (N, classes); it is left as it was.
        clean: clean images, normalised as the model expects.
        unlearning: how; by default RNP's way with our defaults.

    Raises:
        DataError, UnsupportedModelError: see `Prepared.of`.
        ScoringError: it diverged.
    """
    settings = unlearning or UNLEARNING
    seed = checked_seed(seed)
    with private_randomness(seed), torch.enable_grad():
        prepared = Prepared.of(model, clean, labels="ignored").moved()
        prepared.check_runs(gradients=False)
        frozen, images = prepared.model, prepared.clean.images
        named = CleanData(images, predict_labels(frozen, images))
        generator, looks = torch.Generator().manual_seed(seed), list[Look]()
        fitting = settings.careful(frozen).fitting(frozen, named)
        exposed, details = fitting.unlearn(frozen, named, generator, progress, looks)
        predicted = label_shares([predict_labels(exposed, images)], prepared.classes)
    return Exposed(exposed, tuple(looks), predicted, details["unlearn_stop_reached"])
