"""Torch-Pruning's example scripts with an importance of ours: what came out.

    python -m benchmarks.torch_pruning_scripts    # the table of docs/results/pruning_scripts.md

Each function does what one script of its folder `examples/` does, with a small network of the same
family (from its configuration, untrained) and 32 x 32 images, since nothing is downloaded here.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch_pruning as tp
import torchvision
from timm.layers import Attention
from torch import Tensor, nn

from nnprune_backdoor.importance import MagnitudeImportance

EXAMPLE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a pipeline left.

    Attributes:
        logits: Shape of the logits afterwards.
        before: Parameters before.
        after: Parameters after.
        skipped: Groups that were left unpruned, by kind.
    """

    logits: tuple[int, ...]
    before: int
    after: int
    skipped: dict[str, int]


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _outcome(model: nn.Module, before: int, importance: Any) -> Outcome:
    with torch.no_grad():
        output = model(EXAMPLE)
    kinds = [skipped.kind for skipped in importance.skipped]
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    logits: Tensor = getattr(output, "logits", output)
    return Outcome(tuple(logits.shape), before, _size(model), counts)


def _unpadded_attention(self: Any, x: Tensor, **_: Any) -> Tensor:
    """timm's attention for a width of heads that is no longer that of the stream."""
    batch, tokens, _ = x.shape
    qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    out = nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
    projected: Tensor = self.proj(out.transpose(1, 2).reshape(batch, tokens, -1))
    return projected


def _timm_heads(model: nn.Module) -> dict[nn.Module, int]:
    """timm's projections of queries, keys and values, with the number of heads; widths mended."""
    heads: dict[nn.Module, int] = {}
    for module in model.modules():
        if isinstance(module, Attention):
            heads[module.qkv] = module.num_heads
            module.forward = _unpadded_attention.__get__(module)
    return heads


def _pruned(
    model: nn.Module, importance: Any, kind: Any = tp.pruner.BasePruner, **settings: Any
) -> Any:
    """The pruner, after it has taken half of the channels in the way that the scripts have it."""
    usual = {"pruning_ratio": 0.5, "in_channel_groups": {}, "out_channel_groups": {}}
    pruner = kind(model, EXAMPLE, importance, **{**usual, **settings})
    for group in pruner.step(interactive=True):
        group.prune()
    return pruner


def timm_models(name: str = "test_vit", **settings: Any) -> Outcome:
    """timm_models/prune_timm_models.py: half of each layer, widths of multiples of eight."""
    model = timm.create_model(name, num_classes=10, **settings).eval()
    before, heads = _size(model), _timm_heads(model)
    importance = MagnitudeImportance(model, [EXAMPLE])
    ignored = [model.get_classifier()]
    _pruned(model, importance, num_heads=heads, ignored_layers=ignored, round_to=8)
    return _outcome(model, before, importance)


def timm_vit(name: str = "test_vit") -> Outcome:
    """transformers/prune_timm_vit.py with --prune_num_heads: half of the heads are asked for."""
    model = timm.create_model(name, num_classes=10, img_size=32).eval()
    before, heads = _size(model), _timm_heads(model)
    importance = MagnitudeImportance(model, [EXAMPLE])
    pruner = _pruned(
        model,
        importance,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=0.5,
        ignored_layers=[model.head],
    )
    for module in model.modules():
        if isinstance(module, Attention):
            module.num_heads = pruner.num_heads[module.qkv]
    return _outcome(model, before, importance)


def _torchvision(name: str) -> nn.Module:
    if name == "vit":
        sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4}
        return torchvision.models.VisionTransformer(
            **sizes, hidden_dim=64, mlp_dim=128, num_classes=10
        ).eval()
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=10)
    return model.eval()


def mend(model: nn.Module) -> None:
    """What both scripts do after pruning: a ViT of torchvision keeps its width in a number."""
    if isinstance(model, torchvision.models.VisionTransformer):
        model.hidden_dim = model.conv_proj.out_channels


def torchvision_global(name: str = "resnet18") -> Outcome:
    """torchvision_models/torchvision_global_pruning.py: half of all channels."""
    return _of_torchvision(name, tp.pruner.BasePruner, everywhere=True)


def torchvision_local(name: str = "resnet18") -> Outcome:
    """torchvision_models/torchvision_pruning.py: half of each layer, then its regulariser."""
    return _of_torchvision(name, tp.pruner.GroupNormPruner, everywhere=False)


