"""A device that is always full."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SmallMemory:
    """Makes a function raise when it is given more images than fit, as a full device does."""

    def __init__(self, run: Any, fits: int) -> None:
        self.run, self.fits = run, fits
        self.seen: list[int] = []
        self.refused = 0

    def __call__(self, model: Any, images: Tensor, **others: Any) -> Any:
        if len(images) > self.fits and torch.is_grad_enabled():
            self.refused += 1
            raise torch.OutOfMemoryError("out of memory (pretended)")
        self.seen.append(len(images))
        return self.run(model, images, **others)
