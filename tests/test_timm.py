"""Removal on timm: all its tiny real networks, and some popular ones; the rest in benchmarks/."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from helpers.images import generator
from helpers.networks import take_statistics_
from nnprune_backdoor.core.masks import MaskedModel, silence_
from nnprune_backdoor.core.scores import ChannelScores, lowest, neurons_of
from nnprune_backdoor.core.sites import find_sites
from nnprune_backdoor.removal import compact

pytestmark = pytest.mark.network

ONE_EACH = {"layers": (1, 1, 1, 1)}
# some with fewer blocks of each kind; the whole ones are in benchmarks/
POPULAR: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "resnet50": ONE_EACH,
    "res2net50_14w_8s": ONE_EACH,
    "vgg11_bn": {"mlp_ratio": 0.05},
    "ghostnet_050": {},
    "mobilenetv3_small_100": {},
    "efficientnet_b0": {},
    "densenet121": {"block_config": (2, 2, 2, 2)},
    "regnetx_002": {},
    "regnety_002": {},
    "convnext_atto": {},
    "vit_tiny_patch16_224": {"img_size": 64},
    "deit_tiny_patch16_224": {"img_size": 64},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "depths": (2, 2, 1, 1)},
}
WHOLE = {"test_efficientnet_gn"}  # of which nothing can go: GroupNorm reads every hidden channel


@pytest.mark.slow
@pytest.mark.parametrize("name", [*timm.list_models("test_*"), *POPULAR])
def test_exact_removal(name: str) -> None:
    torch.manual_seed(0)
    settings = POPULAR.get(name, {})
    model = timm.create_model(name, num_classes=10, **settings).eval().requires_grad_(False)
    size = settings.get(
        "img_size", 64 if name in POPULAR else model.pretrained_cfg["input_size"][1]
    )
    images = torch.randn(4, 3, size, size, generator=generator())
    for parameter in model.parameters():
        if parameter.ndim <= 1 or parameter.min() == parameter.max():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    take_statistics_(model, images)
    sites = find_sites(model, images[:2])
    total = len(neurons_of(sites))
    scores = ChannelScores(sites, torch.rand(total, generator=generator(1)), "random")
    selection = lowest(scores, round(0.1 * total))
    masked = MaskedModel(model, sites, silencing="zero")
    with torch.no_grad():
        assert torch.equal(masked(images), model(images))
        masked.masks.copy_(selection.keep())
        wanted = masked(images)
    silence_(model, selection)
    smaller, report = compact(model, selection, images)
    with torch.no_grad():
        got = smaller(images)
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert len(report.removed) + len(report.silenced) == len(selection)
    assert bool(report.removed) == (name not in WHOLE)
    assert (report.after.parameters < report.before.parameters) == bool(report.removed)
