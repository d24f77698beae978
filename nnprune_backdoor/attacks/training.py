"""Train a classifier, for demos and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..errors import DataError
from ..utils.progress import progress_bar
from ..utils.randomness import private_randomness
from ..utils.settings import check_settings

_M = TypeVar("_M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of `train_classifier`.

    Attributes:
        epochs: Passes over the images. At the default batch size, 8 embed a backdoor; a network
            that is trained until its accuracy stops rising needs 30 or more with `mirror` and
            `crop`.
        lr: Highest learning rate; it rises over the first 30 % of the steps, then falls to 0. 0.1
            suits SGD on convolutional networks, 1e-3 AdamW on transformers and ConvNeXt.
        weight_decay: Of the optimizer; 0.05 is usual with AdamW.
        batch_size: Images a step; a short last batch of an epoch is dropped.
        optimizer: "sgd" (momentum 0.9, Nesterov) or "adamw".
        mirror: Whether to flip half of the images, chosen at random, left to right.
        crop: Most pixels by which an image is moved at random along each axis; zeros fill the
            rest. Triggered images are moved too, so that part of a patch at the edge may be lost.
    """

    epochs: int
    lr: float = 0.1
    weight_decay: float = 5e-4
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    mirror: bool = False
    crop: int = 0

    def __post_init__(self) -> None:
        check_settings(self, positive=("epochs", "batch_size"))

    def optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        """For all parameters of the model."""
        parameters, lr, decay = model.parameters(), self.lr, self.weight_decay
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr, weight_decay=decay)
        return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=decay, nesterov=True)

    def augment(self, batch: Tensor, generator: Generator) -> Tensor:
        """Images (N, C, H, W), flipped and moved at random."""
        if self.mirror:
            flipped = torch.rand(len(batch), generator=generator) < 0.5
            flipped = flipped[:, None, None, None].to(batch.device)
            batch = torch.where(flipped, batch.flip(-1), batch)
        return _crop(batch, self.crop, generator) if self.crop else batch


def train_classifier(
    model: _M,
    images: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
    progress: bool = False,
    **settings: Any,
) -> _M:
    """Train `model` in place with one-cycle SGD or AdamW, and return it in eval mode.

    Args:
        images: (N, C, H, W), normalised as the model expects.
        labels: (N,) integers.
        seed: of the order of the images, augmentation and dropout.
        **settings: fields of `Training`; `epochs` is required.

    Raises:
        DataError: fewer images than a batch, or a setting out of range.
    """
    training = Training(**settings)
    steps = len(images) // training.batch_size
    if steps == 0:
        raise DataError(
            f"expected at least {training.batch_size} images for one batch, got {len(images)}; "
            "give more images or a smaller batch size"
        )
    total = training.epochs * steps
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    optimiser = training.optimiser(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, training.lr, total_steps=total)
    model.train()
    # dropout and drop-path draw from the global generator
    with progress_bar(total, "training", progress) as bar, private_randomness(seed):
        for _ in range(training.epochs):
            batches = torch.randperm(len(images), generator=generator).split(training.batch_size)
            for step, chosen in enumerate(batches[:steps]):
                batch = training.augment(images[chosen], generator)
                loss = F.cross_entropy(model(batch.to(device)), labels[chosen].to(device))
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()
                bar.update()
                if step % 10 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def _crop(batch: Tensor, reach: int, generator: Generator) -> Tensor:
    """Images (N, C, H, W), each moved by up to `reach` pixels along both axes."""
    height, width = batch.shape[-2:]
    padded = F.pad(batch, [reach] * 4)
    corners = torch.randint(2 * reach + 1, (len(batch), 2), generator=generator).tolist()
    return torch.stack(
        [
            image[:, top : top + height, left : left + width]
            for image, (top, left) in zip(padded, corners, strict=True)
        ]
    )
