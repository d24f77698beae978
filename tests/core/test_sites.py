from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from helpers.images import noise_images
from helpers.networks import PIXELS, build
from helpers.states import assert_same_state, hooks_of, state_of
from nnprune_backdoor.core.sites import Site, find_sites
from nnprune_backdoor.errors import UnsupportedModelError

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
NORM = nn.modules.batchnorm._BatchNorm
IMAGES = noise_images(2)


class Classifier(nn.Module):
    """body, mean over space, ten classes."""

    def __init__(self, body: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.body = body
        self.fc = nn.Linear(channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.body(images).mean((2, 3)))


def sites_of(*body: nn.Module) -> list[tuple[str, int, str, str]]:
    """Sites of a sequence of layers under a classifier, without the common prefix."""
    found = find_sites(Classifier(nn.Sequential(*body)).eval(), IMAGES)
    short = [(s.name, s.channels, s.kind, s.producer) for s in found]
    return [(n.removeprefix("body."), c, k, p.removeprefix("body.")) for n, c, k, p in short]


# ---- real networks, exactly ---------------------------------------------------------------------


def test_resnet18_has_the_20_norms_and_4800_neurons_of_the_papers() -> None:
    model = timm.create_model("resnet18", num_classes=10).eval()
    expected = [Site("bn1", 64, "norm", "conv1")]
    for layer, channels in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            prefix = f"layer{layer}.{block}."
            expected.append(Site(prefix + "bn1", channels, "norm", prefix + "conv1"))
            expected.append(Site(prefix + "bn2", channels, "norm", prefix + "conv2"))
            if layer > 1 and block == 0:
                shortcut = prefix + "downsample."
                expected.append(Site(shortcut + "1", channels, "norm", shortcut + "0"))
    found = find_sites(model, IMAGES)
    assert found == tuple(expected)  # the order too: that in which the layers run
    assert len(found) == 20
    assert sum(site.channels for site in found) == 4800


def test_resnet34_has_8512_neurons() -> None:
    model = timm.create_model("resnet34", num_classes=10).eval()
    assert sum(site.channels for site in find_sites(model, IMAGES)) == 8512


def test_mobilenet_squeeze_excite_convolutions_are_no_sites() -> None:
    model = timm.create_model("mobilenetv3_small_050", num_classes=10).eval()
    gates = {name for name, module in model.named_modules() if ".se." in name and _is_layer(module)}
    assert len(gates) == 18  # nine blocks, two convolutions each
    layers = {name for name, module in model.named_modules() if _is_layer(module)}
    producers = {site.producer for site in find_sites(model, IMAGES)}
    assert producers == layers - gates - {"classifier"}


@pytest.mark.parametrize("fused", [True, False])
def test_vit_sites_are_heads_mlp_units_and_the_embedding(fused: bool) -> None:
    model = build("test_vit")
    for block in model.blocks:
        block.attn.fused_attn = fused  # one kernel, or matmul and softmax
    expected = [Site("patch_embed.proj", 64, "layer", "patch_embed.proj")]
    for number in range(len(model.blocks)):
        proj = f"blocks.{number}.attn.proj"
        expected.append(Site(proj, 2, "heads", proj, width=32))
        for layer, channels in (("fc1", 192), ("fc2", 64)):
            name = f"blocks.{number}.mlp.{layer}"
            expected.append(Site(name, channels, "layer", name))
    assert find_sites(model, IMAGES) == tuple(expected)


def test_pytorch_attention_is_left_out_too() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 16, 8, 8)
            self.layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
            self.fc = nn.Linear(16, 10)

        def forward(self, images: Tensor) -> Tensor:
            return self.fc(self.layer(self.embed(images).flatten(2).transpose(1, 2)).mean(1))

    names = [site.name for site in find_sites(Encoder().eval(), IMAGES)]
    assert names == ["embed", "layer.linear1", "layer.linear2"]


