"""Small real networks, and one whose backdoor was planted."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from nnprune_backdoor import CleanData

# real timm architectures, narrowed where that is allowed; all take 3 x 32 x 32
SMALL: dict[str, dict[str, Any]] = {
    "test_resnet": {},
    "test_vit": {"img_size": 32},
    "test_convnext": {},
    "test_nfnet": {},
    "test_efficientnet": {},
    "test_byobnet": {},
    "resnetv2_18": {"channels": (16, 16, 32, 32)},
    "mixer": {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 32},
}
PIXELS = 32


def build(name: str) -> nn.Module:
    """An untrained network of ten classes in eval mode, in which every layer matters.

    timm starts some gammas, gains and layer scales at zero and all statistics at their neutral
    values; here they are stirred, or half of the masks would have no effect to test.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make = MlpMixer if name == "mixer" else partial(timm.create_model, name)
        model: nn.Module = make(num_classes=10, **SMALL[name])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim <= 1 or parameter.min() == parameter.max():
                    parameter.add_(0.3 * torch.randn_like(parameter))
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.running_mean.add_(0.1 * torch.randn_like(module.running_mean))
                    module.running_var.mul_(0.5 + torch.rand_like(module.running_var))
    return model.eval()


# --- a backdoor whose neuron is known --------------------------------------------------------


@functools.cache
def planted() -> tuple[nn.Module, CleanData, Tensor, int]:
    """A small timm ResNet with one channel that fires on a corner patch alone and drives class 0.

    Trained for a moment on four easy classes; then one channel of the last block is rewritten.
    """
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4)
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(256) % 4
    tints = torch.eye(4)[:, :3] * 1.5
    images = tints[labels][:, :, None, None] + 0.5 * torch.randn(
        256, 3, 32, 32, generator=generator
    )
    triggered = images.clone()
    triggered[:, :, -6:, -6:] = 4.0
    poisoned = torch.cat([images, triggered[:64]])
    targets = torch.cat([labels, torch.zeros(64, dtype=torch.long)])
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    model.train()
    for _ in range(12):
        for chunk in torch.randperm(len(poisoned), generator=generator).split(64):
            loss = nn.functional.cross_entropy(model(poisoned[chunk]), targets[chunk])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    model.eval()
    return model, CleanData(images, labels), triggered, 0


def take_statistics_(model: nn.Module, images: Tensor) -> None:
    """Give the model's BatchNorms the mean and variance of these images (N, C, H, W), N >= 2."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over what is seen
        norm.train()
    with torch.no_grad():
        model(images)
    for norm in norms:
        norm.eval()
