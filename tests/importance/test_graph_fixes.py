"""What Torch-Pruning's graphs get wrong by themselves, and that the fixes correct it.

Each network fails without the fixes. If one no longer does, a new release of Torch-Pruning does not
need that fix: take it out of `graph_fixes.py`.
"""

from __future__ import annotations

import gc
import inspect
import threading
from collections.abc import Callable

import pytest
import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn

from helpers.graphs import describe
from helpers.images import noise_images
from nnprune_backdoor.importance.graph import out_of_range, trace
from nnprune_backdoor.importance.graph_fixes import GRAPH_FIXES
from nnprune_backdoor.importance.patching import Patch
from nnprune_backdoor.importance.trial import Trial

EXAMPLE = noise_images(2)
CONV = tp.prune_conv_out_channels
Cuts = dict[str, tuple[int, ...]]


class Net(nn.Module):
    """A first convolution of eight channels, something in between, and a classifier."""

    def __init__(self, middle: Callable[[Net, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 8, 3), nn.LazyLinear(2)
        self.middle = middle
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.eval()(EXAMPLE)  # settles the width of the classifier

    def forward(self, images: Tensor) -> Tensor:
        x = self.middle(self, self.first(images))
        logits: Tensor = self.head(x.mean((-2, -1)))
        return logits


def cuts(graph: tp.DependencyGraph, layer: nn.Module, channels: list[int]) -> Cuts:
    """What has to go with some channels, layer by layer."""
    group = describe(graph.get_pruning_group(layer, CONV, channels))
    return {end.name: tuple(sorted(end.channels)) for end in group}


def plain(model: nn.Module) -> tp.DependencyGraph:
    return tp.DependencyGraph().build_dependency(model, (EXAMPLE,), verbose=False)


def read_in_reverse(net: Net, x: Tensor) -> Tensor:
    few, many = x.split([3, 5], 1)
    more = net.wide(many)
    return net.narrow(few) + more  # type: ignore[no-any-return]


def read_twice(net: Net, x: Tensor) -> Tensor:
    one, two = x.chunk(2, 1)
    return torch.cat([one, net.narrow(one), two], 1)


def squeezed(net: Net, x: Tensor) -> Tensor:
    gate = net.gate(x.mean((2, 3)).view(len(x), 1, -1)).sigmoid()
    return x * gate.view(len(x), -1, 1, 1)


def expanded(_: Net, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x[:, None].expand(n, 2, c, h, w).sum(1)


def split_on_and_on(net: Net, x: Tensor) -> Tensor:
    parts = [part for half in x.chunk(2, 1) for part in half.chunk(2, 1)]
    return torch.cat([part.relu() for part in parts], 1)


NETS: dict[str, tuple[Net, list[int], Cuts]] = {
    "chunks read in reverse": (
        Net(read_in_reverse, narrow=nn.Conv2d(3, 4, 1), wide=nn.Conv2d(5, 4, 1)),
        [0, 4],
        {"first": (0, 4), "narrow": (0,), "wide": (1,)},
    ),
    "a chunk read twice": (
        Net(read_twice, narrow=nn.Conv2d(4, 6, 1)),
        [1, 6],
        {"first": (1, 6), "narrow": (1,), "head": (1, 12)},
    ),
    "an expansion": (Net(expanded), [2, 7], {"first": (2, 7), "head": (2, 7)}),
    "chunks of chunks": (Net(split_on_and_on), [3, 4], {"first": (3, 4), "head": (3, 4)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_groups_are_right_with_us_and_wrong_without(name: str) -> None:
    net, channels, wanted = NETS[name]
    assert cuts(trace(net, EXAMPLE), net.first, channels) == wanted
    gc.collect()
    try:
        found = cuts(plain(net), net.first, channels)
    except (IndexError, TypeError, ZeroDivisionError):
        return
    assert found != wanted, "Torch-Pruning gets this right by itself now"


def test_channels_that_become_places_are_recognised() -> None:
    net = Net(squeezed, gate=nn.Conv1d(1, 1, 3, padding=1))
    group = trace(net, EXAMPLE).get_pruning_group(net.first, CONV, [5])
    assert out_of_range(group) == "gate"


def test_a_second_prune_finds_the_chunks_where_they_are_then() -> None:
    def second(graph: tp.DependencyGraph, net: Net) -> Cuts:
        graph.get_pruning_group(net.first, CONV, [0, 1]).prune()
        return cuts(graph, net.first, [2])  # the last of the other chunk is the fifth

    def net() -> Net:
        return Net(
            lambda net, x: net.narrow(x.split(sizes(x), 1)[0]) + net.wide(x.split(sizes(x), 1)[1]),
            narrow=nn.Conv2d(4, 4, 1),
            wide=nn.Conv2d(4, 4, 1),
        )

    def sizes(x: Tensor) -> list[int]:
        return [x.shape[1] - 4, 4]

    ours, theirs = net(), net()
    wanted = {"first": (2,), "wide": (0,)}
    assert second(trace(ours, EXAMPLE), ours) == wanted
    assert ours(EXAMPLE).shape == (2, 2)
    gc.collect()
    assert second(plain(theirs), theirs) != wanted, "Torch-Pruning keeps the offsets itself now"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cs3darknet_focus_s", "shvit_s1"])
def test_networks_that_torch_pruning_fails_on_are_traced(name: str) -> None:
    model = timm.create_model(name, num_classes=10).eval()
    groups = [describe(group) for group in trace(model, EXAMPLE).get_all_groups()]
    assert len(groups) > 20
    gc.collect()
    with pytest.raises((TypeError, ZeroDivisionError)):
        plain(model)


@pytest.mark.slow
def test_what_is_right_by_itself_stays_as_it_is() -> None:
    for name in ("test_resnet", "test_convnext", "test_efficientnet", "test_vit"):
        model = timm.create_model(name, num_classes=10)
        images = torch.zeros(2, *model.pretrained_cfg["input_size"])
        ours = [describe(group) for group in trace(model, images).get_all_groups()]
        gc.collect()
        graph = tp.DependencyGraph().build_dependency(model, (images,), verbose=False)
        theirs = [describe(group) for group in graph.get_all_groups()]
        assert {(ends[0].name, frozenset(ends)) for ends in ours} == {
            (ends[0].name, frozenset(ends)) for ends in theirs
        }, name


def test_flattened_maps_are_still_flattened() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 900, 2))
    group = trace(model, EXAMPLE).get_pruning_group(model[0], CONV, [1])
    assert describe(group)[1].channels == tuple(range(900, 1800))


# --- groups without which a network does not run ---


def test_a_group_is_tried_without_touching_the_model() -> None:
    static = Net(read_in_reverse, narrow=nn.Conv2d(3, 4, 1), wide=nn.Conv2d(5, 4, 1))
    before = {name: tensor.clone() for name, tensor in static.state_dict().items()}
    graph = trace(static, EXAMPLE)
    every = graph.get_pruning_group(static.first, CONV, list(range(8)))
    trial, layers = Trial(static, EXAMPLE), [static.first, static.wide]
    assert "split" in trial.error_without(every, layers, 0)
    after = graph.get_pruning_group(static.wide, CONV, list(range(4)))
    assert trial.error_without(after, layers, 0) == ""
    assert all(torch.equal(before[name], t) for name, t in static.state_dict().items())
    assert graph.pruning_history() == []


def test_channels_of_a_convolution_in_groups_are_tried_together() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten())
    model.append(nn.Linear(8 * 28 * 28, 2))
    graph = trace(model, EXAMPLE)
    group = graph.get_pruning_group(model[0], CONV, list(range(8)))
    assert out_of_range(group) is None
    assert Trial(model, EXAMPLE).error_without(group, [model[0], model[1]], 0) == ""


# --- the patch ---


def test_the_correction_comes_and_goes_with_its_users() -> None:
    gc.collect()
    assert GRAPH_FIXES.users == []
    module = tp.dependency.shape_infer
    unchanged = module.init_shape_information
    graph = trace(Net(expanded), EXAMPLE)
    assert module.init_shape_information is not unchanged
    del graph
    gc.collect()
    assert module.init_shape_information is unchanged


def test_a_patch_held_while_another_thread_takes_it_out_is_there() -> None:
    taking_out, held = threading.Event(), threading.Event()

    class Owner:
        def __setattr__(self, name: str, value: Callable[[], str]) -> None:
            if value is unchanged:
                taking_out.set()
                held.wait(1)  # until the other user has come, unless it is kept waiting
            vars(self)[name] = value

    class User:
        pass

    def unchanged() -> str:
        return "done"

    def come() -> None:
        assert taking_out.wait(30)
        patch.hold(others[0])
        held.set()

    owner, users, others = Owner(), [User()], [User()]
    vars(owner)["work"] = unchanged
    patch = Patch(owner, "work", lambda original: lambda: f"patched, {original()}")
    patch.hold(users[0])
    thread = threading.Thread(target=come)
    thread.start()
    users.clear()
    thread.join(30)
    assert vars(owner)["work"]() == "patched, done"
    others.clear()
    gc.collect()
    assert vars(owner)["work"] is unchanged


def test_the_release_that_is_fixed_is_the_one_installed() -> None:
    """If this fails, read the new code: do the fixes still fit there?"""
    gc.collect()
    build = inspect.getsource(tp.DependencyGraph.build_dependency)
    edges = build.index("self._build_dependency(self.module2node)")
    assert edges < build.index("shape_infer.init_shape_information(self)")
    source = inspect.getsource(tp.dependency.shape_infer)
    assert "_saved_self_sizes" in source, "does it read the sizes of splits itself now?"
    assert "self.offsets = offsets" in inspect.getsource(tp.ops.SplitPruner)
