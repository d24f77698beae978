"""How good a model is, with intervals: ACC, ASR, RA and DER.

Everything here that takes triggered images is for drills and benchmarks; no criterion or selector
may import this module (a test reads the imports).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .data import like
from .errors import DataError
from .progress import progress_bar
from .targets import Target, wanted_labels


@dataclass(frozen=True)
class Rate:
    """`hits` of `count` images, with a 95 % Wilson interval."""

    hits: int
    count: int

    @property
    def value(self) -> float:
        """The share, in [0, 1]."""
        return self.hits / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson score interval at 95 %, in [0, 1] (Wilson, 1927)."""
        z, n, p = 1.959964, self.count, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:6.1%} [{low:.1%}, {high:.1%}]"


@torch.no_grad()
def predict(
    model: nn.Module, images: Tensor, batch_size: int = 256, progress: bool = False
) -> Tensor:
    """Predicted labels (N,) of images (N, C, H, W), in eval mode; the mode comes back."""
    modes = {module: module.training for module in model.modules()}
    where = like(model)
    try:
        model.eval()
        parts = []
        with progress_bar(len(images), "predicting", progress) as bar:
            for part in images.split(batch_size):
                parts.append(model(part.to(**where)).argmax(1).cpu())
                bar.update(len(part))
    finally:
        for module, training in modes.items():
            module.training = training
    return torch.cat(parts)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, *, progress: bool = False) -> Rate:
    """ACC: clean images (N, C, H, W) that get their label (N,)."""
    right = predict(model, images, progress=progress) == labels
    return Rate(int(right.sum()), len(labels))


@dataclass(frozen=True)
class Attack:
    """What triggered images do: `asr`, share sent to the target; `ra`, share still right."""

    asr: Rate
    ra: Rate


def attack_success(
    model: nn.Module, triggered: Tensor, labels: Tensor, target: Target, *, progress: bool = False
) -> Attack:
    """ASR and RA (robust accuracy) on triggered images (N, C, H, W) with true labels (N,).

    `target` is the attacker's label or a map of labels (for example `attacks.all_to_all(classes)`,
    where every image counts). Images whose true label is their target are left out: they would
    count as success for free.

    Raises:
        DataError: no image is left, or the map has no entry for some label.
    """
    wanted = wanted_labels(labels, target)
    others = wanted != labels
    if not others.any():
        raise DataError(f"all triggered images have the target label {target}; ASR is undefined")
    predicted, truth = predict(model, triggered[others], progress=progress), labels[others]
    count = len(truth)
    return Attack(
        Rate(int((predicted == wanted[others]).sum()), count),
        Rate(int((predicted == truth).sum()), count),
    )


def defense_effectiveness(
    acc_before: float, asr_before: float, acc_after: float, asr_after: float
) -> float:
    """DER = [max(0, drop of ASR) - max(0, drop of ACC) + 1] / 2; 0.5 says nothing was gained.

    A model that was destroyed can still score above 0.5: read it beside ACC, ASR and RA.
    """
    return (max(0.0, asr_before - asr_after) - max(0.0, acc_before - acc_after) + 1) / 2
