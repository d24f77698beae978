"""Poison a set of training images, for demos and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DataError
from .base import Trigger, check_share
from .targets import Target, target_labels


def poison(
    pixels: Tensor,
    labels: Tensor,
    trigger: Trigger,
    *,
    target: Target,
    rate: float,
    cover: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add a trigger to a random share of the images and change their labels to the target.

    Args:
        pixels: (N, C, H, W) in [0, 1].
        labels: (N,) integers.
        target: the attacker's label, or a map of labels such as `all_to_all(classes)`.
        rate: share of all N images to poison. They are drawn from the other classes; if those hold
            fewer images, all of them are poisoned. With a clean-label trigger, the share of the
            images of the target class, which keep their label.
        cover: share of all N images to replace by `trigger.cover`, under their true label. They
            are drawn from images of other classes that are not poisoned.
        seed: decides which images, and what the trigger draws at random.

    Returns:
        new pixels (N, C, H, W), new labels (N,), indices of the poisoned images (K,).

    Raises:
        DataError: a share is outside [0, 1], the map has no entry for some label or comes with a
            clean-label trigger, or there are fewer images left than cover images asked for.
    """
    check_share("poison rate", rate)
    check_share("cover rate", cover)
    targets = target_labels(labels, target)
    others = targets != labels
    if trigger.clean_label and torch.as_tensor(target).dim():
        raise DataError("a clean-label attack has one target; give a label, not a map of labels")
    generator = torch.Generator().manual_seed(seed)
    candidates = (~others if trigger.clean_label else others).nonzero().flatten()
    order = torch.randperm(len(candidates), generator=generator)
    base = len(candidates) if trigger.clean_label else len(labels)
    chosen = candidates[order[: round(rate * base)]]
    poisoned, relabelled = pixels.clone(), labels.clone()
    if len(chosen):
        poisoned[chosen] = trigger.training(pixels[chosen], generator)
        relabelled[chosen] = targets[chosen]
    count = round(cover * len(labels))
    if count:
        others[chosen] = False
        free = others.nonzero().flatten()
        if count > len(free):
            raise DataError(
                f"{count} cover images were asked for and {len(free)} images of other classes are "
                "left; take a lower cover or poison rate"
            )
        covers = free[torch.randperm(len(free), generator=generator)[:count]]
        poisoned[covers] = trigger.cover(pixels[covers], generator)
    return poisoned, relabelled, chosen
