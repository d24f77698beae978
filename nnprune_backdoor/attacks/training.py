"""Train a classifier, for demos and benchmarks."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import DataError

_M = TypeVar("_M", bound=nn.Module)


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
    crop: int = 0,
    seed: int = 0,
    progress: bool = False,
) -> _M:
    """Train `model` in place (and return it) with one-cycle SGD or AdamW.

    Args:
        images: (N, C, H, W), normalised as the model expects.
        labels: (N,) integers.
        epochs: 8 at batch 128 embed a backdoor; train until the accuracy stops rising, some 30 or
            more with `mirror` and `crop`, for a network as users have it.
        lr: the highest learning rate; it rises over the first 30 % of the steps and decays to 0.
            0.1 suits SGD on convolutional networks, 1e-3 AdamW on transformers and ConvNeXt.
        optimizer: "sgd" (momentum 0.9, Nesterov) or "adamw" (weight decay 0.05 is usual there).
        mirror: flip each image left to right at random, stamped ones too.
        crop: move each image by up to that many pixels at random; zeros come in. Stamped ones
            too, so a patch at the edge is at times cut off.

    Raises:
        DataError: fewer images than a batch, or settings that mean nothing.
    """
    if optimizer not in ("sgd", "adamw"):
        raise DataError(f"expected the optimizer 'sgd' or 'adamw', got {optimizer!r}")
    if epochs < 1 or crop < 0:
        raise DataError(f"expected epochs of 1 or more and crop of 0 or more, got {epochs}, {crop}")
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
    with bar, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # dropout and drop-path draw from the global generator
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator)
            for step in range(steps):
                chosen = order[step * batch_size : (step + 1) * batch_size]
                batch = images[chosen]
                if mirror:
                    flipped = torch.rand(batch_size, generator=generator) < 0.5
                    flipped = flipped[:, None, None, None].to(batch.device)
                    batch = torch.where(flipped, batch.flip(-1), batch)
                if crop:
                    batch = _crop(batch, crop, generator)
                loss = F.cross_entropy(model(batch.to(device)), labels[chosen].to(device))
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()
                bar.update()
                if step % 10 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def _crop(batch: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W), each moved by up to `reach` pixels along both axes."""
    height, width = batch.shape[-2:]
    wide = F.pad(batch, [reach] * 4)
    corners = torch.randint(2 * reach + 1, (len(batch), 2), generator=generator).tolist()
    return torch.stack(
        [
            image[:, top : top + height, left : left + width]
            for image, (top, left) in zip(wide, corners, strict=True)
        ]
    )
