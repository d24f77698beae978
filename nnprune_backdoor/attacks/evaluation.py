"""How good a model is, with intervals: ACC, ASR, RA and DER.

Everything here that takes triggered images is for demos and benchmarks; no criterion or selector
may import this module (a test reads the imports).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..core.predictions import predict
from ..errors import DataError
from ..utils.statistics import Rate
from .targets import Target, wanted_labels


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