@pytest.mark.slow
def test_vgg11_without_norms_has_layer_sites() -> None:
    model = timm.create_model("vgg11", num_classes=10).eval()
    widths = {0: 64, 3: 128, 6: 256, 8: 256, 11: 512, 13: 512, 16: 512, 18: 512}
    expected = [(f"features.{index}", width) for index, width in widths.items()]
    expected += [("pre_logits.fc1", 4096), ("pre_logits.fc2", 4096)]
    with torch.no_grad():
        found = find_sites(model, IMAGES)
    assert found == tuple(Site(name, width, "layer", name) for name, width in expected)


def test_nfnet_sites_are_its_convolutions_without_the_gates() -> None:
    model = build("test_nfnet")
    convolutions = {
        name: module.out_channels
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    gates = {name for name in convolutions if ".attn" in name}
    found = find_sites(model, IMAGES)
    assert all(site.kind == "layer" and site.producer == site.name for site in found)
    wanted = {name: width for name, width in convolutions.items() if name not in gates}
    assert {site.name: site.channels for site in found} == wanted


def test_preactivation_resnet_pairs_inner_norms_only() -> None:
    found = {site.name: site for site in find_sites(build("resnetv2_18"), IMAGES)}
    first = ["stem.conv", *(f"stages.0.blocks.{name}" for name in _FIRST_BLOCKS)]
    assert list(found)[: len(first)] == first
    assert found["stages.0.blocks.0.norm2"].producer == "stages.0.blocks.0.conv1"
    # what ends a block goes into a sum, and the norm after the sum is nobody's
    assert found["stages.0.blocks.0.conv2"].kind == "layer"
    assert not any(name.endswith("norm1") for name in found)
    assert "norm" not in found


# norms and layers in the order in which they run
_FIRST_BLOCKS = ("0.downsample.conv", "0.norm2", "0.conv2", "1.norm2", "1.conv2")


@pytest.mark.parametrize("name", timm.list_models("test_*"))
def test_laws_on_every_tiny_timm_model(name: str) -> None:
    try:
        model = timm.create_model(name, num_classes=10, img_size=PIXELS)
    except TypeError:  # takes any size
        model = timm.create_model(name, num_classes=10)
    model.eval()
    before, hooks = state_of(model), hooks_of(model)
    found = find_sites(model, IMAGES)
    assert found == find_sites(model, IMAGES)
    assert_same_state(before, model.state_dict())
    assert hooks_of(model) == hooks
    modules = dict(model.named_modules())
    assert len({site.name for site in found}) == len(found)
    classifier = model.get_classifier()
    for site in found:
        module, producer = modules[site.name], modules[site.producer]
        assert isinstance(producer, LAYERS)
        assert (site.kind == "norm") == (module is not producer)
        assert len(site.weights_of(module)) == len(site.weights_of(producer)) == site.channels
        assert classifier not in (module, producer)
        assert not any(word in site.producer for word in (".se.", ".attn.qkv"))
        assert site.producer.endswith(("attn.proj", "attn_pool.proj")) == (site.kind == "heads")


# ---- data flow, not names or registration -------------------------------------------------------


def test_norms_registered_first_and_used_crosswise_are_paired_by_data_flow() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_a = nn.BatchNorm2d(8)
            self.norm_b = nn.BatchNorm2d(8)
            self.conv_a = nn.Conv2d(8, 8, 3)
            self.conv_b = nn.Conv2d(3, 8, 3)
            self.fc = nn.Linear(8, 10)

        def forward(self, images: Tensor) -> Tensor:
            hidden = self.norm_a(self.conv_b(images)).relu()
            return self.fc(self.norm_b(self.conv_a(hidden)).relu().mean((2, 3)))

    found = find_sites(Crossed().eval(), IMAGES)
    assert found == (Site("norm_a", 8, "norm", "conv_b"), Site("norm_b", 8, "norm", "conv_a"))


def test_a_norm_before_its_convolution_is_not_paired() -> None:
    found = sites_of(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.ReLU())
    assert found == [("1", 8, "layer", "1")]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_norm_after_an_activation_is_not_paired(inplace: bool) -> None:
    found = sites_of(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=inplace), nn.BatchNorm2d(8))
    assert found == [("0", 8, "layer", "0")]


