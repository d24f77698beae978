"""Scores in Torch-Pruning's pruners: what is asked for goes, from the original channels meant."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import pytest
import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn

from helpers.graphs import EXAMPLE, describe, marks, narrow
from helpers.images import generator, noise_images
from helpers.networks import build
from nnprune_backdoor import CleanData, Criterion, register_criterion
from nnprune_backdoor import importance as importances
from nnprune_backdoor.core.scores import ChannelScores
from nnprune_backdoor.core.sites import Site, find_sites
from nnprune_backdoor.criteria import RNP, Response, Unlearning, base
from nnprune_backdoor.errors import DataError, UnknownNameError, UnsupportedModelError
from nnprune_backdoor.importance import GroupImportance, importance_class
from nnprune_backdoor.importance.graph import members, trace
from nnprune_backdoor.importance.ledger import Ledger

CONV = tp.prune_conv_out_channels
LINEAR = tp.prune_linear_out_channels


def scores_of(model: nn.Module, seed: int = 0, constant: bool = False) -> ChannelScores:
    """A made-up verdict on every neuron."""
    sites = find_sites(model.eval(), EXAMPLE)
    count = sum(site.channels for site in sites)
    flat = torch.ones(count) if constant else torch.rand(count, generator=generator(seed))
    return ChannelScores(sites, flat, "made up")


def classifier(model: nn.Module) -> nn.Module:
    return model.get_submodule(
        next(n for n, m in reversed(list(model.named_modules())) if isinstance(m, nn.Linear))
    )


def pruner_of(
    model: nn.Module, importance: Any, ratio: float = 0.3, **settings: Any
) -> tp.pruner.BasePruner:
    settings = {"ignored_layers": [classifier(model)], **settings}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unwrapped parameters")
        return tp.pruner.BasePruner(
            model, (EXAMPLE,), importance, pruning_ratio=ratio, num_heads={}, **settings
        )


quietly = pytest.mark.filterwarnings("ignore:.* left unpruned")


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- the values ---


def test_a_private_group_is_valued_in_the_order_of_its_scores() -> None:
    model = narrow()
    scores = scores_of(model)
    importance, graph = GroupImportance(model, scores), trace(model, EXAMPLE)
    layer, wanted = model.layer1[0].conv1, scores["layer1.0.bn1"]
    full = importance(graph.get_pruning_group(layer, CONV, list(range(8))))
    assert full is not None and full.shape == (8,)
    assert torch.equal(full.argsort(), wanted.argsort())
    for some in ([5, 2], [0, 7, 3], [6]):
        part = importance(graph.get_pruning_group(layer, CONV, some))
        assert part is not None and torch.equal(part, full[some])
    tensors = importance(graph.get_pruning_group(layer, CONV, torch.tensor([5, 2])))
    assert tensors is not None and torch.equal(tensors, full[[5, 2]])


def test_values_are_ranks_over_the_whole_model() -> None:
    model = narrow()
    scores = scores_of(model)
    importance, graph = GroupImportance(model, scores), trace(model, EXAMPLE)
    order = scores.ranking()
    for name in ("layer1.0.bn1", "layer4.1.bn1", "bn1"):
        conv = model.get_submodule(name.replace("bn", "conv"))
        group = graph.get_pruning_group(conv, CONV, list(range(conv.out_channels)))
        values = importance(group)
        assert values is not None
        ranks = {n.channel: rank for rank, n in enumerate(order) if n.site == name}
        assert values.int().tolist() == [ranks[channel] for channel in range(len(values))]


@pytest.mark.parametrize("reduction", ["max", "min", "mean"])
def test_a_shared_channel_is_reduced_over_its_sites(reduction: Any) -> None:
    model = narrow()
    scores = scores_of(model)
    ranks = scores.order().argsort().double()
    by_site = dict(
        zip(
            [site.name for site in scores.sites],
            ranks.split([site.channels for site in scores.sites]),
            strict=True,
        )
    )
    shared = ("layer1.0.bn2", "layer1.0.downsample.1", "layer1.1.bn2")
    stacked = torch.stack([by_site[name] for name in shared])
    reduce: dict[str, Callable[[Tensor], Tensor]] = {
        "max": lambda x: x.amax(0),
        "min": lambda x: x.amin(0),
        "mean": lambda x: x.mean(0),
    }
    group = trace(model, EXAMPLE).get_pruning_group(model.layer1[0].conv2, CONV, [4, 1, 6])
    values = GroupImportance(model, scores, reduction)(group)
    assert values is not None
    assert torch.allclose(values, reduce[reduction](stacked)[[4, 1, 6]], atol=2e-3, rtol=0)


@quietly
@pytest.mark.parametrize("reduction", ["max", "min", "mean"])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"])
def test_no_two_values_tie(name: str, reduction: Any) -> None:
    model = build(name)
    importance = GroupImportance(model, scores_of(model, constant=True), reduction)
    found = [importance(group) for group in trace(model, EXAMPLE).get_all_groups()]
    values = torch.cat([value for value in found if value is not None])
    assert len(values) > 100
    assert len(values.unique()) == len(values)


def test_channels_without_a_scored_neuron_come_last() -> None:
    """A concatenation of which only one part is scored."""
    settings = {"block_config": (2, 2), "growth_rate": 4}
    model = timm.create_model("densenet121", num_classes=10, **settings).eval()
    name = "features.denseblock1.denselayer1.conv2"
    site = Site(name, 4, "layer", name)
    scores = ChannelScores((site,), torch.tensor([0.4, 0.1, 0.3, 0.2]), "made up")
    reader = model.features.transition1.conv
    group = trace(model, EXAMPLE).get_pruning_group(reader, tp.prune_conv_in_channels, range(16))
    values = GroupImportance(model, scores)(group)
    assert values is not None and values.argsort()[:4].tolist() == [9, 11, 10, 8]
    assert len(values.unique()) == 16


# --- what is asked for goes ---


@quietly
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
@pytest.mark.parametrize("constant", [True, False])
def test_as_many_channels_go_as_were_asked_for(name: str, constant: bool) -> None:
    model = build(name)
    importance = GroupImportance(model, scores_of(model, constant=constant))
    graph = trace(model, EXAMPLE)

    def widths() -> int:
        groups = graph.get_all_groups(ignored_layers=[classifier(model)])
        return sum(len(group[0].idxs) for group in groups if importance(group) is not None)

    before = widths()
    pruner_of(model, importance, 0.2, global_pruning=True).step()
    graph = trace(model, EXAMPLE)
    assert widths() == int(before * 0.8)
    assert model(EXAMPLE).shape == (2, 10)


def test_torch_pruning_alone_prunes_nothing_where_all_scores_tie() -> None:
    """What the ranks are for. Should this fail, they are needed no longer."""
    model = narrow()
    before = size(model)
    pruner_of(model, lambda g: torch.ones(len(g[0].idxs)), 0.2, global_pruning=True).step()
    assert size(model) == before


def survivors(model: nn.Module, scores: ChannelScores, share: float) -> dict[str, list[int]]:
    """What a global pruner has to leave of each layer, found without one."""
    graph, importance = trace(model, EXAMPLE), GroupImportance(model, scores)
    groups = list(graph.get_all_groups(ignored_layers=[model.fc]))
    values = [value for value in map(importance, groups) if value is not None]
    everything = torch.cat(values).sort().values
    limit = everything[len(everything) - int(len(everything) * (1 - share)) - 1]
    kept = marks(model)
    for group, value in zip(groups, values, strict=True):
        gone = {channel for channel, low in enumerate((value <= limit).tolist()) if low}
        for name, dependency, channels, _ in members(group):
            if graph.is_out_channel_pruning_fn(dependency.handler):
                kept[name] = [channel for channel in channels if channel not in gone]
    return kept


@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize("steps", [1, 4])
def test_iterative_steps_hit_the_original_channels_that_were_meant(
    steps: int, reduction: Any
) -> None:
    model = narrow()
    scores = scores_of(model, seed=3)
    importance = GroupImportance(model, scores, reduction)
    if reduction == "max":
        wanted = survivors(model, scores, 0.4)
    else:
        wanted = marks(_pruned_at_once(copy.deepcopy(model), scores, reduction))
    pruner = pruner_of(model, importance, 0.4, global_pruning=True, iterative_steps=steps)
    for _ in range(steps):
        pruner.step()
    assert marks(model) == wanted
    assert any(0 < len(row) < 8 for row in wanted.values())


def _pruned_at_once(model: nn.Module, scores: ChannelScores, reduction: Any) -> nn.Module:
    importance = GroupImportance(model, scores, reduction)
    pruner_of(model, importance, 0.4, global_pruning=True).step()
    return model


def test_local_steps_leave_the_best_of_each_layer() -> None:
    model = narrow()
    scores = scores_of(model)
    pruner = pruner_of(model, GroupImportance(model, scores), 0.5, iterative_steps=4)
    for _ in range(4):
        pruner.step()
    for layer in ("layer1.0", "layer2.1", "layer4.0"):
        best = scores[f"{layer}.bn1"].topk(len(scores[f"{layer}.bn1"]) // 2).indices
        assert marks(model)[f"{layer}.conv1"] == sorted(best.tolist())


def test_groups_that_the_caller_skips_are_not_taken_for_pruned() -> None:
    model = narrow()
    scores = scores_of(model)
    importance = GroupImportance(model, scores)
    pruner = pruner_of(model, importance, 0.5, iterative_steps=2)
    for number, group in enumerate(pruner.step(interactive=True)):
        if number % 2:
            group.prune()
    cut = {name for name, row in marks(model).items() if row != marks(narrow())[name]}
    pruner.step()
    assert cut and len(cut) < len(marks(model))
    for layer in ("layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.1"):
        best = scores[f"{layer}.bn1"].topk(len(scores[f"{layer}.bn1"]) // 2).indices
        assert marks(model)[f"{layer}.conv1"] == sorted(best.tolist())


def test_a_second_pruner_is_not_polluted_by_the_first() -> None:
    original = narrow()
    scores = scores_of(original)
    pruned = []
    for _ in range(2):
        model = copy.deepcopy(original)
        pruner = pruner_of(model, GroupImportance(model, scores), 0.4, global_pruning=True)
        pruner.step()
        pruned.append(marks(model))
    assert pruned[0] == pruned[1] != marks(original)


def test_two_importances_of_one_model_both_follow_its_pruning() -> None:
    model = narrow()
    first = GroupImportance(model, scores_of(model, seed=1))
    second = GroupImportance(model, scores_of(model, seed=2))
    twin = copy.deepcopy(model)
    graph = trace(model, EXAMPLE)
    pruner_of(model, first, 0.25, global_pruning=True).step()
    alive = marks(model)["layer3.0.conv1"]
    assert 0 < len(alive) < 16
    layer = model.layer3[0].conv1
    group = graph.get_pruning_group(layer, CONV, range(layer.out_channels))
    fresh = GroupImportance(twin, scores_of(twin, seed=2))
    before = trace(twin, EXAMPLE).get_pruning_group(twin.layer3[0].conv1, CONV, alive)
    values, wanted = second(group), fresh(before)
    assert values is not None and wanted is not None and torch.equal(values, wanted)


def test_it_can_be_made_in_the_middle_and_told_what_it_missed() -> None:
    model = narrow()
    scores = scores_of(model)
    trace(model, EXAMPLE).get_pruning_group(model.conv1, CONV, [0, 1]).prune()
    with pytest.raises(UnsupportedModelError, match="64 channels of 'bn1', the model has 62"):
        GroupImportance(model, scores)
    assert GroupImportance(model, scores_of(model)).scores["bn1"].shape == (62,)


# --- every mode of the pruner ---


def tuple_of_layers(model: nn.Module) -> dict[str, Any]:
    blocks = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return {"pruning_ratio_dict": {tuple(blocks[1:4]): 0.6}, "global_pruning": True}


MODES: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "local": lambda _: {},
    "global": lambda _: {"global_pruning": True},
    "isomorphic": lambda _: {"global_pruning": True, "isomorphic": True},
    "iterative": lambda _: {"iterative_steps": 3, "global_pruning": True},
    "interactive": lambda _: {},
    "ratio dict": lambda m: {"pruning_ratio_dict": {next(iter(m.children())): 0.6}},
    "tuple of layers": tuple_of_layers,
    "round to": lambda _: {"round_to": 4},
    "at most": lambda _: {"max_pruning_ratio": 0.5, "global_pruning": True},
}


@quietly
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_the_pruner_works(name: str, mode: str) -> None:
    model = build(name)
    importance = GroupImportance(model, scores_of(model))
    before, settings = size(model), MODES[mode](model)
    pruner = pruner_of(model, importance, 0.3, **settings)
    for _ in range(settings.get("iterative_steps", 1)):
        if mode == "interactive":
            for group in pruner.step(interactive=True):
                group.prune()
        else:
            pruner.step()
    assert size(model) < 0.9 * before
    logits = model(EXAMPLE)
    assert logits.shape == (2, 10)
    logits.sum().backward()
    if mode == "round to":
        widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert all(width % 4 == 0 for width in widths)


def test_ignored_layers_keep_their_channels() -> None:
    model = narrow()
    scores = scores_of(model)
    scores.flat[:] = torch.arange(float(len(scores.flat)))  # the first layers would go first
    ignored = [model.fc, model.layer1]
    pruner_of(model, GroupImportance(model, scores), 0.3, ignored_layers=ignored).step()
    assert model.layer1[0].conv1.out_channels == 8
    assert model.layer2[0].conv1.out_channels == 11


def attention_scores(model: nn.Module) -> ChannelScores:
    """On query, key and value: what no criterion here scores, but yours may."""
    sites = tuple(
        Site(name, module.out_features, "layer", name)
        for name, module in model.named_modules()
        if name.endswith("attn.qkv")
    )
    count = sum(site.channels for site in sites)
    return ChannelScores(sites, torch.rand(count, generator=generator(5)), "made up")


@quietly
@pytest.mark.parametrize("whole_heads", [False, True])
def test_attention_is_pruned_where_it_is_scored(whole_heads: bool) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, depth=2).eval()
    importance = GroupImportance(model, attention_scores(model))
    heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv")}
    settings = {"prune_num_heads": True, "head_pruning_ratio": 0.4, "prune_head_dims": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unwrapped parameters")
        pruner = tp.pruner.BasePruner(
            model,
            (EXAMPLE,),
            importance,
            pruning_ratio=0.25,
            ignored_layers=[model.head],
            num_heads=heads,
            in_channel_groups={},
            out_channel_groups={},
            **(settings if whole_heads else {}),
        )
    pruner.step()
    for module in model.modules():
        if hasattr(module, "qkv"):
            assert module.qkv.out_features == (3 * 64 if whole_heads else 3 * 3 * 48)
            module.num_heads = pruner.num_heads[module.qkv]
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)
            module.attn_dim = module.num_heads * module.head_dim
    assert model(EXAMPLE).shape == (2, 10)


def test_with_heads_unscored_attention_is_left_alone_and_the_rest_is_pruned() -> None:
    model = build("test_vit")
    importance = GroupImportance(model, scores_of(model))
    heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv")}
    pruner = pruner_of(model, importance, 0.25)
    pruner.num_heads.update(heads)
    pruner.out_channel_groups = dict(heads)
    wanted = r"6 of 13 groups are left unpruned.* 'blocks.5.attn.proj', .* and 3 more: no neuron in"
    with pytest.warns(UserWarning, match=wanted):
        pruner.step()
    assert all(layer.out_features == 3 * 64 for layer in heads)
    assert model.blocks[0].mlp.fc1.out_features == 144
    assert model(EXAMPLE).shape == (2, 10)


# --- what it says ---


def test_a_group_without_a_scored_neuron_gives_none_and_one_warning() -> None:
    model = narrow()
    importance, graph = GroupImportance(model, scores_of(model)), trace(model, EXAMPLE)
    group = graph.get_pruning_group(model.fc, LINEAR, list(range(10)))
    with pytest.warns(UserWarning, match="group of 'fc' is left .*: no neuron in it is scored"):
        assert importance(group) is None
    assert importance(group) is None  # any warning is an error here


def test_a_group_that_torch_pruning_gets_wrong_is_left_alone() -> None:
    model = timm.create_model("test_vit_relpos", num_classes=10, img_size=32).eval()
    name = "blocks.8.attn.qkv"
    scores = ChannelScores(
        (Site(name, 288, "layer", name),), torch.rand(288, generator=generator()), "made up"
    )
    importance, layer = GroupImportance(model, scores), model.get_submodule(name)
    group = trace(model, EXAMPLE).get_pruning_group(layer, LINEAR, list(range(288)))
    with pytest.warns(UserWarning, match="wrong channel indices for 'blocks.8.attn.rel_pos"):
        assert importance(group) is None
    assert importance(group) is None


@quietly
def test_groups_without_which_the_network_does_not_run_are_left_alone() -> None:
    """Its gates are split at widths that do not change with the layer."""
    model = timm.create_model("test_mambaout", num_classes=10).eval()
    importance = GroupImportance(model, scores_of(model), example=EXAMPLE[:1])
    before = size(model)
    pruner = pruner_of(model, importance, 0.2)
    with pytest.warns(UserWarning, match=r"the network does not run .*split_with_sizes"):
        pruner.step()
    assert model(EXAMPLE).shape == (2, 10)
    assert size(model) < 0.95 * before

    careless = timm.create_model("test_mambaout", num_classes=10).eval()
    pruner_of(careless, GroupImportance(careless, scores_of(careless)), 0.2).step()
    with pytest.raises(RuntimeError, match="split"):
        careless(EXAMPLE)


def test_a_frozen_model_is_pointed_out_and_works_with_our_own_tracing() -> None:
    model = narrow().requires_grad_(False)
    with pytest.warns(UserWarning, match="frozen"):
        importance = GroupImportance(model, scores_of(model))
    values = [importance(g) for g in trace(model, EXAMPLE, ignored=[model.fc]).get_all_groups()]
    assert len(values) > 10 and all(value is not None for value in values)


@pytest.mark.parametrize("frozen_first", [False, True])
def test_of_a_partly_frozen_model_the_frozen_part_is_the_reason(frozen_first: bool) -> None:
    """What Torch-Pruning does not see is coupled with what it does see."""
    model = narrow()
    frozen = [model.conv1, model.bn1, model.layer1[0], model.layer1[1].conv1]
    scores = scores_of(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if frozen_first:
            nn.ModuleList(frozen).requires_grad_(False)
        importance = GroupImportance(model, scores, example=EXAMPLE[:1])
        nn.ModuleList(frozen).requires_grad_(False)
        before = size(model)
        pruner_of(model, importance).step()
    said = [str(warning.message) for warning in caught]
    assert len(said) == 2, said
    assert said[0].startswith("13 parameters of the model are frozen ('conv1.weight', ...)")
    assert "'layer1.1.conv2': without channels of it the network does not run" in said[1]
    assert "13 parameters of the model are frozen" in said[1]
    assert model(EXAMPLE).shape == (2, 10)
    assert size(model) < before


def test_layers_that_run_without_gradients_are_the_reason_where_nothing_is_frozen() -> None:
    model = narrow()
    importance = GroupImportance(model, scores_of(model))
    stem = model.bn1
    plain = type(stem).forward

    class Still(type(stem)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return plain(self, x)

    stem.__class__ = Still
    with pytest.warns(UserWarning, match=r"not see 1 of the scored layers run \('bn1', \.\.\.\)"):
        pruner_of(model, importance).step()


def test_another_model_object_is_refused() -> None:
    model = narrow()
    importance = GroupImportance(model, scores_of(model))
    with pytest.raises(UnsupportedModelError, match="another model object"):
        pruner_of(copy.deepcopy(model), importance).step()
    other = build("test_vit")
    with pytest.raises(UnsupportedModelError, match="no such layer"):
        GroupImportance(other, scores_of(model))


def test_a_layer_that_was_cut_by_hand_is_noticed() -> None:
    model = narrow()
    importance, graph = GroupImportance(model, scores_of(model)), trace(model, EXAMPLE)
    for layer in (model.conv1, model.bn1):
        graph.get_pruner_of_module(layer).prune_out_channels(layer, [3])
    group = graph.get_pruning_group(model.conv1, CONV, [0])
    with pytest.raises(UnsupportedModelError, match="cut without Torch-Pruning"):
        importance(group)


def test_an_unknown_reduction_is_refused() -> None:
    model = narrow()
    with pytest.raises(DataError, match="'median'"):
        GroupImportance(model, scores_of(model), "median")  # type: ignore[arg-type]


def test_an_importance_keeps_no_ledger_once_it_is_gone() -> None:
    model = narrow()
    importance = GroupImportance(model, scores_of(model))
    assert isinstance(importance._ledger, Ledger)
    gc.collect()
    assert hasattr(tp.dependency.Group.prune, "__wrapped__")
    del importance
    gc.collect()
    assert not hasattr(tp.dependency.Group.prune, "__wrapped__")


# --- one class a criterion ---


@pytest.mark.slow
def test_a_criterion_by_its_own_name(trained: nn.Module, clean: CleanData) -> None:
    from nnprune_backdoor.importance import ANPImportance, RNPImportance

    assert RNPImportance is importance_class("rnp") and RNPImportance.criterion == "rnp"
    assert ANPImportance.__name__ == "ANPImportance"
    assert "ICML 2023" in str(RNPImportance.__doc__)
    settings = {
        "unlearning": Unlearning(lr=0.01, batch_size=32),
        "ranking": Response(batch_size=32),
    }
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    importance = RNPImportance(trained, clean, seed=4, **settings)
    wanted = RNP(**settings)(trained, clean, seed=4)  # type: ignore[arg-type]
    assert torch.equal(importance.scores.flat, wanted.flat)
    assert all(torch.equal(before[name], t) for name, t in trained.state_dict().items())
    pruner_of(trained, importance, 0.1, global_pruning=True).step()
    assert trained(clean.images[:2]).shape == (2, 10)


def test_a_wrong_name_names_the_right_ones(clean: CleanData) -> None:
    with pytest.raises(AttributeError, match=r"RMPImportance.*ANPImportance, .*RNPImportance"):
        importances.RMPImportance  # noqa: B018
    with pytest.raises(UnknownNameError, match="'rnp'"):
        importance_class("rmp")
    with pytest.raises(UnknownNameError, match="unlearning"):
        importance_class("rnp")(narrow(), clean, unlearnin=1.0)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten afterwards."""
    monkeypatch.setattr(base._CRITERIA, "_classes", dict(base._CRITERIA._classes))


