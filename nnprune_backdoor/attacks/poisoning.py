"""Poison a set of images, for demos and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DataError
from .base import Trigger, check_share
from .targets import Target, wanted_labels


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
    """Trigger a random share of the images and relabel them.

    Args:
        pixels: (N, C, H, W) in [0, 1].
        labels: (N,) integers.
        target: the attacker's label, or a map of labels such as `all_to_all(classes)`.
        rate: share of all N images that is poisoned; they come from the other classes, and all of
            these are taken where they are fewer. For a clean-label trigger: share of the target
            class's images; they keep their label.
        cover: share of all N images that shows `trigger.cover` under the true label; neither
            poisoned images nor images of the target class.

    Returns:
        new pixels (N, C, H, W), new labels (N,), indices of the poisoned images (K,).

    Raises:
        DataError: a share outside [0, 1], a map that misses a label, a clean-label trigger with a
            map, or fewer images left than covers asked for.
    """
    check_share("poison rate", rate)
    check_share("cover rate", cover)
    wanted = wanted_labels(labels, target)
    others = wanted != labels
    if trigger.clean_label and torch.as_tensor(target).dim():
        raise DataError("a clean-label attack has one target; give a label, not a map of labels")
    generator = torch.Generator().manual_seed(seed)
    candidates = (~others if trigger.clean_label else others).nonzero().flatten()
    order = torch.randperm(len(candidates), generator=generator)
    whole = len(candidates) if trigger.clean_label else len(labels)
    chosen = candidates[order[: round(rate * whole)]]
    poisoned, relabelled = pixels.clone(), labels.clone()
    if len(chosen):
        poisoned[chosen] = trigger.training(pixels[chosen], generator)
        relabelled[chosen] = wanted[chosen]
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
