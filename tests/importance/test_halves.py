"""Networks that cut a tensor into halves: one channel may go where several may not."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from helpers.images import noise_images
from nnprune_backdoor.core.scores import ChannelScores
from nnprune_backdoor.core.sites import find_sites
from nnprune_backdoor.errors import UnsupportedModelError
from nnprune_backdoor.importance import GroupImportance

IMAGES = noise_images(2)
Halves = Callable[[Tensor], list[Tensor]]


class Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.bn(self.conv(x)))


class Split(nn.Module):
    """As YOLO's C2f: halves, a chain of blocks on the last one, all of it concatenated."""

    def __init__(self, inputs: int, outputs: int, depth: int, halves: Halves, add: bool) -> None:
        super().__init__()
        self.first, self.last = Conv(inputs, 32, 1), Conv((2 + depth) * 16, outputs, 1)
        self.blocks = nn.ModuleList(Conv(16, 16) for _ in range(depth))
        self.halves, self.add = halves, add

    def forward(self, x: Tensor) -> Tensor:
        parts = self.halves(self.first(x))
        for block in self.blocks:
            made = block(parts[-1])
            parts.append(parts[-1] + made if self.add else made)
        return self.last(torch.cat(parts, 1))


class Yolo(nn.Module):
    def __init__(self, halves: Halves, add: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.down = Conv(3, 16, 3, 2), Conv(32, 32, 3, 2)
        self.shallow = Split(16, 32, 1, halves, add)
        self.deep = Split(32, 48, 2, halves, add)
        self.head, self.fc = Conv(48, 64, 1), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.deep(self.down(self.shallow(self.stem(images))))
        return self.fc(self.head(maps).mean((2, 3)))


def sliced(x: Tensor) -> list[Tensor]:
    half = x.shape[1] // 2
    return [x[:, :half], x[:, half:]]


def viewed(x: Tensor) -> list[Tensor]:
    batch, channels, height, width = x.shape
    return list(x.view(batch, 2, channels // 2, height, width).unbind(1))


def narrowed(x: Tensor) -> list[Tensor]:
    half = x.shape[1] // 2
    return [x.narrow(1, 0, half), x.narrow(1, half, x.shape[1] - half)]


HALVES: dict[str, Halves] = {
    "chunk": lambda x: list(x.chunk(2, 1)),
    "tensor_split": lambda x: list(x.tensor_split(2, 1)),
    "split": lambda x: list(x.split([16, 16], 1)),
    "split by half": lambda x: list(x.split(x.shape[1] // 2, 1)),
    "unflatten": lambda x: list(x.unflatten(1, (2, -1)).unbind(1)),
    "slices": sliced,
    "fixed slices": lambda x: [x[:, :16], x[:, 16:]],
    "upper half first": lambda x: [x[:, : (x.shape[1] + 1) // 2], x[:, (x.shape[1] + 1) // 2 :]],
    "view": viewed,
    "narrow": narrowed,
    "shuffled": lambda x: list(torch.channel_shuffle(x, 4).chunk(2, 1)),
}


def importance_of(model: nn.Module, seed: int = 1) -> GroupImportance:
    sites = find_sites(model, IMAGES)
    generator = torch.Generator().manual_seed(seed)
    flat = torch.rand(sum(site.channels for site in sites), generator=generator)
    return GroupImportance(model, ChannelScores(sites, flat, "random"), example=IMAGES[:1])


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("halves", HALVES)
@pytest.mark.parametrize(  # each value with each value of the others
    ("add", "everywhere", "ratio", "steps"),
    [(False, False, 0.3, 1), (False, True, 0.4, 3), (True, False, 0.4, 3), (True, True, 0.3, 1)],
)
def test_a_network_of_halves_runs_after_pruning(
    halves: str, add: bool, everywhere: bool, ratio: float, steps: int
) -> None:
    model = Yolo(HALVES[halves], add).eval()
    before = parameters(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        pruner = tp.pruner.BasePruner(
            model,
            IMAGES,
            importance=importance_of(model),
            pruning_ratio=ratio,
            global_pruning=everywhere,
            iterative_steps=steps,
            ignored_layers=[model.fc],
        )
        for _ in range(steps):
            pruner.step()
    assert parameters(model) < before
    model.train()(IMAGES).sum().backward()  # it runs, and trains


def test_cuts_that_break_the_network_are_named() -> None:
    model = Yolo(HALVES["chunk"], add=True).eval()
    importance = importance_of(model)
    graph = tp.DependencyGraph().build_dependency(model, IMAGES)
    conv = model.shallow.first.conv
    several = graph.get_pruning_group(conv, tp.prune_conv_out_channels, list(range(6)))
    kept = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=r"without 6 channels of .*first.* does not run"):
        several.prune()
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert len(importance.scores.flat) > 0
    even = [0, 1, 16, 17]  # as many of either half
    graph.get_pruning_group(conv, tp.prune_conv_out_channels, even).prune()
    assert conv.out_channels == 28
    assert model(IMAGES).shape == (2, 10)


# ---- why a model is not the one that the importance was made for --------------------------------


def pruner_of(model: nn.Module, importance: GroupImportance) -> tp.pruner.BasePruner:
    return tp.pruner.BasePruner(model, IMAGES, importance=importance, pruning_ratio=0.3)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_frozen_parameters_are_the_reason_that_is_given() -> None:
    model = Yolo(HALVES["chunk"], add=False).eval().requires_grad_(False)
    importance = importance_of(model)
    with pytest.raises(UnsupportedModelError, match=r"frozen .*requires_grad_\(True\)"):
        pruner_of(model, importance).step()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("other", ["copy", "another"])
def test_a_copy_and_another_model_are_told_apart(other: str) -> None:
    model = Yolo(HALVES["chunk"], add=False).eval()
    importance = importance_of(model)
    if other == "copy":
        with pytest.raises(UnsupportedModelError, match="is a copy or in which layers"):
            pruner_of(copy.deepcopy(model), importance).step()
        return
    different = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UnsupportedModelError, match=r"has no layer 'deep\.blocks\.0\.bn'"):
        pruner_of(different.append(nn.Linear(8, 10)), importance).step()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["down.bn", "down.conv", "deep.last.conv"])
@pytest.mark.parametrize("late", [False, True])
def test_a_layer_that_was_replaced_is_named(name: str, late: bool) -> None:
    """Its scores would be those of the old one, or it would pass for a layer that nobody scores."""
    model = Yolo(HALVES["chunk"], add=False).eval()
    importance = importance_of(model)
    pruner = pruner_of(model, importance) if late else None
    holder, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(holder), attribute, copy.deepcopy(model.get_submodule(name)))
    with pytest.raises(UnsupportedModelError, match=rf"layer '{name}' was replaced after"):
        (pruner or pruner_of(model, importance)).step()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (nn.Linear(7, 10), r"no longer does .*\(RuntimeError: mat1 and mat2 .*mend it"),
        (nn.Linear(64, 5), r"no longer does .*\(logits of shape \(1, 5\), expected .*\(1, 10\)"),
    ],
)
def test_a_model_that_no_longer_runs_is_not_what_pruning_did(head: nn.Module, reason: str) -> None:
    model = Yolo(HALVES["chunk"], add=False).eval()
    pruner = pruner_of(model, importance_of(model))
    model.fc = head
    with pytest.raises(UnsupportedModelError, match=reason):
        pruner.step()


def test_an_importance_whose_model_has_a_new_head_stops_no_cuts_of_others() -> None:
    model = Yolo(HALVES["chunk"], add=False).eval()
    importance = importance_of(model)
    model.fc = nn.Linear(64, 5)
    graph = tp.DependencyGraph().build_dependency(model, IMAGES)
    graph.get_pruning_group(model.head.conv, tp.prune_conv_out_channels, [0, 5, 7]).prune()
    assert model.head.conv.out_channels == 61
    assert len(importance.scores.flat) > 0


def test_what_breaks_at_a_layers_outputs_may_go_at_its_inputs() -> None:
    """Both groups have the same root."""
    model = Yolo(HALVES["fixed slices"], add=False).eval()
    importance = importance_of(model)
    graph = tp.DependencyGraph().build_dependency(model, IMAGES)
    conv = model.shallow.first.conv
    outputs = graph.get_pruning_group(conv, tp.prune_conv_out_channels, list(range(32)))
    inputs = graph.get_pruning_group(conv, tp.prune_conv_in_channels, list(range(16)))
    with pytest.warns(UserWarning, match=r"'shallow.first.conv' is left .* does not run"):
        assert importance(outputs) is None
    values = importance(inputs)
    assert values is not None
    assert values.shape == (16,)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("change", [lambda m: m.double(), lambda m: m.to(torch.bfloat16)])
def test_a_model_may_be_cast_after_the_importance_was_made(
    change: Callable[[nn.Module], nn.Module],
) -> None:
    model = Yolo(HALVES["chunk"], add=False).eval()
    importance = importance_of(model)
    before = parameters(model)
    images = IMAGES.to(next(change(model).parameters()).dtype)
    tp.pruner.BasePruner(
        model, images, importance=importance, pruning_ratio=0.3, ignored_layers=[model.fc]
    ).step()
    assert parameters(model) < before
    assert model(images).shape == (2, 10)
