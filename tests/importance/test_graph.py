"""Tracing that leaves no trace, groups of channels, and the ledger of channel indices."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn

from helpers.graphs import EXAMPLE, describe, marks, narrow
from helpers.networks import build
from helpers.states import assert_same_state, hooks_of, state_of
from nnprune_backdoor.core.copies import frozen_copy
from nnprune_backdoor.errors import UnsupportedModelError
from nnprune_backdoor.importance.graph import out_of_range, trace
from nnprune_backdoor.importance.ledger import Ledger
from nnprune_backdoor.utils.time_limit import within

CONV = tp.prune_conv_out_channels


def recorded(model: nn.Module, ledger: Ledger) -> dict[str, list[int]]:
    """The same, as the ledger has it."""
    return {name: list(ledger.alive(model.get_submodule(name))) for name in marks(model)}


def group_of(model: nn.Module, layer: str, channels: list[int]) -> tp.dependency.Group:
    return trace(model, EXAMPLE).get_pruning_group(model.get_submodule(layer), CONV, channels)


# --- tracing ---


@pytest.mark.parametrize("around", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_tracing_leaves_the_model_as_it_was(
    any_model: nn.Module, around: Callable[[], Any]
) -> None:
    for number, module in enumerate(any_model.modules()):
        module.training = number % 3 == 0
    for number, parameter in enumerate(any_model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    modes = [module.training for module in any_model.modules()]
    flags = [parameter.requires_grad for parameter in any_model.parameters()]
    state, hooks = state_of(any_model), hooks_of(any_model)
    with around():
        graph = trace(any_model, EXAMPLE)
    assert len(list(graph.get_all_groups())) > 1
    assert modes == [module.training for module in any_model.modules()]
    assert flags == [parameter.requires_grad for parameter in any_model.parameters()]
    assert_same_state(state, state_of(any_model))
    assert hooks == hooks_of(any_model)
    assert all(parameter.grad is None for parameter in any_model.parameters())


def groups(model: nn.Module) -> set[Any]:
    found = [describe(group) for group in trace(model, EXAMPLE).get_all_groups()]
    return {(ends[0].name, frozenset(ends)) for ends in found}


def test_a_frozen_model_has_the_same_groups(any_model: nn.Module) -> None:
    assert groups(any_model) == groups(copy.deepcopy(any_model).requires_grad_(False))


def test_torch_pruning_alone_finds_nothing_in_a_frozen_model() -> None:
    model = narrow().requires_grad_(False)
    graph = tp.DependencyGraph().build_dependency(model, (EXAMPLE,))
    roots = [describe(group)[0].name for group in graph.get_all_groups()]
    assert roots == ["fc"], "trace need no longer set requires_grad"


def test_fused_attention_gives_the_same_groups() -> None:
    plain, fused = build("test_vit"), build("test_vit")
    for model, flag in ((plain, False), (fused, True)):
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = flag
    assert groups(plain) == groups(fused)
    assert any("attn.qkv" in root for root, _ in groups(fused))


class Wrapped(nn.Module):
    """A convolution, something else, and a classifier."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(1))
        self.middle, self.ranks = middle, set[int]()

    def forward(self, images: Tensor) -> Tensor:
        self.ranks.add(images.ndim)
        self.seen += 1
        x = self.middle(self.conv(images))
        logits: Tensor = self.head(x.mean((-2, -1)))
        return logits


def never_ends(x: Tensor) -> Tensor:
    while True:
        try:
            x = x + 1
        except Exception:
            x = x - 1


def raises(x: Tensor) -> Tensor:
    raise RuntimeError("in the middle")