class Residual(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inplace = inplace

    def forward(self, images: Tensor) -> Tensor:
        first = self.conv1(images)
        second = self.conv2(first)
        if self.inplace:
            second += first
        else:
            second = second + first
        return self.norm(second)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_norm_after_a_residual_sum_is_not_paired(inplace: bool) -> None:
    found = sites_of(Residual(inplace))
    assert found == [("0.conv1", 8, "layer", "0.conv1"), ("0.conv2", 8, "layer", "0.conv2")]


def test_the_room_of_a_freed_input_makes_no_pair() -> None:
    """A concatenation was freed, and a later convolution's output took its address."""
    torch.manual_seed(0)
    model = timm.create_model("densenet121", num_classes=10, growth_rate=8, block_config=(2,) * 4)
    found = [find_sites(model.eval(), IMAGES) for _ in range(20)]
    assert len(set(found)) == 1
    order = [name for name, module in model.named_modules() if isinstance(module, (*LAYERS, NORM))]
    for site in found[0]:  # as timm registers them: each before what it feeds
        assert order.index(site.producer) <= order.index(site.name)


def test_a_norm_stays_paired_when_its_input_is_overwritten_later() -> None:
    class Overwritten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, images: Tensor) -> Tensor:
            plain = self.conv(images)
            return self.norm(plain) + plain.relu_()

    assert sites_of(Overwritten()) == [("0.norm", 8, "norm", "0.conv")]


def test_group_norm_with_weights_stands_for_its_convolution() -> None:
    assert sites_of(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)) == [("1", 8, "norm", "0")]


def test_instance_norm_with_weights_stands_for_its_convolution() -> None:
    layers = nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.ReLU()
    assert sites_of(*layers) == [("1", 8, "norm", "0")]


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(8, affine=False), nn.GroupNorm(2, 8, affine=False), nn.Identity()]
)
def test_a_norm_without_weights_leaves_the_convolution_to_itself(norm: nn.Module) -> None:
    assert sites_of(nn.Conv2d(3, 8, 3), norm) == [("0", 8, "layer", "0")]


def test_linear_layer_with_batch_norm_is_a_pair() -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(3 * PIXELS**2, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 10)
    )
    assert find_sites(model.eval(), IMAGES) == (Site("2", 6, "norm", "1"),)


def test_layers_that_never_run_are_no_sites() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Conv2d(3, 8, 3)
            self.spare = nn.Conv2d(3, 8, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.used(images)

    assert [name for name, *_ in sites_of(Spare())] == ["0.used"]


# ---- gates and products -------------------------------------------------------------------------


def test_layers_nested_in_a_gate_are_no_sites() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU())
            self.gate = nn.Sequential(squeeze, nn.Conv2d(4, 8, 1), nn.Sigmoid())

        def forward(self, features: Tensor) -> Tensor:
            return features * self.gate(features)

    assert sites_of(nn.Conv2d(3, 8, 3), nn.ReLU(), Gated()) == [("0", 8, "layer", "0")]


def test_a_learned_scale_is_no_gate() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.gamma = nn.Parameter(torch.ones(8))

        def forward(self, features: Tensor) -> Tensor:
            return features * self.gamma.view(-1, 1, 1) + self.conv(features)

    names = [name for name, *_ in sites_of(nn.Conv2d(3, 8, 3), Scaled())]
    assert names == ["0", "1.conv"]


