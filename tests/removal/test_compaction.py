"""Removal changes nothing: on real architectures, and on small networks whose answer is known."""

from __future__ import annotations

import copy
import json
import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.images import generator, noise_images
from helpers.networks import SMALL, build
from helpers.states import assert_same_state, hooks_of, state_of
from nnprune_backdoor.core.drift import logit_drift
from nnprune_backdoor.core.masks import Silencing, silence_
from nnprune_backdoor.core.scores import Selection, neurons_of
from nnprune_backdoor.core.sites import Neuron, Site, find_sites
from nnprune_backdoor.errors import DataError, UnsupportedModelError
from nnprune_backdoor.removal import Recipe, RemovalReport, compact, compaction
from nnprune_backdoor.removal.compaction import (
    COUPLED,
    NOT_SILENT,
    _Comparison,
    allowed_drift,
)
from nnprune_backdoor.removal.liveness import Removable
from nnprune_backdoor.removal.narrowing import LAST, MIXED, ROUNDED, UNEVEN
from nnprune_backdoor.removal.probing import OutOfTime, ProbedNetwork
from nnprune_backdoor.removal.report import Size

IMAGES = noise_images(8)


def chosen(sites: tuple[Site, ...], share: float, seed: int = 0) -> Selection:
    """A random share of the neurons, at least one; no site loses all."""
    neurons = neurons_of(sites)
    order = torch.randperm(len(neurons), generator=generator(seed)).tolist()
    left = {site.name: site.channels for site in sites}
    picked = []
    for index in order[: max(1, round(share * len(neurons)))]:
        if left[neurons[index].site] > 1:
            left[neurons[index].site] -= 1
            picked.append(neurons[index])
    return Selection(sites, tuple(picked))


def silenced(
    model: nn.Module, selection: Selection, silencing: Silencing = "zero"
) -> tuple[nn.Module, Tensor]:
    """A silenced copy and its logits."""
    product = copy.deepcopy(model)
    silence_(product, selection, silencing=silencing)
    with torch.no_grad():
        return product, product(IMAGES)


def drift(model: nn.Module, wanted: Tensor) -> float:
    with torch.no_grad():
        got = model(IMAGES)
    return float((got - wanted).abs().max() / wanted.abs().max())


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- real architectures ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("silencing", ["zero", "constant"])
def test_the_smaller_model_computes_what_the_silenced_one_does(
    any_model: nn.Module, silencing: Silencing
) -> None:
    sites = find_sites(any_model, IMAGES[:2])
    selection = chosen(sites, 0.1)
    product, wanted = silenced(any_model, selection, silencing)
    before, hooks = state_of(product), hooks_of(product)
    smaller, report = compact(product, selection, IMAGES)
    assert_same_state(before, state_of(product))
    assert hooks_of(product) == hooks
    assert drift(smaller, wanted) <= 1e-4
    assert report.drift <= 1e-4
    assert sorted([*report.removed, *report.silenced]) == sorted(selection.neurons)
    assert parameters(smaller) == report.after.parameters <= report.before.parameters
    assert (parameters(smaller) < parameters(product)) == bool(report.removed)
    if silencing == "zero":
        assert report.removed
        assert report.after.macs < report.before.macs


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_rebuilds_and_replays(name: str) -> None:
    model = build(name)
    selection = chosen(find_sites(model, IMAGES[:2]), 0.1, seed=1)
    product, _ = silenced(model, selection)
    smaller, report = compact(product, selection, IMAGES)
    recipe = Recipe.from_dict(json.loads(json.dumps(report.recipe.to_dict())))
    assert recipe == report.recipe
    with torch.no_grad():
        wanted = smaller(IMAGES)
        # a fresh network of the original architecture, then the weights of the smaller one
        rebuilt = recipe.apply_(build(name))
        rebuilt.load_state_dict(smaller.state_dict())
        assert torch.equal(rebuilt(IMAGES), wanted)
        # the original weights, silenced again and cut again
        replayed, _ = silenced(model, selection)
        assert torch.equal(recipe.apply_(replayed)(IMAGES), wanted)


@pytest.mark.slow
@given(seed=st.integers(0, 10_000), share=st.floats(0.0, 0.6))
@settings(max_examples=15, deadline=None)
def test_any_selection_is_removed_rightly_or_kept(seed: int, share: float) -> None:
    model = build("test_efficientnet")
    selection = chosen(find_sites(model, IMAGES[:2]), share, seed)
    product, wanted = silenced(model, selection)
    smaller, report = compact(product, selection, IMAGES)
    assert drift(smaller, wanted) <= 1e-4
    assert len(report.removed) + len(report.silenced) == len(selection)