@pytest.mark.parametrize(
    ("middle", "message"), [(raises, "in the middle"), (never_ends, "longer than 0.3 s")]
)
def test_a_failure_leaves_the_model_as_it_was(
    middle: Callable[[Tensor], Tensor], message: str
) -> None:
    model = Wrapped(middle).train().requires_grad_(False)
    model.conv.register_forward_hook(lambda *_: None)
    state, hooks = state_of(model), hooks_of(model)
    start = time.perf_counter()
    with pytest.raises(UnsupportedModelError, match=message):
        trace(model, EXAMPLE, seconds=0.3)
    assert time.perf_counter() - start < 3
    assert_same_state(state, state_of(model))
    assert hooks == hooks_of(model)
    assert all(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_tracing_is_interrupted_in_any_thread() -> None:
    caught: list[BaseException] = []

    def work() -> None:
        try:
            trace(Wrapped(never_ends), EXAMPLE, seconds=0.2)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    assert isinstance(caught[0], UnsupportedModelError)


@pytest.mark.parametrize("held", [lambda t: {"cpu": t}, lambda t: t])
def test_results_that_a_network_keeps_do_not_prevent_a_copy(held: Callable[[Tensor], Any]) -> None:
    model = narrow()
    model.cache = held(model.conv1.weight * 2)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    own = frozen_copy(model)
    kept = own.cache["cpu"] if isinstance(own.cache, dict) else own.cache
    assert isinstance(kept, Tensor) and torch.equal(kept, own.conv1.weight * 2)
    assert not kept.requires_grad


def test_a_time_limit_never_strikes_outside_of_the_work() -> None:
    """Limits about as long as the work takes: the interrupt comes anywhere, or not at all."""
    finished = 0
    for number in range(300):
        try:
            within(2e-6 * number, "counting", lambda: sum(range(5000)))
            finished += 1
        except UnsupportedModelError:
            pass
    time.sleep(1.1)  # a watchdog that was forgotten would strike again
    assert 0 < finished < 300
    assert within(None, "nothing", lambda: 3) == 3


def test_an_ordinary_trace_of_the_toy_model_works() -> None:
    model = Wrapped(torch.relu)
    graph = trace(model, EXAMPLE)
    assert model.ranks == {4}, "the batch was unpacked into images"
    assert int(model.seen) == 0
    assert {describe(group)[0].name for group in graph.get_all_groups()} == {"conv", "head"}


class Blind(Wrapped):
    """Runs its second convolution without gradients."""

    def __init__(self) -> None:
        super().__init__(self.look_away)
        self.second = nn.Conv2d(4, 4, 1)

    def look_away(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x + self.second(x)


def test_layers_that_autograd_cannot_see_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'second'.*without gradients"):
        trace(Blind(), EXAMPLE)


@pytest.mark.slow
def test_wrapped_models_are_refused() -> None:
    for wrapped in (nn.DataParallel(narrow()), torch.compile(narrow())):
        with pytest.raises(UnsupportedModelError, match="give the plain one"):
            trace(wrapped, EXAMPLE)


def test_ignored_modules_and_parameters_are_in_no_group() -> None:
    model = build("test_vit")
    block = model.blocks[0]
    found = trace(model, EXAMPLE, ignored=[block, model.pos_embed]).get_all_groups()
    names = {end.name for group in found for end in describe(group) if end.output}
    assert "blocks.1.mlp.fc1" in names
    assert not {"blocks.0.mlp.fc1", "blocks.0.attn.qkv"} & names
    residual = trace(model, EXAMPLE, ignored=[model.pos_embed]).get_all_groups()
    names = {end.name for group in residual for end in describe(group)}
    assert "cls_token" in names and "pos_embed" not in names


# --- groups ---


def test_a_group_with_the_output_of_one_layer() -> None:
    ends = describe(group_of(narrow(), "layer1.0.conv1", [5, 2]))
    assert [(end.name, end.output, end.channels, end.roots) for end in ends] == [
        ("layer1.0.conv1", True, (5, 2), (5, 2)),
        ("layer1.0.bn1", True, (5, 2), (5, 2)),
        ("layer1.0.conv2", False, (5, 2), (5, 2)),
    ]


def test_a_group_with_the_outputs_that_a_residual_sum_couples() -> None:
    ends = describe(group_of(narrow(), "layer1.0.conv2", [3]))
    first = {f"layer1.0.{name}" for name in ("conv2", "bn2", "downsample.0", "downsample.1")}
    assert {end.name for end in ends if end.output} == {*first, "layer1.1.conv2", "layer1.1.bn2"}
    readers = {"layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0"}
    assert {end.name for end in ends if not end.output} == readers


def test_depthwise_layers_pass_channels_on_and_parameters_are_named() -> None:
    model = build("test_convnext")
    graph = trace(model, EXAMPLE)
    group = graph.get_pruning_group(model.stem[0], CONV, [0])
    outputs = {end.name: end.output for end in describe(group)}
    assert outputs["stages.0.blocks.0.conv_dw"]
    assert not outputs["stages.0.blocks.0.mlp.fc1"]
    assert "stages.0.blocks.0.gamma" in outputs


def test_a_group_that_torch_pruning_gets_wrong_is_recognised() -> None:
    model = build("test_vit")
    assert not any(out_of_range(group) for group in trace(model, EXAMPLE).get_all_groups())
    # a table of relative positions, computed per head, is taken for one computed per channel
    model = timm.create_model("test_vit_relpos", num_classes=10, img_size=32)
    wrong = {out_of_range(group) for group in trace(model, EXAMPLE).get_all_groups()}
    assert wrong == {None, *(f"blocks.{block}.attn.rel_pos.mlp.fc2" for block in range(9))}


# --- the ledger ---


def by_step(model: nn.Module) -> None:
    pruner_of(model, pruning_ratio=0.3).step()


def by_four_steps(model: nn.Module) -> None:
    pruner = pruner_of(model, pruning_ratio=0.6, iterative_steps=4, global_pruning=True)
    for _ in range(4):
        pruner.step()


def interactively_skipping(model: nn.Module) -> None:
    pruner = pruner_of(model, pruning_ratio=0.5, iterative_steps=2)
    for _ in range(2):
        for number, group in enumerate(pruner.step(interactive=True)):
            if number % 2:
                group.prune()


def by_unsorted_indices(model: nn.Module) -> None:
    graph = trace(model, EXAMPLE)
    for channels in ([5, 2], [0], [4, 1]):
        graph.get_pruning_group(model.conv1, CONV, channels).prune()


def by_indices_of_a_full_group(model: nn.Module) -> None:
    full = group_of(model, "layer1.0.conv1", list(range(8)))
    full.prune(idxs=[6, 1])


def by_history(model: nn.Module) -> None:
    twin = copy.deepcopy(model)
    pruner = pruner_of(twin, pruning_ratio=0.3)
    pruner.step()
    trace(model, EXAMPLE).load_pruning_history(pruner.pruning_history())


def by_hand_width(model: nn.Module) -> None:
    pruner_of(model).manual_prune_width(model.layer2[0].conv1, CONV, [3, 14, 7])


def pruner_of(model: nn.Module, **settings: Any) -> tp.pruner.BasePruner:
    importance = tp.importance.RandomImportance()
    return tp.pruner.BasePruner(
        model, (EXAMPLE,), importance, ignored_layers=[model.fc], **settings
    )


WAYS = (
    by_step,
    by_four_steps,
    interactively_skipping,
    by_unsorted_indices,
    by_indices_of_a_full_group,
    by_history,
    by_hand_width,
)


@pytest.mark.parametrize("prune", WAYS)
def test_the_ledger_follows_every_way_to_prune(prune: Callable[[nn.Module], None]) -> None:
    model = narrow()
    ledger, second = Ledger(model), Ledger(model)
    before = marks(model)
    assert recorded(model, ledger) == before
    prune(model)
    assert marks(model) != before
    assert recorded(model, ledger) == marks(model) == recorded(model, second)
    assert model(EXAMPLE).shape == (2, 10)


def test_a_prune_that_raises_half_way_is_recorded_as_far_as_it_went(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = narrow()
    ledger = Ledger(model)
    group = group_of(model, "layer1.0.conv2", [1, 6])
    calls = 0
    plain = tp.dependency.Dependency.__call__

    def breaks(self: Any, idxs: list[int]) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise MemoryError
        return plain(self, idxs)

    monkeypatch.setattr(tp.dependency.Dependency, "__call__", breaks)
    with pytest.raises(MemoryError):
        group.prune()
    assert recorded(model, ledger) == marks(model)
    cut = [name for name, row in marks(model).items() if 1 not in row]
    assert 0 < len(cut) < 6, "nothing or everything was cut: the test shows nothing"


def test_a_ledger_minds_its_own_model() -> None:
    model, other = narrow(), narrow()
    ledger = Ledger(model)
    by_step(other)
    assert recorded(model, ledger) == marks(model)
    with pytest.raises(UnsupportedModelError, match="ledger's model"):
        ledger.alive(other.conv1)


@pytest.fixture
def no_ledgers() -> Iterator[Any]:
    """The plain `Group.prune`, while nobody else keeps a ledger."""
    gc.collect()
    plain = tp.dependency.Group.prune
    assert not hasattr(plain, "__wrapped__"), "another test keeps a ledger alive"
    yield plain
    gc.collect()
    assert tp.dependency.Group.prune is plain


def test_the_wrapper_comes_with_the_first_ledger_and_goes_with_the_last(no_ledgers: Any) -> None:
    model = narrow()
    first, second = Ledger(model), Ledger(model)
    wrapper = tp.dependency.Group.prune
    assert wrapper is not no_ledgers and wrapper.__wrapped__ is no_ledgers
    del first
    assert tp.dependency.Group.prune is wrapper
    del second
    assert tp.dependency.Group.prune is no_ledgers


@pytest.mark.slow
@pytest.mark.usefixtures("no_ledgers")
def test_neither_ledger_nor_wrapper_keeps_a_model_alive() -> None:
    model = narrow()
    ledger = Ledger(model)
    by_step(model)
    gone = weakref.ref(model.conv1)
    del model
    gc.collect()
    assert gone() is None
    assert len(ledger._channels) == 0


@pytest.mark.slow
@pytest.mark.parametrize("polite", [True, False])
def test_somebody_elses_wrapper_stays_and_nothing_counts_twice(
    monkeypatch: pytest.MonkeyPatch, no_ledgers: Any, polite: bool
) -> None:
    model, calls = narrow(), 0
    ledger = Ledger(model)
    inner = tp.dependency.Group.prune

    def outer(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        inner(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        theirs = functools.wraps(inner)(outer) if polite else outer
        patch.setattr(tp.dependency.Group, "prune", theirs)
        second = Ledger(model)
        assert (tp.dependency.Group.prune is theirs) == polite
        by_unsorted_indices(model)
        assert calls == 3
        assert recorded(model, ledger) == marks(model) == recorded(model, second)
        del ledger, second
        assert tp.dependency.Group.prune is theirs
    Ledger(model)  # the next one to go takes along what was left behind
    assert tp.dependency.Group.prune is no_ledgers


def test_the_release_that_was_wrapped_is_the_one_installed() -> None:
    """If this fails, read the new `Group.prune`: does the wrapper still fit, is it still needed?"""
    gc.collect()
    group = tp.dependency.Group
    plain = inspect.unwrap(group.prune)
    assert str(inspect.signature(plain)) == "(self, idxs=None, record_history=True)"
    assert "for dep, idxs in self._group" in inspect.getsource(plain)
    known = "add_and_merge add_dep details exec has_dep has_pruning_op items prune"
    assert {name for name in vars(group) if not name.startswith("_")} == set(known.split())
    for function in (tp.pruner.BasePruner.step, tp.DependencyGraph.load_pruning_history):
        assert "group.prune(" in inspect.getsource(function)
    record = {name for name in vars(tp.DependencyGraph) if "histor" in name or "ind" in name}
    assert record == {"pruning_history", "load_pruning_history"}, "does it keep indices itself now?"