@pytest.mark.usefixtures("registry")
def test_a_new_criterion_is_an_importance_by_being_registered(clean: CleanData) -> None:
    assert not hasattr(importances, "GammaImportance")

    @register_criterion("gamma")
    @dataclass(frozen=True, kw_only=True)
    class Gamma(Criterion):
        """Small weights of norm layers first."""

        reference: ClassVar[str] = "nobody"
        needs_labels: ClassVar[bool] = False
        power: float = 1.0

        @classmethod
        def paper(cls) -> Self:
            return cls()

        def score(self, model: nn.Module, clean: Any, sites: Any, *_: Any) -> ChannelScores:
            weights = [model.get_submodule(site.name).weight.abs().flatten() for site in sites]
            flat = torch.cat([w[: s.channels] for w, s in zip(weights, sites, strict=True)])
            return ChannelScores(sites, flat**self.power, repr(self))

    assert "GammaImportance" in dir(importances)
    model = narrow()
    importance = importances.GammaImportance(model, clean, reduction="min", power=2.0)
    assert importance.reduction == "min" and "power=2.0" in importance.scores.criterion
    group = trace(model, noise_images(2)).get_pruning_group(model.conv1, CONV, [3])
    assert {end.name for end in describe(group) if end.output} == {"conv1", "bn1"}
    values = importance(group)
    assert values is not None and values.shape == (1,)
