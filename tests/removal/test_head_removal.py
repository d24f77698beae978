"""Silent attention heads are removed, and nothing changes; or they stay, with a reason."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.criteria import Arbitrary
from helpers.images import generator
from helpers.states import assert_same_state, state_of
from nnprune_backdoor import CleanData, load_purified, purify, save_purified
from nnprune_backdoor.core.masks import silence_
from nnprune_backdoor.core.scores import ChannelScores, Selection
from nnprune_backdoor.core.sites import Neuron, Site, find_sites
from nnprune_backdoor.errors import DataError, UnsupportedModelError
from nnprune_backdoor.files import read_record
from nnprune_backdoor.removal import Cut, Recipe, RemovalReport, compact
from nnprune_backdoor.removal.heads import LAST_HEAD, NOT_SILENT
from nnprune_backdoor.removal.recipe import compose
from nnprune_backdoor.selectors import LowestCount

TINY: dict[str, Any] = {
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 4,
    "img_size": 32,
    "patch_size": 8,
}
WINDOWS: dict[str, Any] = {"embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4), "img_size": 32}

LEVIT: dict[str, Any] = {
    "embed_dim": (16, 24),
    "key_dim": 4,
    "depth": (1, 1),
    "num_heads": (2, 4),
    "img_size": 64,
}

# case -> timm name, settings
REMOVED: dict[str, tuple[str, dict[str, Any]]] = {
    "timm Attention": ("vit_tiny_patch16_224", TINY),
    "with a norm of queries and keys": ("vit_tiny_patch16_224", {**TINY, "qk_norm": True}),
    "CLIP": ("vit_base_patch16_clip_224", TINY),
    "BEiT": ("beit_base_patch16_224", TINY),
    "EVA": ("eva02_tiny_patch14_224", {**TINY, "embed_dim": 48}),
    "DINOv3": ("vit_small_patch16_dinov3", {**TINY, "embed_dim": 48}),
    "SwinV2": ("swinv2_tiny_window8_256", {**WINDOWS, "window_size": 4}),
    "Swin": ("swin_tiny_patch4_window7_224", {**WINDOWS, "window_size": 4}),
    "MobileViT": ("mobilevit_xxs", {}),
    "LeViT": ("levit_128s", LEVIT),
    "LeViT of convolutions": ("levit_conv_128s", LEVIT),
}
SLOW = ("MobileViT",)
# of these the reason is given
SILENCED: dict[str, tuple[str, dict[str, Any], str]] = {
    "talking heads": ("cait_xxs24_224", TINY, "does not run"),
    "heads in groups of a convolution": ("efficientvit_b0", {}, "would not fit itself"),
}


def tiny(name: str, settings: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    """A network in which every layer matters, and images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=5, **settings).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim <= 1 or parameter.min() == parameter.max():
                parameter.add_(0.3 * torch.randn(parameter.shape))
            elif parameter.std() > 0:  # so that heads differ, and matter
                parameter.div_(parameter.std() * parameter[0].numel() ** 0.5)
    # of 64 pixels MobileViT's last attention sees a single token, so its queries tell nothing
    size = settings.get("img_size", 128 if "mobilevit" in name else 64)
    return model, torch.randn(4, 3, size, size, generator=generator(1))