def test_half_precision_is_handled() -> None:
    model = build("test_resnet").bfloat16()
    selection = chosen(find_sites(model, IMAGES[:2].bfloat16()), 0.1)
    silence_(model, selection)
    smaller, report = compact(model, selection, IMAGES.bfloat16())
    assert report.removed
    assert {tensor.dtype for tensor in smaller.parameters()} == {torch.bfloat16}


def test_modes_and_flags_are_the_models_own() -> None:
    model = build("test_resnet").train()
    first = next(model.parameters()).requires_grad_(False)
    selection = chosen(find_sites(copy.deepcopy(model).eval(), IMAGES[:2]), 0.1)
    silence_(model, selection)
    smaller, report = compact(model, selection, IMAGES)
    assert report.removed
    assert model.training
    assert smaller.training
    assert not first.requires_grad
    flags = [parameter.requires_grad for parameter in model.parameters()]
    assert flags == [parameter.requires_grad for parameter in smaller.parameters()]
    assert all(module.training for module in smaller.modules())


# --- small networks whose answer is known ------------------------------------------------------


class Net(nn.Module):
    """Layers by name; the forward pass is the test's."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.head = nn.LazyLinear(4)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, generator=generator(3))
                nn.init.normal_(module.bias, generator=generator(4))


def cut(model: nn.Module, silencing: Silencing = "zero", **channels: list[int]) -> RemovalReport:
    """Silence some channels of some layers, compact, check that nothing changed."""
    selection = prepared(model, channels)
    product, wanted = silenced(model, selection, silencing)
    smaller, report = compact(product, selection, IMAGES)
    assert drift(smaller, wanted) <= 1e-4
    assert sorted([*report.removed, *report.silenced]) == sorted(selection.neurons)
    assert set(report.filled) <= set(report.removed)
    return report


def prepared(model: nn.Module, channels: dict[str, list[int]]) -> Selection:
    """These channels of these layers of a model that is in eval mode from now on."""
    torch.manual_seed(0)
    model.eval()
    with torch.no_grad():
        model(IMAGES)  # lazy layers take their shape
    sites = tuple(_site(model, name) for name in channels)
    return Selection(sites, tuple(Neuron(n, c) for n, some in channels.items() for c in some))


def filled(report: RemovalReport, layer: str) -> list[int]:
    """Outputs of a layer that a constant stands for."""
    return sorted(report.recipe.layers[layer].filled)


def _site(model: nn.Module, name: str) -> Site:
    """`bn1` stands for `conv1`; anything else for itself."""
    layer = model.get_submodule(name)
    widths = ("num_features", "num_channels", "out_channels")
    width = next((getattr(layer, name) for name in widths if hasattr(layer, name)), None)
    if name.startswith("bn"):
        return Site(name, int(width or 0), "norm", name.replace("bn", "conv"))
    return Site(name, int(width or getattr(layer, "out_features", 0)), "layer", name)


def kept(report: RemovalReport, layer: str, tensor: str = "weight") -> dict[int, list[int]]:
    entry = report.recipe.layers[layer].kept[tensor]
    return {side: list(indices) for side, indices in entry.items()}


class Chain(Net):
    def __init__(self) -> None:
        super().__init__(
            conv1=nn.Conv2d(3, 6, 3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(6),
            conv2=nn.Conv2d(6, 5, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(self.bn1(self.conv1(x)).relu()).relu().mean((2, 3)))


def test_a_private_channel_goes_from_every_tensor() -> None:
    report = cut(Chain(), bn1=[4, 1])
    assert set(report.removed) == {Neuron("bn1", 1), Neuron("bn1", 4)}
    stay = [0, 2, 3, 5]
    assert kept(report, "conv1") == {0: stay}
    assert kept(report, "conv2") == {1: stay}
    for tensor in ("weight", "bias", "running_mean", "running_var"):
        assert kept(report, "bn1", tensor) == {0: stay}
    assert report.recipe.layers["conv1"].attributes == {"out_channels": 4}
    assert report.recipe.layers["bn1"].attributes == {"num_features": 4}
    assert report.channels == 2


def test_a_layer_keeps_its_last_channel() -> None:
    report = cut(Chain(), bn1=list(range(6)))
    assert len(report.removed) == 5
    assert report.silenced == {Neuron("bn1", 0): LAST}
    assert Recipe.from_dict(report.recipe.to_dict()) == report.recipe


def test_a_constant_goes_into_the_bias_unless_the_layer_pads() -> None:
    folded = cut(Chain(), "constant", bn1=[0, 2])  # conv2 does not pad
    assert len(folded.removed) == 2
    assert folded.recipe.layers["conv2"].constants
    model = Chain()
    model.conv2 = nn.Conv2d(6, 5, 3, padding=1)
    padded = cut(model, "constant", bn1=[0, 2])
    with torch.no_grad():
        silent = [c for c in (0, 2) if float(model.bn1.bias[c]) <= 0]  # relu makes zero of it
    assert filled(padded, "bn1") == [channel for channel in (0, 2) if channel not in silent]
    assert len(silent) < 2
    assert not padded.silenced


def test_a_bias_is_made_where_there_was_none() -> None:
    model = Chain()
    model.conv2 = nn.Conv2d(6, 5, 3, bias=False)
    model.bn1.bias.data.fill_(0.5)
    report = cut(model, "constant", bn1=[3], conv2=[1])
    assert Neuron("bn1", 3) in report.removed
    fresh = Chain()
    fresh.conv2 = nn.Conv2d(6, 5, 3, bias=False)
    with torch.no_grad():
        fresh(IMAGES)
    assert report.recipe.apply_(fresh).conv2.bias is not None


class Residual(Net):
    def __init__(self) -> None:
        super().__init__(
            conv1=nn.Conv2d(3, 6, 3, padding=1),
            conv2=nn.Conv2d(6, 6, 3, padding=1),
            bn2=nn.BatchNorm2d(6),
            conv3=nn.Conv2d(6, 5, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = x + self.bn2(self.conv2(x.relu()))
        return self.head(self.conv3(x.relu()).relu().mean((2, 3)))


def test_a_coupled_channel_leaves_a_constant_unless_all_that_is_added_is_silent() -> None:
    model = Residual()
    report = cut(model, bn2=[1, 2], conv1=[2, 3])
    assert not report.silenced
    assert set(report.filled) == {Neuron("bn2", 1), Neuron("conv1", 3)}
    assert kept(report, "conv3") == {1: [0, 1, 3, 4, 5]}
    assert kept(report, "conv2")[0] == kept(report, "bn2")[0] == [0, 3, 4, 5]
    assert "2 of the removed left a constant in their place" in str(report)
    product, _ = silenced(model, selection := Selection((_site(model, "bn2"),), report.filled[:1]))
    smaller, without = compact(product, selection, IMAGES, fill=False)
    assert without.silenced == {Neuron("bn2", 1): COUPLED}
    assert parameters(smaller) == parameters(product)


def test_whole_groups_go_on_request() -> None:
    model = Residual()
    report = cut(model, bn2=[1, 2])
    assert report.filled == report.removed
    sites = (_site(model, "bn2"),)
    selection = Selection(sites, (Neuron("bn2", 1), Neuron("bn2", 2)))
    product, wanted = silenced(model, selection)
    smaller, report = compact(product, selection, IMAGES, groups=True)
    assert set(report.removed) == set(selection.neurons)
    assert not report.filled
    for layer in ("conv1", "conv2"):
        assert kept(report, layer)[0] == [0, 3, 4, 5]
    with torch.no_grad():
        assert report.drift == pytest.approx(logit_drift(wanted, smaller(IMAGES)), rel=1e-3)
    assert report.drift > 1e-3  # conv1 was not silent


def test_widths_are_rounded_by_keeping_silent_channels() -> None:
    """Off the residual sum, in it, and where a constant stands for a channel."""
    for model, channels, widths in (
        (Chain(), {"bn1": [0, 3, 4]}, {"conv1": 4}),
        (Residual(), {"conv1": [0, 1, 5], "bn2": [0, 1, 3]}, {"conv1": 4, "conv2": 4}),
        (Residual(), {"bn2": [2]}, {}),
    ):
        selection = prepared(model, channels)
        product, wanted = silenced(model, selection)
        smaller, report = compact(product, selection, IMAGES, round_to=2)
        assert drift(smaller, wanted) <= 1e-4
        cuts = {
            n: c.attributes["out_channels"]
            for n, c in report.recipe.layers.items()
            if "out_channels" in c.attributes
        }
        assert cuts == widths
        assert set(report.silenced.values()) == {ROUNDED}
    with pytest.raises(DataError, match="round_to"):
        compact(product, selection, IMAGES, round_to=0)


class Separable(Net):
    def __init__(self) -> None:
        super().__init__(
            conv1=nn.Conv2d(3, 6, 1, bias=False),
            bn1=nn.BatchNorm2d(6),
            conv2=nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
            bn2=nn.BatchNorm2d(6),
            gate=nn.Conv2d(6, 6, 1),
            conv3=nn.Conv2d(6, 5, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        return self.head(self.conv3(x).mean((2, 3)))


def test_what_serves_a_silent_channel_alone_goes_with_it() -> None:
    report = cut(Separable(), bn2=[0, 3])
    assert len(report.removed) == 2
    stay = [1, 2, 4, 5]
    assert kept(report, "conv1") == {0: stay}  # feeds the silent depthwise channels alone
    assert kept(report, "bn1") == {0: stay}
    assert kept(report, "conv2") == {0: stay}
    assert kept(report, "gate") == {0: stay, 1: stay}  # gates them alone
    assert report.recipe.layers["conv2"].attributes == {
        "in_channels": 4,
        "out_channels": 4,
        "groups": 4,
    }


def test_a_silent_channel_that_becomes_a_constant_behind_a_norm_leaves_a_constant() -> None:
    model = Separable()
    report = cut(model, bn1=[0, 3])
    with torch.no_grad():  # bn2 makes its bias of zero, and relu nothing of a negative one
        nothing = [channel for channel in (0, 3) if model.bn2.bias[channel] <= 0]
    assert filled(report, "bn1") == [channel for channel in (0, 3) if channel not in nothing]
    assert len(nothing) < 2
    assert not report.silenced


class Gated(Net):
    """One layer makes values and gates, as GLU does."""

    def __init__(self) -> None:
        super().__init__(conv1=nn.Conv2d(3, 12, 1), conv2=nn.Conv2d(6, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv1(x).chunk(2, dim=1)
        return self.head(self.conv2(value * gate.sigmoid()).relu().mean((2, 3)))


def test_a_gate_goes_with_its_value_but_no_value_with_its_gate() -> None:
    assert kept(cut(Gated(), conv1=[2]), "conv1") == {0: [0, 1, 3, 4, 5, 6, 7, 9, 10, 11]}
    assert filled(cut(Gated(), conv1=[8]), "conv1") == [8]


class Normed(Net):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__(conv1=nn.Conv2d(3, 6, 1), norm=norm, conv2=nn.Conv2d(6, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv1(x).movedim(1, -1)).movedim(-1, 1)
        return self.head(self.conv2(x).relu().mean((2, 3)))


class GroupNormLast(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), GroupNormLast(2, 6)])
def test_a_channel_that_is_normalised_with_others_leaves_a_constant(norm: nn.Module) -> None:
    report = cut(Normed(norm), conv1=[1, 4])
    assert filled(report, "conv1") == [1, 4]


class GroupNormed(Net):
    """The norm is the site, and its convolution is not silent."""

    def __init__(self) -> None:
        super().__init__(conv1=nn.Conv2d(3, 6, 1), bn1=nn.GroupNorm(3, 6), conv2=nn.Conv2d(6, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(self.bn1(self.conv1(x)).relu()).relu().mean((2, 3)))


def test_a_group_of_channels_leaves_its_norm_as_a_whole() -> None:
    report = cut(GroupNormed(), bn1=[0, 2, 3])
    assert report.silenced == {Neuron("bn1", 0): MIXED}
    assert kept(report, "conv1") == {0: [0, 1, 4, 5]}
    assert report.recipe.layers["bn1"].attributes == {"num_channels": 4, "num_groups": 2}


class Grouped(Net):
    def __init__(self) -> None:
        super().__init__(
            conv1=nn.Conv2d(3, 8, 1),
            conv2=nn.Conv2d(8, 12, 3, groups=4),
            conv3=nn.Conv2d(12, 5, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x).relu()).relu()
        return self.head(self.conv3(x).mean((2, 3)))


def test_groups_stay_of_one_size() -> None:
    uneven = cut(Grouped(), conv1=[0, 3], conv2=[1])
    assert uneven.silenced == {Neuron("conv2", 1): UNEVEN}
    assert filled(uneven, "conv1") == [0, 3]
    alike = cut(Grouped(), conv1=[0, 2, 3, 4, 6], conv2=[1, 4, 7, 10])
    assert filled(alike, "conv1") == [3]
    assert kept(alike, "conv2") == {0: [0, 2, 3, 5, 6, 8, 9, 11], 1: [1]}
    whole = cut(Grouped(), conv1=[2, 3], conv2=[3, 4, 5])
    assert not whole.filled
    assert whole.recipe.layers["conv2"].attributes == {
        "groups": 3,
        "in_channels": 6,
        "out_channels": 9,
    }


def test_as_many_channels_leave_each_group_of_a_convolution() -> None:
    class Added(Grouped):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv2(self.conv1(x).relu())
            return self.head((x + x.mean(1, keepdim=True)).relu().mean((2, 3)))

    report = cut(Added(), conv2=[0, 4, 5, 6, 9, 10])
    assert kept(report, "conv2") == {0: [1, 2, 3, 5, 7, 8, 10, 11]}
    assert report.silenced == {Neuron("conv2", c): UNEVEN for c in (5, 10)}
    assert report.recipe.layers["conv2"].attributes == {"out_channels": 8}


class Joined(Net):
    """Channels side by side, shuffled, then flattened with their places."""

    def __init__(self) -> None:
        super().__init__(one=nn.Conv2d(3, 4, 1), two=nn.Conv2d(3, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.two(x).relu(), self.one(x).relu()], dim=1).flip(1)
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


def test_channels_are_followed_through_concatenation_order_and_flattening() -> None:
    report = cut(Joined(), one=[1], two=[0, 4])
    assert len(report.removed) == 3
    gone = {(8 - place) * 4 + i for place in (0, 4, 5 + 1) for i in range(4)}
    assert kept(report, "head") == {1: [i for i in range(36) if i not in gone]}


class Split(Net):
    """Splits into widths that are written down."""

    def __init__(self) -> None:
        super().__init__(one=nn.Conv2d(3, 6, 1), other=nn.Conv2d(3, 6, 1), conv=nn.Conv2d(9, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.one(x).relu().split([3, 3], dim=1)
        return self.head(self.conv(torch.cat([first - second, self.other(x)], 1)).mean((2, 3)))


def test_a_network_that_counts_its_channels_keeps_constants_in_their_places() -> None:
    report = cut(Split(), one=[1, 4], other=[0])
    assert filled(report, "one") == [1, 4]
    assert kept(report, "other") == {0: [1, 2, 3, 4, 5]}
    assert not filled(report, "other")


class Reshaped(Net):
    """Gives what a norm computes the shape of its input."""

    def __init__(self) -> None:
        super().__init__(conv1=nn.Linear(3, 6), bn1=nn.BatchNorm1d(6), conv2=nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x.flatten(2).transpose(1, 2))
        x = self.bn1(x.flatten(0, 1)).reshape_as(x)
        return self.head(self.conv2(F.layer_norm(x, (6,))).relu().mean(1))


def test_constants_are_put_before_a_norm_that_is_reshaped_by_its_input() -> None:
    report = cut(Reshaped(), bn1=[0, 5])
    assert filled(report, "conv1") == [0, 5]
    assert "bn1" not in report.recipe.layers


class Alone(Net):
    """A depthwise convolution whose channels a norm mixes."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(
            conv0=nn.Conv2d(3, 6, 1),
            conv1=nn.Conv2d(6, 6, 3, padding=1, groups=6),
            bn1=norm,
            conv2=nn.Conv2d(6, 5, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(self.conv0(x).relu()))
        x = F.layer_norm(x.movedim(1, -1), (6,)).movedim(-1, 1)
        return self.head(self.conv2(x).relu().mean((2, 3)))


