"""Tiny real networks and clean images that the tests share."""

from __future__ import annotations

import copy
import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from nnprune_backdoor import ChannelScores, CleanData, Criterion, Site, find_sites
from nnprune_backdoor.attacks import train_classifier

torch.set_num_threads(1)

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
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


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


def noise_images(count: int, seed: int = 0) -> Tensor:
    """(count, 3, 32, 32), standard normal."""
    return torch.randn(count, 3, PIXELS, PIXELS, generator=generator(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hooks_of(model: nn.Module) -> list[tuple[int, ...]]:
    """How many hooks of each kind hang on each module."""
    return [tuple(len(getattr(module, kind, ())) for kind in _HOOKS) for module in model.modules()]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the whole state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert not changed, f"changed: {changed}"


class Arbitrary(Criterion):
    """Any order, without a look at model or data."""

    reference = "none"
    needs_labels = False

    @classmethod
    def paper(cls) -> Arbitrary:
        return cls()

    def score(self, model, clean, sites, generator, progress):  # type: ignore[no-untyped-def]
        total = sum(site.channels for site in sites)
        return ChannelScores(sites, torch.rand(total, generator=generator), "arbitrary")


@pytest.fixture(params=list(SMALL))
def any_model(request: pytest.FixtureRequest) -> nn.Module:
    """Each of the small architectures in turn; a new one for each test."""
    return build(request.param)


@pytest.fixture(scope="session")
def clean() -> CleanData:
    """64 labelled images, ten classes, that can be learned: a pattern a class, under noise."""
    labels = torch.arange(64) % 10
    patterns = torch.randn(10, 3, 4, 4, generator=generator(1))
    patterns = nn.functional.interpolate(patterns, PIXELS, mode="bilinear")
    return CleanData(patterns[labels] + 0.7 * noise_images(64, seed=2), labels)


@pytest.fixture(scope="session")
def _trained(clean: CleanData) -> nn.Module:
    model = build("test_resnet")
    train_classifier(model, clean.images, clean.targets, epochs=12, batch_size=32, lr=0.05)
    with torch.no_grad():
        share = (model(clean.images).argmax(1) == clean.targets).float().mean()
    assert share > 0.9, "the tests below need a network that has learned something"
    return model


@pytest.fixture
def trained(_trained: nn.Module) -> nn.Module:
    """A test_resnet that classifies `clean` rightly; one's own copy, trainable, in eval mode."""
    return copy.deepcopy(_trained)


@pytest.fixture
def net(trained: nn.Module) -> nn.Module:
    """What criteria are given: the trained network, frozen."""
    return trained.requires_grad_(False)


@pytest.fixture
def sites(net: nn.Module, clean: CleanData) -> tuple[Site, ...]:
    """The sites of `net`."""
    return find_sites(net, clean.images[:2])


def write_mnist(root: Path, count: int = 30) -> Path:
    """Image number i is grey 5 i, of class i modulo 10."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        pixels = np.repeat(5 * np.arange(count, dtype=np.uint8), 28 * 28)
        head = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        head = struct.pack(">II", 0x801, count)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    return root
