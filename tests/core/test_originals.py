"""A copy that would run the user's own layers is refused, and the user's model stays as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from helpers.images import noise_images
from helpers.networks import build
from helpers.states import assert_same_state, hooks_of, state_of
from nnprune_backdoor import CleanData, purify, scan
from nnprune_backdoor.criteria import Magnitude
from nnprune_backdoor.errors import UnsupportedModelError
from nnprune_backdoor.selectors import LowestFraction
from nnprune_backdoor.training import fine_tune

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
    with pytest.raises(UnsupportedModelError, match=r"'first' and 'second' share"):
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