@pytest.mark.parametrize("what", ["buffer", "computed", "number", "matrix"])
def test_what_is_the_same_for_every_image_is_no_gate(what: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.register_buffer("scale", torch.full((1, 3, 1, 1), 0.5))
            self.register_buffer("colours", torch.eye(3))

        def forward(self, x: Tensor) -> Tensor:
            if what == "matrix":
                return self.conv((x.movedim(1, -1) @ self.colours).movedim(-1, 1))
            scale = {"buffer": self.scale, "computed": 1 / self.scale, "number": self.scale.mean()}
            return self.conv(x * scale[what])

    assert sites_of(Scaled(), nn.ReLU()) == [("0.conv", 8, "layer", "0.conv")]


class Bilinear(nn.Module):
    """Multiplies activations in its own forward; its layers are its own or inside a Sequential."""

    def __init__(self, pooling: str, own: bool) -> None:
        super().__init__()
        self.pooling = pooling
        if own:
            self.conv0, self.conv1 = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 8, 3)
            self.conv2 = nn.Conv2d(8, 4, 3)
        else:
            convs = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
            self.body = nn.Sequential(*convs, nn.ReLU())
        self.attention = nn.Conv2d(4, 1, 1)
        self.squeeze, self.expand = nn.Linear(4, 2), nn.Linear(2, 4)
        self.pattern = "nci,ndi->ncd"

    def forward(self, images: Tensor) -> Tensor:
        if hasattr(self, "body"):
            maps = self.body(images)
        else:
            maps = self.conv2(self.conv1(self.conv0(images))).relu()
        flat = maps.flatten(2)
        if self.pooling == "bmm":
            return torch.bmm(flat, flat.transpose(1, 2)).flatten(1)
        if self.pooling == "einsum":
            return torch.einsum(self.pattern, flat, flat).flatten(1)
        if self.pooling == "attention":
            weights = self.attention(maps).flatten(2).softmax(2)
            return torch.matmul(weights, flat.transpose(1, 2)).flatten(1)
        gate = self.expand(self.squeeze(maps.mean((2, 3))).relu()).sigmoid()
        return torch.einsum("nci,nc->nc", flat, gate)


POOLED = {"bmm": 16, "einsum": 16, "attention": 4, "gate": 4}


@pytest.mark.parametrize("pooling", POOLED)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("wrapping", ["none", "normalised", "deep", "stem", "head"])
def test_a_network_that_multiplies_activations_keeps_its_neurons(
    pooling: str, own: bool, wrapping: str
) -> None:
    body = Bilinear(pooling, own)
    convs = {f"conv{number}" if own else f"body.{number}" for number in range(3)}
    classifier = nn.Linear(POOLED[pooling], 10)
    hidden = nn.Sequential(nn.Linear(POOLED[pooling], 6), nn.ReLU(), nn.Linear(6, 10))
    normalise = nn.BatchNorm2d(3, affine=False)
    model, prefix, more = {
        "none": (nn.Sequential(body, classifier), "0.", set()),
        "normalised": (nn.Sequential(normalise, body, classifier), "1.", set()),
        "deep": (nn.Sequential(nn.Sequential(nn.Sequential(body)), classifier), "0.0.0.", set()),
        "stem": (nn.Sequential(nn.Conv2d(3, 3, 1), body, classifier), "1.", {"0"}),
        "head": (nn.Sequential(normalise, body, hidden), "1.", {"2.0"}),
    }[wrapping]
    found = {site.name for site in find_sites(model.eval(), IMAGES)}
    assert found == {prefix + conv for conv in convs} | more


def test_queries_and_keys_of_a_whole_network_are_no_neurons() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 8, 8, 8)
            self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)
            self.hidden, self.fc = nn.Linear(8, 12), nn.Linear(12, 10)

        def forward(self, images: Tensor) -> Tensor:
            tokens = self.embed(images).flatten(2).transpose(1, 2)
            weights = (self.query(tokens) @ self.key(tokens).transpose(1, 2)).softmax(-1)
            return self.fc(self.hidden((weights @ tokens).mean(1)).relu())

    for model in (Net(), nn.Sequential(nn.Identity(), Net())):
        names = [site.name.split(".")[-1] for site in find_sites(model.eval(), IMAGES)]
        assert names == ["embed", "hidden"]