def some_heads(sites: tuple[Site, ...], every: int = 2) -> Selection:
    """Every other head, never all of a site; and of other sites a neuron each."""
    neurons = []
    for site in sites:
        if site.kind == "heads":
            neurons += [Neuron(site.name, h) for h in range(0, site.channels - 1, every)]
        elif site.channels > 1:
            neurons.append(Neuron(site.name, site.channels // 2))
    return Selection(sites, tuple(neurons))


def cut(model: nn.Module, images: Tensor, selection: Selection) -> tuple[nn.Module, RemovalReport]:
    """Silence in place, compact, and check that nothing else changed."""
    with torch.no_grad():
        loud = model(images)
        silence_(model, selection)
        wanted = model(images)
    if len(selection):
        assert (loud - wanted).abs().max() > 1e-3 * wanted.abs().max()
    before = state_of(model)
    smaller, report = compact(model, selection, images)
    assert_same_state(before, state_of(model))
    with torch.no_grad():
        got = smaller(images)
        assert torch.equal(model(images), wanted)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert sorted([*report.removed, *report.silenced]) == sorted(selection.neurons)
    return smaller, report


def numbers_of_heads(model: nn.Module) -> list[int]:
    attention = [m for m in model.modules() if hasattr(m, "qkv") or hasattr(m, "kv")]
    return [module.num_heads for module in attention]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in REMOVED]
)
def test_heads_are_removed_and_nothing_changes(case: str, fused: bool) -> None:
    model, images = tiny(*REMOVED[case])
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    before, scales = numbers_of_heads(model), scales_of(model)
    selection = some_heads(find_sites(model, images[:2]))
    with_heads = {site.name for site in selection.sites if site.kind == "heads"}
    heads = {neuron for neuron in selection.neurons if neuron.site in with_heads}
    smaller, report = cut(model, images, selection)
    assert heads <= set(report.removed)
    after = numbers_of_heads(smaller)
    assert sum(before) - sum(after) == len(heads) > 0
    assert all(0 < new < old for new, old in zip(after, before, strict=True))
    assert scales_of(smaller) == scales
    assert report.after.parameters < report.before.parameters
    # the same cut of the architecture, from plain data
    recipe = Recipe.from_dict(json.loads(json.dumps(report.recipe.to_dict())))
    rebuilt = recipe.apply_(tiny(*REMOVED[case])[0])
    rebuilt.load_state_dict(smaller.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(images), smaller(images), rtol=1e-5, atol=1e-6)


def scales_of(model: nn.Module) -> list[float]:
    return [m.scale for m in model.modules() if isinstance(getattr(m, "scale", None), float)]


@pytest.mark.parametrize(
    "case",
    ["talking heads", pytest.param("heads in groups of a convolution", marks=pytest.mark.slow)],
)
def test_heads_that_cannot_go_stay_silent_with_the_reason(case: str) -> None:
    name, settings, why = SILENCED[case]
    model, images = tiny(name, settings)
    sites = find_sites(model, images[:2])
    with_heads = [site.name for site in sites if site.kind == "heads"]
    heads = tuple(n for n in some_heads(sites).neurons if n.site in with_heads)
    heads = tuple(n for n in heads if "token_only" not in n.site)
    _, report = cut(model, images, Selection(sites, heads))
    assert not report.removed
    assert not report.recipe
    assert all(why in reason for reason in report.silenced.values())


def test_attention_of_which_all_heads_are_silent_keeps_one() -> None:
    model, images = tiny(*REMOVED["timm Attention"])
    sites = find_sites(model, images[:2])
    every = tuple(Neuron("blocks.0.attn.proj", head) for head in range(4))
    smaller, report = cut(model, images, Selection(sites, every))
    assert report.silenced == {every[-1]: LAST_HEAD}
    assert numbers_of_heads(smaller) == [1, 4]
    assert smaller.blocks[0].attn.qkv.out_features == 3 * 6


def test_a_head_that_is_not_silent_stays() -> None:
    model, images = tiny(*REMOVED["timm Attention"])
    sites = find_sites(model, images[:2])
    loud, silent = Neuron("blocks.0.attn.proj", 1), Neuron("blocks.0.attn.proj", 2)
    silence_(model, Selection(sites, (silent,)))
    smaller, report = compact(model, Selection(sites, (loud, silent)), images)
    assert report.removed == (silent,)
    assert report.silenced == {loud: NOT_SILENT}
    with torch.no_grad():
        torch.testing.assert_close(smaller(images), model(images))


@given(heads=st.sets(st.tuples(st.integers(0, 1), st.integers(0, 3))))
@settings(max_examples=5, deadline=None)
def test_any_heads_are_removed_but_the_last_ones(heads: set[tuple[int, int]]) -> None:
    model, images = tiny(*REMOVED["timm Attention"])
    sites = find_sites(model, images[:2])
    neurons = tuple(Neuron(f"blocks.{block}.attn.proj", head) for block, head in sorted(heads))
    smaller, report = cut(model, images, Selection(sites, neurons))
    left = [4 - len({h for b, h in heads if b == block}) for block in (0, 1)]
    assert numbers_of_heads(smaller) == [max(1, number) for number in left]
    assert len(report.silenced) == left.count(0)


