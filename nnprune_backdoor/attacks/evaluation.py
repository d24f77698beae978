"""ACC, ASR and RA of a model, with intervals, and DER of a defence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..core.predictions import predict
from ..errors import DataError
from ..utils.statistics import Rate
from .targets import Target, target_labels


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, *, progress: bool = False) -> Rate:
    """ACC: the share of clean images (N, C, H, W) that get their label (N,)."""
    correct = predict(model, images, progress=progress) == labels
    return Rate(int(correct.sum()), len(labels))


@dataclass(frozen=True)
class Attack:
    """Predictions on triggered images.

    Attributes:
        asr: Attack success rate, the share classified as the target.
        ra: Robust accuracy, the share still classified correctly.
    """

    asr: Rate
    ra: Rate


def attack_success(
    model: nn.Module, triggered: Tensor, labels: Tensor, target: Target, *, progress: bool = False
) -> Attack:
    """ASR and RA on triggered images (N, C, H, W) with true labels (N,).

    Images whose true label is their target are left out: a model without a backdoor sends them to
    the target too.

    Args:
        target: the attacker's label, or a map of labels such as `all_to_all(classes)`.

    Raises:
        DataError: no image is left, or the map has no entry for some label.
    """
    targets = target_labels(labels, target)
    others = targets != labels
    if not others.any():
        raise DataError(
            f"all triggered images have the target label {target}; ASR is undefined without "
            "images of other classes"
        )
    predicted, truth = predict(model, triggered[others], progress=progress), labels[others]
    count = len(truth)
    return Attack(
        Rate(int((predicted == targets[others]).sum()), count),
        Rate(int((predicted == truth).sum()), count),
    )


def defense_effectiveness(
    acc_before: float, asr_before: float, acc_after: float, asr_after: float
) -> float:
    """DER = [max(0, drop of ASR) - max(0, drop of ACC) + 1] / 2; 0.5 where nothing changed.

    All rates are in [0, 1]. DER can exceed 0.5 for a model that no longer classifies at all, so
    read it together with ACC and RA.
    """
    return (max(0.0, asr_before - asr_after) - max(0.0, acc_before - acc_after) + 1) / 2