def _of_torchvision(name: str, kind: Any, *, everywhere: bool) -> Outcome:
    model = _torchvision(name)
    before = _size(model)
    ignored = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 10]
    groups = {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    importance = MagnitudeImportance(model, [EXAMPLE], trial=mend)
    pruner = _pruned(
        model,
        importance,
        kind,
        global_pruning=everywhere,
        ignored_layers=ignored,
        out_channel_groups=groups,
        num_heads={},
    )
    mend(model)
    if kind is tp.pruner.GroupNormPruner:
        model(EXAMPLE).sum().backward()
        pruner.update_regularizer()
        pruner.regularize(model)
    return _outcome(model, before, importance)


def _heads(model: nn.Module) -> dict[nn.Module, int]:
    """Query, key and value, as the releases of transformers call them, with the number of heads."""
    projections = ("q_proj", "k_proj", "v_proj", "query", "key", "value")
    return {
        layer: int(module.num_attention_heads)
        for module in model.modules()
        if hasattr(module, "num_attention_heads")
        for name in projections
        if isinstance(layer := getattr(module, name, None), nn.Linear)
    }


def hugging_face_vit() -> Outcome:
    """transformers/prune_hf_vit.py: the output is an object, and widths of heads are mended."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ViTConfig(**sizes, intermediate_size=64, image_size=32, patch_size=8, num_labels=10)
    model = ViTForImageClassification(config).eval()
    before, heads = _size(model), _heads(model)
    importance = MagnitudeImportance(model, [EXAMPLE])
    _pruned(
        model,
        importance,
        num_heads=heads,
        ignored_layers=[model.classifier],
        output_transform=lambda output: output.logits.sum(),
    )
    return _outcome(model, before, importance)


class _Merging(tp.BasePruningFunc):  # type: ignore[misc] # the package is untyped
    """The script's own pruner of Swin's patch merging, whose four inputs share their channels."""

    def prune_out_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
        tp.prune_linear_out_channels(layer.reduction, idxs)
        return layer

    def prune_in_channels(self, layer: Any, idxs: list[int]) -> nn.Module:
        width = self.get_in_channels(layer)
        four = [index + part * width for part in range(4) for index in idxs]
        tp.prune_linear_in_channels(layer.reduction, four)
        tp.prune_layernorm_out_channels(layer.norm, four)
        return layer  # type: ignore[no-any-return]

    def get_out_channels(self, layer: Any) -> int:
        return int(layer.reduction.out_features)

    def get_in_channels(self, layer: Any) -> int:
        return int(layer.reduction.in_features) // 4


def hugging_face_swin() -> Outcome:
    """transformers/prune_hf_swin.py: a layer with a pruner of its own."""
    from transformers import SwinConfig, SwinForImageClassification
    from transformers.models.swin.modeling_swin import SwinPatchMerging

    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "window_size": 4}
    config = SwinConfig(**sizes, depths=[2, 2], num_heads=[2, 4], num_labels=10)
    model = SwinForImageClassification(config).eval()
    before, heads = _size(model), _heads(model)
    importance = MagnitudeImportance(model, [EXAMPLE])
    _pruned(
        model,
        importance,
        num_heads=heads,
        ignored_layers=[model.classifier],
        output_transform=lambda output: output.logits.sum(),
        customized_pruners={SwinPatchMerging: _Merging()},
        root_module_types=(nn.Linear, nn.LayerNorm, SwinPatchMerging),
    )
    return _outcome(model, before, importance)


PIPELINES: dict[str, Callable[[], Outcome]] = {
    "timm_models/prune_timm_models.py, ViT": lambda: timm_models(img_size=32),
    "timm_models/prune_timm_models.py, ConvNeXt": lambda: timm_models("test_convnext"),
    "timm_models/prune_timm_models.py, ResNet": lambda: timm_models("test_resnet"),
    "torchvision_models/torchvision_global_pruning.py, ResNet-18": torchvision_global,
    "torchvision_models/torchvision_global_pruning.py, ViT": lambda: torchvision_global("vit"),
    "torchvision_models/torchvision_pruning.py, ResNet-18": torchvision_local,
    "torchvision_models/torchvision_pruning.py, MobileNetV3": lambda: torchvision_local(
        "mobilenet_v3_small"
    ),
    "torchvision_models/torchvision_pruning.py, ViT": lambda: torchvision_local("vit"),
    "transformers/prune_timm_vit.py, whole heads": timm_vit,
    "transformers/prune_hf_vit.py": hugging_face_vit,
    "transformers/prune_hf_swin.py": hugging_face_swin,
}


def main() -> None:
    """Print the table."""
    print("| script, network | parameters | groups left unpruned |\n|---|---|---|")
    for name, pipeline in PIPELINES.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            outcome = pipeline()
        skipped = ", ".join(f"{count} {kind}" for kind, count in outcome.skipped.items()) or "none"
        less = 1 - outcome.after / outcome.before
        print(f"| {name} | {outcome.before:,} -> {outcome.after:,} (-{less:.0%}) | {skipped} |")


if __name__ == "__main__":
    main()