def test_position_biases_that_were_kept_from_a_pass_are_computed_anew() -> None:
    model, images = tiny(*REMOVED["LeViT"])
    selection = some_heads(find_sites(model, images[:2]))
    silence_(model, selection)
    model(images)
    assert all(m.attention_bias_cache for m in model.modules() if hasattr(m, "attention_biases"))
    smaller, _ = compact(model, selection, images)
    assert torch.allclose(smaller(images), model(images), rtol=1e-4, atol=1e-5)
    assert all(m.attention_bias_cache for m in model.modules() if hasattr(m, "attention_biases"))


# --- attention that takes the width of its heads from its input --------------------------------


class OfInput(nn.Module):
    """As written in many networks: the channels of a head, and of all, from the input's width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


@pytest.fixture
def inferring() -> tuple[nn.Module, Tensor]:
    """A small network with such attention, one of whose heads was removed, and images."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attention = nn.Conv2d(3, 12, 8, 8), OfInput(12, 3)
            self.hidden, self.fc = nn.Linear(12, 8), nn.Linear(8, 5)

        def forward(self, images: Tensor) -> Tensor:
            x = self.embed(images).flatten(2).transpose(1, 2)
            return self.fc(self.hidden((x + self.attention(x)).mean(1)).relu())

    torch.manual_seed(0)
    model, images = Net().eval(), torch.randn(4, 3, 32, 32)
    gone = Selection(find_sites(model, images), (Neuron("attention.proj", 1),))
    smaller, report = cut(model, images, gone)
    assert report.removed == gone.neurons
    assert report.recipe.layers["attention"].inferred
    return smaller, images


@pytest.mark.filterwarnings("ignore")  # of the tracer
def test_it_runs_with_fewer_heads_and_stays_a_plain_module(
    inferring: tuple[nn.Module, Tensor],
) -> None:
    model, images = inferring
    attention = model.attention
    assert isinstance(attention, OfInput)
    assert type(attention).__name__ == "OfInput"
    assert (attention.num_heads, attention.qkv.out_features) == (2, 24)
    with torch.no_grad():
        wanted = model(images)
        assert torch.equal(copy.deepcopy(model)(images), wanted)
        attention_again = pickle.loads(pickle.dumps(attention))
        x = torch.randn(2, 16, 12)
        assert torch.equal(attention_again(x), attention(x))
        assert torch.equal(torch.jit.trace(model, images)(images), wanted)
    model(images).sum().backward()
    assert attention.qkv.weight.grad is not None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_it_can_be_exported_and_compiled(inferring: tuple[nn.Module, Tensor]) -> None:
    model, images = inferring
    with torch.no_grad():
        wanted = model(images)
        batch = torch.export.Dim("batch", min=1, max=64)
        for strict in (False, True):
            program = torch.export.export(
                model, (images,), dynamic_shapes=({0: batch},), strict=strict
            )
            assert torch.equal(program.module()(images), wanted)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(images), wanted)


@pytest.mark.parametrize("entry", [1, "true", None])
def test_a_recipe_with_another_entry_than_true_or_false_is_refused(entry: object) -> None:
    data = {"a": {"kept": {}, "attributes": {}, "constants": {}, "inferred": entry}}
    with pytest.raises(DataError, match="expected inferred to be true or false"):
        Recipe.from_dict(data)
    del data["a"]["inferred"]
    assert Recipe.from_dict(data) == Recipe({"a": Cut()})  # as in records of format 1


class HeadsFirst(Arbitrary):
    """The first head of each attention before all other neurons."""

    def score(self, model, clean, sites, generator, progress):  # type: ignore[no-untyped-def]
        parts = [torch.ones(site.channels) for site in sites]
        for site, part in zip(sites, parts, strict=True):
            part[0] = float(site.kind != "heads")
        return ChannelScores(sites, torch.cat(parts), "heads first")