def test_a_product_with_a_computed_weight_is_no_attention() -> None:
    class Cosine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.hidden = nn.Conv2d(3, 8, 3), nn.Linear(8, 6)
            self.weight = nn.Parameter(torch.randn(10, 6))

        def forward(self, images: Tensor) -> Tensor:
            features = self.hidden(self.conv(images).relu().mean((2, 3)))
            unit = nn.functional.normalize(self.weight)
            return nn.functional.normalize(features) @ unit.T

    assert [site.name for site in find_sites(Cosine().eval(), IMAGES)] == ["conv", "hidden"]


# ---- the classifier -----------------------------------------------------------------------------


def test_two_averaged_heads_are_both_classifiers() -> None:
    class Distilled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.head, self.head_dist = nn.Linear(8, 10), nn.Linear(8, 10)

        def forward(self, images: Tensor) -> Tensor:
            features = self.conv(images).relu().mean((2, 3))
            return (self.head(features) + self.head_dist(features)) / 2

    assert [site.name for site in find_sites(Distilled().eval(), IMAGES)] == ["conv"]


def test_a_convolution_that_classifies_before_pooling_is_no_site() -> None:
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 1))
    model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert [site.name for site in find_sites(model.eval(), IMAGES)] == ["0.0"]


def test_hidden_units_as_many_as_classes_are_still_sites() -> None:
    layers = [nn.Flatten(), nn.Linear(3 * PIXELS**2, 10), nn.ReLU(), nn.Linear(10, 10)]
    found = find_sites(nn.Sequential(*layers).eval(), IMAGES)
    assert [site.name for site in found] == ["1"]


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(nn.Flatten(), nn.Linear(3 * PIXELS**2, 10))])
def test_a_model_without_sites_is_refused_with_the_types_seen(layers: tuple[nn.Module]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer types seen: Flatten, Linear$"):
        find_sites(nn.Sequential(*layers).eval(), IMAGES)


def test_only_a_classifier_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no neuron to score.*AdaptiveAvgPool2d"):
        model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
        find_sites(model.eval(), IMAGES)


@pytest.mark.parametrize("source", ["timm", "torchvision"])
def test_frozen_batch_norm_is_refused_with_its_reason(source: str) -> None:
    if source == "timm":
        model = timm.layers.freeze_batch_norm_2d(build("test_resnet"))
    else:
        frozen = torchvision.ops.FrozenBatchNorm2d(8)
        model = Classifier(nn.Sequential(nn.Conv2d(3, 8, 3), frozen)).eval()
    hooks = hooks_of(model)
    with pytest.raises(UnsupportedModelError, match=r"FrozenBatchNorm2d.*buffers.*unfreeze"):
        find_sites(model, IMAGES)
    assert hooks_of(model) == hooks


# ---- the model is left as it was ----------------------------------------------------------------


def test_no_hook_stays_and_the_users_own_hook_does() -> None:
    model = build("test_resnet")
    seen = []
    model.layer1.register_forward_hook(lambda *_: seen.append(True))
    before = hooks_of(model)
    find_sites(model, IMAGES)
    assert hooks_of(model) == before
    assert seen == [True]


@pytest.mark.parametrize("how", ["in place", "anew"])
def test_what_a_forward_pass_counts_is_as_before(how: str) -> None:
    class Counting(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(3, 8, 3))
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, images: Tensor) -> Tensor:
            if how == "in place":
                self.passes += 1
            else:
                self.passes = self.passes + 1
            return super().forward(images)

    model = Counting().eval()
    before = model.passes
    find_sites(model, IMAGES)
    assert model.passes is before and before == 0


def test_no_hook_stays_when_the_forward_raises() -> None:
    model = build("test_resnet")
    before = hooks_of(model)
    with pytest.raises(RuntimeError, match="channels"):
        find_sites(model, noise_images(2)[:, :1])
    assert hooks_of(model) == before
    assert len(find_sites(model, IMAGES)) == 15  # and nothing is left over in torch either


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, LAYERS)
