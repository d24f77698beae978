"""Narrow networks for 32 pixels, from timm's constructors, and how each is trained.

Where timm's stem halves the image, as for photographs, its stride is set to 1, as is usual for
CIFAR-10. All have 10 outputs and expect pixels in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.layers import BatchNormAct2d, create_conv2d
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.resnetv2 import ResNetV2
from timm.models.vgg import VGG
from torch import nn

_SGD = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4}
_ADAMW = {"optimizer": "adamw", "lr": 0.002, "weight_decay": 0.05}
_VGG = [32, 32, "M", 64, 64, "M", 128, 128, "M"]


def _resnet() -> nn.Module:
    """ResNet-18 of the backdoor papers at a quarter of their width: 16, 32, 64, 128 channels."""
    stages = zip((16, 32, 64, 128), (1, 2, 2, 2), strict=True)
    config = ByoModelCfg(
        blocks=tuple(ByoBlockCfg("basic", d=2, c=width, s=stride) for width, stride in stages),
        stem_type="3x3",
        stem_chs=16,
        stem_pool=None,
    )
    model = ByobNet(config, num_classes=10)
    model.stem.conv.stride = (1, 1)
    return model


def _wideresnet() -> nn.Module:
    """WideResNet-16-1: three stages of two pre-activation blocks, 16, 32 and 64 channels."""
    model = ResNetV2(
        [2, 2, 2],
        (16, 32, 64),
        num_classes=10,
        stem_chs=16,
        basic=True,
        bottle_ratio=1.0,
        norm_layer=BatchNormAct2d,
        conv_layer=create_conv2d,
    )
    model.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    return model


def _vgg(**settings: Any) -> nn.Module:
    """Six convolutions, and one linear layer on the flattened 4 x 4 map."""
    features = VGG(_VGG, mlp_ratio=0.01, **settings).features
    return nn.Sequential(features, nn.Flatten(), nn.Linear(128 * 4 * 4, 10))


def _mobilenet() -> nn.Module:
    """MobileNetV2 at .35 of the width, with the first of its five strides set to 1."""
    model = timm.create_model("mobilenetv2_035", num_classes=10)
    model.conv_stem.stride = (1, 1)
    return model


def _convnext() -> nn.Module:
    return timm.create_model(
        "convnext_atto", num_classes=10, depths=(2, 2, 4, 2), dims=(24, 48, 96, 192), patch_size=2
    )


def _vit() -> nn.Module:
    model = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=10,
        img_size=32,
        patch_size=4,
        embed_dim=96,
        depth=6,
        num_heads=3,
    )
    for block in model.blocks:
        block.attn.fused_attn = False  # the same attention, and half the time on a CPU
    return model


# name -> constructor, and settings of nnprune_backdoor.attacks.Training
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "resnet": (_resnet, _SGD),
    "wideresnet": (_wideresnet, _SGD),
    "vgg_elu": (lambda: _vgg(act_layer=nn.ELU), _SGD | {"lr": 0.02}),  # unnormalised: .1 diverges
    "vgg_bn": (lambda: _vgg(norm_layer=nn.BatchNorm2d), _SGD),
    "mobilenet": (_mobilenet, _SGD),
    "convnext": (_convnext, _ADAMW),
    "vit": (_vit, _ADAMW),
}
FLOAT32 = {"mobilenet", "convnext"}  # depthwise convolutions are no faster in bfloat16


def build(arch: str, seed: int = 0) -> nn.Module:
    """The untrained network, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ARCHITECTURES[arch][0]().eval()