@pytest.mark.parametrize("case", ["timm Attention", "BEiT"])
def test_a_purified_model_without_some_heads_is_saved_and_loaded(case: str, tmp_path: Path) -> None:
    name, settings = REMOVED[case]
    model, _ = tiny(name, settings)
    images = torch.randn(12, 3, 32, 32, generator=generator(2))
    chosen = {"selector": LowestCount(2), "repair": "none", "progress": False}
    result = purify(model, CleanData(images), HeadsFirst(), **chosen)
    assert numbers_of_heads(result.model) == [3, 3]
    rows = {row["layer"]: row for row in result.to_dict()["layers"] if row["kind"] == "heads"}
    assert [(row["channels"], row["removed"]) for row in rows.values()] == [(4, 1), (4, 1)]
    save_purified(result, tmp_path / "out", arch=name, model_args=settings)
    silenced = read_record(tmp_path / "out")["silenced"]
    assert silenced == {layer: [0] for layer in rows}
    loaded = load_purified(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(images), result.model(images))


# --- recipes -----------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_two_recipes_make_one(data: st.DataObject) -> None:
    """Applying the composed recipe is applying the first, and then the second."""

    def draw(layer: nn.Linear) -> Cut:
        def some(size: int) -> tuple[int, ...]:
            return tuple(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))))

        rows, columns = some(layer.out_features), some(layer.in_features)
        kept: dict[str, dict[int, tuple[int, ...]]] = {}
        attributes, constants = {}, {}
        if data.draw(st.booleans()):
            kept = {"weight": {0: rows}, "bias": {0: rows}}
            attributes["out_features"] = len(rows)
        if data.draw(st.booleans()):
            kept.setdefault("weight", {})[1] = columns
            attributes["in_features"] = len(columns)
            gone = sorted(set(range(layer.in_features)) - set(columns))
            constants = dict.fromkeys(gone[:2], 0.5)
        return Cut(kept, attributes, constants)

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5)).double()

    first = Recipe({"0": draw(network()[0])})
    model = first.apply_(network())
    second = Recipe({"0": draw(model[0])})
    wanted = second.apply_(model)[0]
    got = compose(first, second).apply_(network())[0]
    assert (got.in_features, got.out_features) == (wanted.in_features, wanted.out_features)
    torch.testing.assert_close(got.weight, wanted.weight)
    torch.testing.assert_close(got.bias, wanted.bias)


def test_recipes_of_two_cuts_are_one() -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 3))

    def recipe(out: list[int], inputs: list[int], constants: dict[str, float]) -> Recipe:
        kept = {"weight": {"0": out}}
        first = {"kept": kept, "attributes": {"out_features": len(out)}, "constants": {}}
        second = {"kept": {"weight": {"1": inputs}}, "attributes": {"in_features": len(inputs)}}
        return Recipe.from_dict({"0": first, "2": {**second, "constants": constants}})

    first, second = recipe([0, 2, 3], [0, 2, 3], {"1": 0.5}), recipe([1, 2], [1, 2], {"0": 2.0})
    images = torch.randn(7, 5)
    twice, once = second.apply_(first.apply_(network())), compose(first, second).apply_(network())
    torch.testing.assert_close(once(images), twice(images))
    assert once[2].in_features == 2 and once[0].out_features == 2
    assert compose(Recipe(), second) == second and compose(first, Recipe()) == first


def test_nothing_of_two_cuts_of_one_layer_is_lost() -> None:
    """Purified twice, a network has what both times did to it."""
    kept = {"weight": {0: (1, 2, 4)}}
    first = Recipe({"attn": Cut(kept, {}, {}, inferred=True, filled={0: 2.0}, unread=(0,))})
    second = Recipe({"attn": Cut({"weight": {0: (0, 2)}}, filled={1: 3.0}, unread=(1,))})
    (cut,) = compose(first, second).layers.values()
    assert cut.kept == {"weight": {0: (1, 4)}} and cut.inferred
    assert cut.filled == {0: 2.0, 2: 3.0} and cut.unread == (0, 2)


def test_a_recipe_may_only_lower_the_number_of_heads() -> None:
    model, _ = tiny(*REMOVED["timm Attention"])
    for value in (5, 400):
        more = Recipe({"blocks.0.attn": Cut(attributes={"num_heads": value})})
        with pytest.raises(UnsupportedModelError, match="would not fit itself"):
            more.apply_(model)
    with pytest.raises(DataError, match="expected a width of"):
        Recipe.from_dict(
            {"blocks.0.attn": {"kept": {}, "attributes": {"scale": 2}, "constants": {}}}
        )
