"""Adversarial noise on all neurons at once: the inner problem of ANP, and a part of CNP.

Wu and Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.compute import mean_gradients
from ...core.data import CleanData
from ...core.masks import MaskedModel
from ...utils.tensors import at_least_float32


def adversarial_noise(
    masked: MaskedModel,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    *,
    budget: float,
    steps: int = 1,
    project: bool = True,
) -> dict[str, Tensor]:
    """delta (on weights) and xi (on biases) that raise the cross-entropy of this batch.

    Uniform in [-budget, budget], then `steps` steps of budget / steps along the gradient's sign.

    Args:
        images, labels: (B, C, H, W) and (B,), on the model's device and in its dtype.
        project: keep the noise within its budget; without, it reaches twice as far.

    Returns:
        the two keyword arguments of a perturbed `MaskedModel` call, each (number of neurons,).
    """
    noise = [
        (torch.rand(len(masked.masks), generator=generator) * 2 - 1).mul(budget).to(masked.masks)
        for _ in range(2)
    ]

    def passes(some: CleanData) -> tuple[tuple[Tensor, ...], None]:
        logits = masked(some.images, weight_noise=noise[0], bias_noise=noise[1])
        loss = F.cross_entropy(at_least_float32(logits), some.targets)
        # heads have no bias, so the second may be unused
        return torch.autograd.grad(loss, noise, materialize_grads=True), None

    with masked.frozen_masks():
        for _ in range(steps):
            for part in noise:
                part.requires_grad_(True)
            gradients, _ = mean_gradients(CleanData(images, labels), passes)
            noise = [
                part.detach() + budget / steps * gradient.sign()
                for part, gradient in zip(noise, gradients, strict=True)
            ]
            if project:
                noise = [part.clamp(-budget, budget) for part in noise]
    return {"weight_noise": noise[0].detach(), "bias_noise": noise[1].detach()}
