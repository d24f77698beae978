"""A copy that would run the user's own layers is refused, and the user's model stays as it was."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from helpers.images import noise_images
from helpers.networks import build
from helpers.states import assert_same_state, hooks_of, state_of
from nnprune_backdoor import CleanData, purify, scan
from nnprune_backdoor.core.masks import silence_
from nnprune_backdoor.core.sites import find_sites
from nnprune_backdoor.criteria import Magnitude
from nnprune_backdoor.errors import UnsupportedModelError
from nnprune_backdoor.importance import GroupImportance
from nnprune_backdoor.removal import compact
from nnprune_backdoor.selectors import LowestFraction
from nnprune_backdoor.training import FineTuning, fine_tune

CLEAN = CleanData(noise_images(40), torch.arange(40) % 10)


def by_lambda(block: nn.Module) -> None:
    plain = block.forward
    block.forward = lambda x: plain(x)  # noqa: PLW0108 - the fault is in the function


def by_partial(block: nn.Module) -> None:
    block.forward = functools.partial(lambda run, x: run(x), block.forward)


def by_checkpoint(block: nn.Module) -> None:
    plain = block.forward
    block.forward = lambda x: checkpoint(plain, x, use_reentrant=False)


def by_autocast(block: nn.Module) -> None:
    block.forward = torch.autocast("cpu", enabled=False)(block.forward)


def by_compiling(block: nn.Module) -> None:
    block.forward = torch.compile(block.forward)


def by_hook(block: nn.Module) -> None:
    conv = block.conv1
    block.register_forward_hook(lambda module, inputs, output: output + 0 * conv(inputs[0]).mean())


def by_parameter(block: nn.Module) -> None:
    weight = block.bn1.weight
    block.register_forward_hook(lambda module, inputs, output: output * (1 + 0 * weight.sum()))


CHANGES = [by_lambda, by_checkpoint, by_autocast, by_compiling, by_hook, by_parameter]
CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "purify": lambda m: purify(m, CLEAN, "magnitude", selector=LowestFraction(0.2), progress=False),
    "scan": lambda m: scan(m, CLEAN, progress=False),
    "fine_tune": lambda m: fine_tune(m, CLEAN, progress=False),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_a_copy_that_runs_the_users_layers_is_refused(
    change: Callable[[nn.Module], None], training: bool, call: str
) -> None:
    model = build("test_resnet").train(training)
    change(model.layer2[0])
    before, hooks = state_of(model), hooks_of(model)
    with pytest.raises(UnsupportedModelError, match="of the model itself"):
        CALLS[call](model)
    assert_same_state(before, state_of(model))
    assert hooks_of(model) == hooks
    assert all(module.training == training for module in model.modules())


def by_a_layer_of_its_own(block: nn.Module) -> None:
    norm = nn.BatchNorm2d(block.conv1.in_channels)  # registered nowhere, in train mode
    block.register_forward_pre_hook(lambda module, inputs: (norm(inputs[0]),))
    block.kept_statistics = norm.running_mean


@pytest.mark.parametrize("call", CALLS)
def test_a_layer_that_only_a_function_holds_is_refused_before_it_runs(call: str) -> None:
    model = build("test_resnet")
    by_a_layer_of_its_own(model.layer2[0])
    before = model.layer2[0].kept_statistics.clone()
    with pytest.raises(UnsupportedModelError, match="layer 'BatchNorm2d' of the model itself"):
        CALLS[call](model)
    assert torch.equal(before, model.layer2[0].kept_statistics)


def test_layers_in_a_plain_list_are_copied_with_the_model() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.box = build("test_resnet"), [nn.Conv2d(3, 3, 1).eval()]

        def forward(self, images: Tensor) -> Tensor:
            return self.net(nn.Identity()(self.box[0](images)))

    purified = purify(
        Listed().eval(), CLEAN, "magnitude", selector=LowestFraction(0.2), progress=False
    )
    assert len(purified.selection) > 0


@pytest.mark.parametrize("training", [False, True])
def test_removal_and_importances_refuse_such_a_copy_too(training: bool) -> None:
    model = build("test_resnet")
    scores = Magnitude()(model, CLEAN)
    selection = LowestFraction(0.1)(scores)
    silence_(model, selection)
    by_lambda(model.layer2[0].bn1)
    model.train(training)
    before = state_of(model)
    for call in (
        lambda: compact(model, selection, CLEAN.images[:4]),
        lambda: GroupImportance(model, scores, example=CLEAN.images[:1]),
    ):
        with pytest.raises(UnsupportedModelError, match="of the model itself"):
            call()
    assert_same_state(before, state_of(model))


def by_method(block: nn.Module) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return type(self).forward(self, x)

    block.forward = forward.__get__(block)


@pytest.mark.parametrize("change", [by_method, by_partial])
def test_what_is_copied_with_its_layer_is_accepted(change: Callable[[nn.Module], None]) -> None:
    model = build("test_resnet")
    change(model.layer2[0])
    purified = purify(model, CLEAN, "magnitude", selector=LowestFraction(0.2), progress=False)
    plain = purify(
        build("test_resnet"), CLEAN, "magnitude", selector=LowestFraction(0.2), progress=False
    )
    assert purified.selection.neurons == plain.selection.neurons


class Tied(nn.Module):
    """Two convolutions with one weight; `how` says in which way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        if how == "shared":
            self.second.weight = self.first.weight
        elif how == "view":
            self.second.weight = nn.Parameter(self.first.weight.detach().view(8, 3, 3, 3))
        else:  # neighbours in one tensor, as optimisers flatten them; not tied
            flat = torch.randn(2, 8, 3, 3, 3)
            self.first.weight, self.second.weight = nn.Parameter(flat[0]), nn.Parameter(flat[1])
        self.fc = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        parts = self.first(images).relu(), self.second(images.flip(1)).relu()
        return self.fc(torch.cat(parts, 1).mean((2, 3)))