@pytest.mark.parametrize(("norm", "site"), [(nn.BatchNorm2d(6), "bn1"), (nn.Identity(), "conv1")])
@pytest.mark.parametrize("silencing", ["zero", "constant"])
def test_a_depthwise_convolution_reads_what_it_computes_alone(
    norm: nn.Module, site: str, silencing: Silencing
) -> None:
    report = cut(Alone(norm), silencing, **{site: [1, 2]})
    assert filled(report, site) == [1, 2]
    assert report.recipe.layers["conv1"].unread == (1, 2)
    assert report.recipe.layers["conv1"].attributes == {
        "in_channels": 4,
        "out_channels": 4,
        "groups": 4,
    }


class Standardised(nn.Conv2d):
    """NFNet's: without an input, all weights would be others."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.square().mean((1, 2, 3), keepdim=True) + 1e-6).sqrt()
        return F.conv2d(x, weight, self.bias)


def test_a_standardised_convolution_loses_outputs_but_no_inputs() -> None:
    model = Chain()
    model.conv1, model.bn1, model.conv2 = (
        Standardised(3, 6, 1),
        nn.Identity(),
        Standardised(6, 5, 1),
    )
    report = cut(model, conv1=[1, 4], conv2=[2])
    assert not report.silenced
    assert filled(report, "conv1") == [1, 4]
    assert kept(report, "conv2") == {0: [0, 1, 3, 4]}


class Upsampled(Net):
    def __init__(self) -> None:
        super().__init__(conv1=nn.Conv2d(3, 6, 1), up=nn.ConvTranspose2d(6, 5, 2, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.conv1(x).relu()).relu().mean((2, 3)))


def test_a_transposed_convolution_reads_a_constant() -> None:
    assert filled(cut(Upsampled(), conv1=[0, 3]), "conv1") == [0, 3]


class Branching(Net):
    """Takes another way where the first channel is loud."""

    def __init__(self) -> None:
        super().__init__(conv1=nn.Conv2d(3, 6, 1), conv2=nn.Conv2d(6, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu()
        if x[:, 0].mean() > 0.3:
            x = x * 2
        return self.head(self.conv2(x).mean((2, 3)))


@pytest.mark.parametrize("channel", [0, 3])
def test_a_branch_on_data_does_no_harm(channel: int) -> None:
    cut(Branching(), conv1=[channel])  # which checks that nothing changed


def test_a_slow_model_is_measured_fewer_times() -> None:
    class Slow(Chain):
        runs = 0

        def forward(self, x: Tensor) -> Tensor:
            Slow.runs += 1
            time.sleep(0.6 if len(x) > 1 else 0)
            return super().forward(x)

    assert Size.of(Slow().eval(), IMAGES).latency >= 0.6
    assert Slow.runs == 3  # counting, and twice


# --- faults ------------------------------------------------------------------------------------


def test_an_exception_amid_cutting_leaves_the_silenced_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(self: Recipe, model: nn.Module) -> nn.Module:
        if self:
            model.conv1.weight = nn.Parameter(torch.zeros(1))  # type: ignore[union-attr]
            raise RuntimeError("amid everything")
        return model

    monkeypatch.setattr(Recipe, "apply_", broken)
    report = cut(Chain(), bn1=[1, 2])
    assert not report.removed
    assert all("amid everything" in why for why in report.silenced.values())


def test_a_time_limit_leaves_the_silenced_model() -> None:
    model = build("test_resnet")
    selection = chosen(find_sites(model, IMAGES[:2]), 0.1)
    product, wanted = silenced(model, selection)
    smaller, report = compact(product, selection, IMAGES, seconds=0)
    assert not report.removed
    assert set(report.silenced.values()) == {"not decided within 0 s"}
    assert drift(smaller, wanted) == 0


def test_constants_are_put_in_the_time_that_is_kept_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slow(*_: object) -> Removable:
        raise OutOfTime("not decided within 300 s")

    monkeypatch.setattr(compaction, "find_removable", slow)
    assert filled(cut(Chain(), bn1=[1, 2]), "bn1") == [1, 2]


def test_what_was_settled_in_time_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One part does not work; time is up when the half without it is settled."""
    plain, tried = _Comparison.problem, list[set[str]]()

    def problem(self: _Comparison, channels: Removable, *, any_drift: bool = False) -> str:
        layers = [self.names[module] for module in channels.outputs]
        tried.append(set(layers))
        bad = next(name for name in reversed(whole or layers))
        whole.extend(layers if not whole else [])
        return "not with it" if bad in layers else plain(self, channels, any_drift=any_drift)

    def check_time(self: ProbedNetwork) -> None:
        if len(tried) > 2:
            raise OutOfTime("not decided within 7 s")

    whole: list[str] = []
    monkeypatch.setattr(_Comparison, "problem", problem)
    monkeypatch.setattr(ProbedNetwork, "check_time", check_time)
    model = build("test_resnet")
    selection = chosen(find_sites(model, IMAGES[:2]), 0.1)
    product, wanted = silenced(model, selection)
    smaller, report = compact(product, selection, IMAGES, seconds=7)
    assert report.removed
    assert "not decided within 7 s" in report.silenced.values()
    assert drift(smaller, wanted) <= 1e-5


