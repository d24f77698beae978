"""Attention heads are found by watching, and counted, masked and silenced by the same indices."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.images import generator, noise_images
from helpers.networks import build
from helpers.settings import ALL
from nnprune_backdoor import CleanData, create_criterion
from nnprune_backdoor.core.heads import find_heads
from nnprune_backdoor.core.masks import MaskedModel, silence_
from nnprune_backdoor.core.scores import ChannelScores, Selection, lowest
from nnprune_backdoor.core.sites import Neuron, Site, find_sites
from nnprune_backdoor.core.trace import Trace
from nnprune_backdoor.criteria.parts.layers import kernels, watch
from nnprune_backdoor.errors import UnsupportedModelError

IMAGES = noise_images(3)
TOKENS, HEADS, WIDTH = 16, 3, 4


class Attention(nn.Module):
    """Attention whose parts a test can change, after a convolution."""

    def __init__(self, kind: str = "matmul", heads: int = HEADS) -> None:
        super().__init__()
        dim = heads * WIDTH
        self.embed = nn.Conv2d(3, 8, 8, 8)
        self.q, self.k, self.v, self.gate = (nn.Linear(8, dim) for _ in range(4))
        self.norm, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 8)
        self.kind, self.heads = kind, heads

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        if self.kind == "fused":
            out = F.scaled_dot_product_attention(q, k, v)
        elif self.kind == "einsum":
            weights = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
            out = torch.einsum("bhqk,bhkd->bhqd", weights, v)
        else:
            out = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        out = out.transpose(1, 2)
        if self.kind == "mixed up":
            return self.proj(out.transpose(2, 3).flatten(2))
        out = out.flatten(2)
        if self.kind == "gated":
            out = out * self.gate(x).sigmoid()
        if self.kind == "normalised":
            out = self.norm(out)
        return self.proj(out)


class Classifier(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.hidden, self.fc = attention, nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.hidden(self.attention(images).mean(1)).relu())


def network(kind: str = "matmul", heads: int = HEADS) -> nn.Module:
    torch.manual_seed(0)
    return Classifier(Attention(kind, heads)).eval().requires_grad_(False)


def head_sites(model: nn.Module, images: Tensor = IMAGES) -> tuple[Site, ...]:
    return tuple(site for site in find_sites(model, images) if site.kind == "heads")


# ---- what is found ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["matmul", "fused", "einsum", "gated"])
def test_heads_are_found_however_they_are_computed(kind: str) -> None:
    expected = Site("attention.proj", HEADS, "heads", "attention.proj", WIDTH)
    assert head_sites(network(kind)) == (expected,)


@pytest.mark.parametrize("kind", ["normalised", "mixed up"])
def test_what_is_not_side_by_side_is_no_head(kind: str) -> None:
    """Normalised together, heads change each other; with channels first, none has a block."""
    assert head_sites(network(kind)) == ()


def test_a_single_head_is_none() -> None:
    assert head_sites(network(heads=1)) == ()


@pytest.mark.parametrize("library", ["timm", pytest.param("transformers", marks=pytest.mark.slow)])
def test_both_kinds_of_kernel_give_the_same_sites(library: str) -> None:
    if library == "timm":
        models = [build("test_vit"), build("test_vit")]
        for fused, model in zip((True, False), models, strict=True):
            for block in model.blocks:
                block.attn.fused_attn = fused
    else:
        models = [hugging_face_vit(kernel) for kernel in ("eager", "sdpa")]
    one, other = (head_sites(model) for model in models)
    assert one == other
    assert len(one) == (6 if library == "timm" else 2)


def hugging_face_vit(kernel: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs: pip install transformers")

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = {"hidden_size": 16, "intermediate_size": 24, "image_size": 32, "patch_size": 8}
            config = transformers.ViTConfig(
                num_hidden_layers=2, num_attention_heads=4, num_labels=10, **sizes
            )
            make = transformers.ViTForImageClassification._from_config
            self.model = make(config, attn_implementation=kernel)

        def forward(self, images: Tensor) -> Tensor:
            return self.model(images).logits

    torch.manual_seed(0)
    return Logits().eval()


@pytest.mark.parametrize(
    ("name", "count"),
    [("swin_tiny_patch4_window7_224", 4), ("cait_xxs24_224", 4), ("xcit_nano_12_p16_224", 4)],
)
def test_windows_talking_heads_and_covariances_have_heads(name: str, count: int) -> None:
    sizes = {"depths": (1, 1, 1, 1)} if "swin" in name else {"depth": 2}
    model = timm.create_model(name, num_classes=5, img_size=56 if "swin" in name else 64, **sizes)
    images = torch.randn(2, 3, 56 if "swin" in name else 64, 56 if "swin" in name else 64)
    assert len(head_sites(model.eval(), images)) == count


def test_the_reader_is_found_with_the_module_that_computed_the_heads() -> None:
    model = network()
    (found,) = find_heads(Trace.of(model, IMAGES))
    assert (found.layer, found.module) == (model.attention.proj, model.attention)
    assert (found.count, found.width) == (HEADS, WIDTH)


# ---- masks and weights --------------------------------------------------------------------------


@given(
    heads=st.sets(st.integers(0, HEADS - 1)),
    silencing=st.sampled_from(["zero", "constant"]),
)
@settings(max_examples=12, deadline=None)
def test_a_silent_head_is_one_whose_output_is_zero(heads: set[int], silencing: str) -> None:
    """Masks, silenced weights, and zeros in what the projection is given: all the same."""
    model = network()
    sites = find_sites(model, IMAGES)
    neurons = tuple(Neuron("attention.proj", head) for head in sorted(heads))
    selection = Selection(sites, neurons)
    masked = MaskedModel(model, sites, silencing=silencing)
    with torch.no_grad():
        masked.masks.copy_(selection.keep())
        product = copy.deepcopy(model)
        silence_(product, selection, silencing=silencing)

        def zeros(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
            x = inputs[0].unflatten(2, (HEADS, WIDTH)).clone()
            x[:, :, sorted(heads)] = 0
            return x.flatten(2)

        model.attention.proj.register_forward_pre_hook(zeros)
        wanted = model(IMAGES)
        torch.testing.assert_close(product(IMAGES), wanted)
        torch.testing.assert_close(masked(IMAGES), wanted)


@given(count=st.integers(1, 5), width=st.integers(1, 4), kernel=st.sampled_from([None, 1, 3]))
@settings(max_examples=20, deadline=None)
def test_weights_of_heads_are_the_columns_that_read_them(
    count: int, width: int, kernel: int | None
) -> None:
    """A view, head h first, in linear layers and convolutions of any memory layout."""
    inputs = count * width
    layer = nn.Linear(inputs, 3) if kernel is None else nn.Conv2d(inputs, 3, kernel)
    if kernel is not None:
        layer = layer.to(memory_format=torch.channels_last)
    site = Site("", count, "heads", "", width)
    weights = site.weights_of(layer)
    assert len(weights) == count
    model = nn.Sequential(layer)
    assert kernels(model, Site("0", count, "heads", "0", width)).shape[:2] == (count, 3)
    for head in range(count):
        columns = layer.weight[:, head * width : (head + 1) * width]
        assert torch.equal(weights[head], columns)
        assert weights[head].data_ptr() == columns.data_ptr()


def test_a_site_of_another_width_is_refused() -> None:
    model = network()
    selection = Selection((Site("attention.proj", 4, "heads", "attention.proj", WIDTH),), ())
    wrong = Selection(selection.sites, (Neuron("attention.proj", 0),))
    before = model.attention.proj.weight.clone()
    with pytest.raises(UnsupportedModelError, match=r"16 channels of 'attention.proj'.*has 12"):
        silence_(model, wrong)
    assert torch.equal(model.attention.proj.weight, before)


def test_of_heads_criteria_see_what_the_projection_is_given() -> None:
    model, seen = network(), []
    read: list[Tensor] = []
    model.attention.proj.register_forward_hook(lambda _, inputs, __: read.append(inputs[0]))
    watch(model, head_sites(model), IMAGES, lambda _, values: seen.append(values))
    (values,) = seen
    assert values.shape == (HEADS, WIDTH * len(IMAGES) * TOKENS)
    by_head = read[0].unflatten(2, (HEADS, WIDTH)).permute(2, 3, 0, 1).reshape(HEADS, -1)
    assert torch.equal(values, by_head.double())


# ---- scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(ALL) - {"bnp-default"}))  # no BatchNorm in a ViT
def test_every_criterion_tells_the_heads_of_a_vit_apart(name: str) -> None:
    criterion, branch = ALL[name]
    model = build("test_vit")
    images = noise_images(32)
    with torch.no_grad():
        model.head.bias -= model(images).mean(0)  # no label is the commonest
        clean = CleanData(images, model(images).argmax(1))  # there is a task to unlearn
    scores = create_criterion(criterion, **branch)(model, clean)
    heads = [scores[site.name] for site in scores.sites if site.kind == "heads"]
    assert len(heads) == 6
    assert len(torch.cat(heads).unique()) > 1


def test_heads_alone_can_be_scored_under_noise() -> None:
    """They have no biases for noise to multiply."""
    model = build("test_vit")
    clean = CleanData(noise_images(16), torch.arange(16) % 10)
    scores = create_criterion("anp", **ALL["anp-response"][1])(
        model, clean, sites=head_sites(model)
    )
    assert len(scores.flat) == 12


@given(seed=st.integers(0, 1000), count=st.integers(0, 40))
@settings(max_examples=20, deadline=None)
def test_flat_order_is_site_order_then_head_or_channel(seed: int, count: int) -> None:
    sites = (
        Site("a", 5, "layer", "a"),
        Site("b", 3, "heads", "b", width=7),
        Site("c", 4, "norm", "d"),
    )
    flat = torch.rand(12, generator=generator(seed))
    scores = ChannelScores(sites, flat, "random")
    assert [len(scores[name]) for name in "abc"] == [5, 3, 4]
    assert torch.equal(scores["b"], flat[5:8])
    selection = lowest(scores, count)
    assert len(selection) == min(count, 12 - 3)  # each site keeps one
    silent = {
        name: (part == 0).nonzero().flatten().tolist()
        for name, part in zip("abc", selection.keep().split([5, 3, 4]), strict=True)
    }
    assert {name: channels for name, channels in silent.items() if channels} == selection.by_site()


def test_scores_of_heads_are_saved_and_scores_of_old_are_read(tmp_path: Path) -> None:
    sites = Site("a", 2, "layer", "a"), Site("b", 3, "heads", "b", width=7)
    scores = ChannelScores(sites, torch.rand(5), "random")
    scores.save(tmp_path / "new")
    loaded = ChannelScores.load(tmp_path / "new")
    assert loaded.sites == sites
    assert torch.equal(loaded.flat, scores.flat)
    old = (
        (tmp_path / "new")
        .read_bytes()
        .replace(rb", \"width\": 1", b"" + b" " * len(rb", \"width\": 1"))
    )
    assert old.count(rb"width") == 1
    (tmp_path / "old").write_bytes(old)
    assert ChannelScores.load(tmp_path / "old").sites == sites