def test_tied_weights_are_refused_before_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    def score(*_: object, **__: object) -> None:
        raise AssertionError("scored")

    monkeypatch.setattr(Magnitude, "score", score)
    with pytest.raises(UnsupportedModelError, match="shared between layers"):
        purify(Tied("shared").eval(), CLEAN, "magnitude", progress=False)


@pytest.mark.parametrize("how", ["view", "flat"])
def test_weights_that_a_copy_holds_apart_are_not_tied(how: str) -> None:
    model = Tied(how).eval()
    purified = purify(
        model, CLEAN, "magnitude", selector=LowestFraction(0.2), removal="none", progress=False
    )
    gone = purified.selection.by_site()
    for name in ("first", "second"):
        zero = purified.model.get_submodule(name).weight.flatten(1).abs().sum(1) == 0
        assert zero.nonzero().flatten().tolist() == sorted(gone.get(name, []))


class Functional(Tied):
    """Uses the weight of one layer for another image."""

    def __init__(self) -> None:
        super().__init__("flat")

    def forward(self, images: Tensor) -> Tensor:
        other = nn.functional.conv2d(images.flip(1), self.first.weight)
        return self.fc(torch.cat([self.first(images).relu(), other.relu()], 1).mean((2, 3)))


def test_a_weight_that_is_used_elsewhere_is_refused_before_scoring(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def score(*_: object, **__: object) -> None:
        raise AssertionError("scored")

    monkeypatch.setattr(Magnitude, "score", score)
    with pytest.raises(UnsupportedModelError, match="shared between layers"):
        purify(Functional().eval(), CLEAN, "magnitude", progress=False)


# ---- weights that are missing or of unusual types -----------------------------------------------


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.conv(images).relu().mean((2, 3)))


def lazy() -> nn.Module:
    model = Plain()
    model.fc = nn.LazyLinear(10)
    return model


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(Plain().eval(), {nn.Linear})


def of_type(dtype: torch.dtype, layer: bool) -> nn.Module:
    model = Plain()
    if layer:
        weight = model.conv.weight.detach().to(dtype)
        model.conv.weight = nn.Parameter(weight, requires_grad=False)
    else:
        model.extra = nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)
    return model


UNUSUAL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lazy": (lazy, "is lazy and has no weights yet"),
    "quantised": (quantised, "is quantised"),
    "float8": (lambda: of_type(torch.float8_e4m3fn, True), "float8_e4m3fn, which is not supported"),
    "float8, unused": (lambda: of_type(torch.float8_e4m3fn, False), "float8_e4m3fn"),
    "complex": (lambda: of_type(torch.complex64, True), "complex64, which is not supported"),
    "integer": (lambda: of_type(torch.int32, True), "int32, which is not supported"),
}


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("call", [*CALLS, "score", "find_sites"])
def test_missing_and_unusual_weights_are_refused(kind: str, call: str) -> None:
    make, message = UNUSUAL[kind]
    more: dict[str, Callable[[nn.Module], Any]] = {
        "score": lambda m: Magnitude()(m, CLEAN),
        "find_sites": lambda m: find_sites(m, CLEAN.images[:2]),
    }
    with pytest.raises(UnsupportedModelError, match=message):
        (CALLS | more)[call](make().eval())


def test_a_model_made_in_inference_mode_is_trained_on_a_plain_copy() -> None:
    with torch.inference_mode():
        model = build("test_resnet")
    tuned = fine_tune(model, CLEAN, FineTuning(epochs=1), progress=False)
    assert not any(parameter.is_inference() for parameter in tuned.parameters())
    assert any(
        not torch.equal(one, other)
        for one, other in zip(tuned.parameters(), model.parameters(), strict=True)
    )


def test_sites_are_found_from_several_threads_at_once() -> None:
    model = build("test_resnet")
    expected, hooks = find_sites(model, CLEAN.images[:2]), hooks_of(model)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: find_sites(model, CLEAN.images[:2]), range(24)))
    assert found == [expected] * 24
    assert hooks_of(model) == hooks
