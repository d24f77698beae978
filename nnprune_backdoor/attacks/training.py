"""Poison a set of images and train a classifier on it, for drills and benchmarks."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import DataError
from .base import Trigger

_M = TypeVar("_M", bound=nn.Module)


def poison(
    pixels: Tensor, labels: Tensor, trigger: Trigger, *, target: int, rate: float, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Stamp a random share of the images and relabel them (all-to-one, dirty label).

    Args:
        pixels: (N, C, H, W) in [0, 1].
        labels: (N,) integers.
        target: the attacker's label.
        rate: share of all N images that is poisoned; they come from the other classes.

    Returns:
        new pixels (N, C, H, W), new labels (N,), indices of the poisoned images (K,).
    """
    if not 0 <= rate <= 1:
        raise DataError(f"expected a poison rate in [0, 1], got {rate}")
    generator = torch.Generator().manual_seed(seed)
    candidates = (labels != target).nonzero().flatten()
    order = torch.randperm(len(candidates), generator=generator)
    chosen = candidates[order[: round(rate * len(labels))]]
    poisoned, relabelled = pixels.clone(), labels.clone()
    if len(chosen):
        poisoned[chosen] = trigger(pixels[chosen])
        relabelled[chosen] = target
    return poisoned, relabelled, chosen


def train_classifier(
    model: _M,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    lr: float = 0.1,
    weight_decay: float = 5e-4,
    batch_size: int = 128,
    optimizer: str = "sgd",
    mirror: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> _M:
    """Train `model` in place (and return it) with one-cycle SGD or AdamW.

    Args:
        images: (N, C, H, W), normalised as the model expects.
        labels: (N,) integers.
        lr: the highest learning rate; it rises over the first 30 % of the steps and decays to 0.
        optimizer: "sgd" (momentum 0.9, Nesterov) or "adamw".
        mirror: flip each image left to right at random, stamped ones too.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    if optimizer == "sgd":
        optimiser: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay
        )
    else:
        optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    steps = len(images) // batch_size  # a short last batch is dropped
    if steps == 0:
        raise DataError(f"expected at least {batch_size} images for one batch, got {len(images)}")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=epochs * steps)
    model.train()
    bar = tqdm(total=epochs * steps, desc="training", disable=None if progress else True)
    with bar, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout and drop-path draw from the global generator
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator)
            for step in range(steps):
                chosen = order[step * batch_size : (step + 1) * batch_size]
                batch = images[chosen]
                if mirror:
                    flipped = torch.rand(batch_size, generator=generator) < 0.5
                    batch = torch.where(flipped[:, None, None, None], batch.flip(-1), batch)
                loss = F.cross_entropy(model(batch.to(device)), labels[chosen].to(device))
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()
                bar.update()
                if step % 10 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()