class Touchy(Chain):
    """Will have nothing to do with NaN."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        hidden = self.conv1(x)
        if hidden.isnan().any():
            raise ValueError("NaN in the input of conv2")
        return logits


def test_a_network_that_refuses_the_analysis_keeps_constants() -> None:
    report = cut(Touchy(), bn1=[1, 2])
    assert filled(report, "bn1") == [1, 2]


def test_a_layer_with_a_forward_of_its_own_is_handled() -> None:
    model = Chain()
    layer = model.get_submodule("conv2")
    layer.forward = lambda x: nn.Conv2d.forward(layer, x) * 2  # type: ignore[method-assign]
    cut(model, bn1=[1, 2])  # which checks that nothing changed


def test_a_compiled_model_is_refused() -> None:
    model = build("test_resnet")
    selection = Selection(find_sites(model, IMAGES[:2]), ())
    with pytest.raises(UnsupportedModelError, match="_orig_mod"):
        compact(torch.compile(model), selection, IMAGES)  # type: ignore[arg-type]


def test_shared_and_computed_weights_are_left_alone() -> None:
    tied = Chain()
    tied.conv3 = nn.Conv2d(3, 6, 3, bias=False)
    tied.conv3.weight = tied.conv1.weight  # the same parameter in two places
    report = cut(tied, bn1=[1])
    assert "shares 'weight'" in report.silenced[Neuron("bn1", 1)]
    computed = Chain()
    nn.utils.parametrizations.weight_norm(computed.conv1)
    report = cut(computed, bn1=[1])
    assert "no plain 'weight'" in report.silenced[Neuron("bn1", 1)]


def test_nothing_selected_nothing_removed() -> None:
    model = build("test_resnet")
    smaller, report = compact(model, Selection(find_sites(model, IMAGES[:2]), ()), IMAGES)
    assert_same_state(state_of(model), state_of(smaller))
    assert not report.removed
    assert not report.recipe


def test_bad_input_is_refused() -> None:
    model = build("test_resnet")
    selection = Selection(find_sites(model, IMAGES[:2]), ())
    with pytest.raises(DataError, match="two images"):
        compact(model, selection, IMAGES[:1])
    with pytest.raises(UnsupportedModelError, match="DataParallel"):
        compact(nn.DataParallel(model), selection, IMAGES)
    with pytest.raises(UnsupportedModelError, match="does not have"):
        Recipe.from_dict({"nowhere": {"kept": {}, "attributes": {}, "constants": {}}}).apply_(model)


@pytest.mark.parametrize(
    "entry",
    [
        {"kept": {"weight": {"0": [1, 0]}}, "attributes": {}, "constants": {}},
        {"kept": {"weight": {"0": []}}, "attributes": {}, "constants": {}},
        {"kept": {"weight": {"0": [-1]}}, "attributes": {}, "constants": {}},
        {"kept": {}, "attributes": {"forward": 3}, "constants": {}},
        {"kept": {}, "attributes": {"groups": "3"}, "constants": {}},
        {"kept": {"weight": {"-1": [0]}}, "attributes": {}, "constants": {}},
        {"kept": {}, "attributes": {}, "constants": {"-1": 1.0}},
        {"kept": {}, "attributes": {}, "constants": {"0": float("nan")}},
        {"kept": {}, "attributes": {}, "constants": {"0": 10**400}},
        {"kept": {}, "attributes": {}, "constants": {"0": True}},
        {"kept": {}, "attributes": {}, "constants": {"0": "1.0"}},
        {"kept": {}, "attributes": {}, "constants": {"0": 1.0, "00": 2.0}},
        {"kept": {"weight": {"0": [0], "00": [1]}}, "attributes": {}, "constants": {}},
        {"kept": {"weight": {"0": [True]}}, "attributes": {}, "constants": {}},
        {"kept": {"weight": {"0": [10**400]}}, "attributes": {"groups": 10**400}, "constants": {}},
        {"kept": {}, "attributes": {"groups": True}, "constants": {}},
        {"kept": {}, "attributes": {"groups": 7.0}, "constants": {}},
        {"kept": {}, "attributes": {}},
        "weights",
    ],
)
def test_a_malformed_recipe_is_refused(entry: object) -> None:
    with pytest.raises(DataError, match="malformed"):
        Recipe.from_dict({"conv1": entry})


@pytest.mark.parametrize(
    ("layer", "attributes", "kept"),
    [
        ("conv1", {"groups": 7}, {}),
        ("conv1", {"groups": 3}, {}),
        ("conv1", {"out_channels": 4}, {"weight": {"0": [0, 1, 2]}}),
        ("conv1", {}, {"weight": {"0": [0, 1, 2]}}),
        ("conv1", {"in_channels": 2}, {}),
        ("conv1", {"num_features": 2}, {}),
        ("bn1", {"num_features": 2}, {}),
        ("bn1", {"num_features": 2}, {"weight": {"0": [0, 1]}, "bias": {"0": [0, 1]}}),
        ("bn1", {"groups": 2}, {}),
        ("head", {"in_features": 2}, {}),
        ("head", {"out_features": 10**9}, {}),
        ("", {"groups": 2}, {}),
    ],
)
def test_a_recipe_whose_widths_are_not_those_of_the_tensors_is_refused(
    layer: str, attributes: dict[str, int], kept: dict[str, dict[str, list[int]]]
) -> None:
    model = Chain()
    with torch.no_grad():
        model(IMAGES)
    before, shown = state_of(model), repr(model)
    entry = {"kept": kept, "attributes": attributes, "constants": {}}
    with pytest.raises(UnsupportedModelError, match="would not fit itself"):
        Recipe.from_dict({layer: entry}).apply_(model)
    assert_same_state(before, state_of(model))
    assert repr(model) == shown


@pytest.mark.parametrize(
    "later",
    [
        {"kept": {}, "attributes": {}, "constants": {"6": 1.0}},  # conv2 has six inputs
        {
            "kept": {"bias": {"0": [5]}},
            "attributes": {},
            "constants": {"0": 1.0},
        },  # and five outputs
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_nothing_is_cut_by_a_recipe_whose_later_entry_does_not_fit(
    later: dict[str, object], bias: bool
) -> None:
    model = Chain()
    model.conv2 = nn.Conv2d(6, 5, 3, bias=bias)
    with torch.no_grad():
        model(IMAGES)
    before = state_of(model)
    first = {"kept": {"weight": {"0": [0]}}, "attributes": {"out_channels": 1}, "constants": {}}
    with pytest.raises(UnsupportedModelError, match="too small"):
        Recipe.from_dict({"conv1": first, "conv2": later}).apply_(model)
    assert_same_state(before, state_of(model))
    norm = {"kept": {}, "attributes": {}, "constants": {"0": 1.0}}
    with pytest.raises(UnsupportedModelError, match="into its bias"):
        Recipe.from_dict({"conv1": first, "bn1": norm}).apply_(model)
    assert_same_state(before, state_of(model))


def test_a_recipe_for_another_width_is_refused_before_anything_is_cut() -> None:
    report = cut(Chain(), bn1=[1])
    other = Chain()
    other.bn1 = nn.BatchNorm2d(3)
    with torch.no_grad():
        other.conv1 = nn.Conv2d(3, 3, 3)
        other.conv2 = nn.Conv2d(3, 5, 3)
        other(IMAGES)
    before = state_of(other)
    with pytest.raises(UnsupportedModelError, match="too small"):
        report.recipe.apply_(other)
    assert_same_state(before, state_of(other))


# --- honest reports ----------------------------------------------------------------------------


class Depthwise(Net):
    def __init__(self) -> None:
        super().__init__(
            conv1=nn.Conv2d(3, 6, 3, padding=1),
            conv2=nn.Conv2d(6, 6, 3, padding=1, groups=6),
            bn2=nn.BatchNorm2d(6),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn2(self.conv2(self.conv1(x))).relu().mean((2, 3)))


def test_channels_that_serve_a_removed_one_alone_are_its_own() -> None:
    report = cut(Depthwise(), bn2=[1, 5])
    assert (len(report.removed), report.channels) == (2, 2)


def test_neurons_that_are_not_silent_are_called_so() -> None:
    model = Chain().eval()
    with torch.no_grad():
        model(IMAGES)
        model.bn1.weight[2] = model.bn1.bias[2] = 0
    selection = Selection((_site(model, "bn1"),), (Neuron("bn1", 1), Neuron("bn1", 2)))
    _, report = compact(model, selection, IMAGES)
    assert report.removed == (Neuron("bn1", 2),)
    assert report.silenced == {Neuron("bn1", 1): NOT_SILENT}


def test_double_precision_is_held_to_the_same_tolerance_as_single() -> None:
    assert allowed_drift(torch.float64) == allowed_drift(torch.float32) == 1e-4
    assert allowed_drift(torch.bfloat16) == allowed_drift(torch.float16) == 1e-2


@pytest.mark.parametrize("history", ["gradient", "inference", "both"])
def test_images_with_a_history_are_taken(history: str) -> None:
    model = Chain().eval()
    with torch.no_grad():
        model(IMAGES)
    selection = Selection((_site(model, "bn1"),), (Neuron("bn1", 1),))
    silence_(model, selection)
    with torch.inference_mode(history != "gradient"):
        images = IMAGES.clone().requires_grad_(history != "inference")
    _, report = compact(model, selection, images)
    assert report.removed
    with torch.inference_mode():  # and in it
        smaller, _ = compact(model, selection, images)
    assert not any(weight.is_inference() for weight in smaller.parameters())
