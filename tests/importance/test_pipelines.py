"""Importances in the scripts of other people: what they wrap, regularise, mend and leave out."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.utils import prune

from helpers.images import noise_images
from nnprune_backdoor import CleanData
from nnprune_backdoor.core.masks import silence_
from nnprune_backdoor.core.scores import Selection
from nnprune_backdoor.core.sites import Neuron, find_sites
from nnprune_backdoor.errors import DataError, UnsupportedModelError
from nnprune_backdoor.importance import (
    CLPImportance,
    MagnitudeImportance,
    RandomImportance,
    RNPImportance,
)
from nnprune_backdoor.importance.trial import Trial

IMAGE = noise_images(1)


class Plain(nn.Module):
    """Two convolutions and a head, between which nothing is fixed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 12, 3, 2), nn.Linear(12, 4)

    def features(self, images: Tensor) -> Tensor:
        maps = self.norm(self.first(images)).relu()
        return self.second(maps).relu().mean((2, 3))

    def forward(self, images: Tensor) -> Any:
        return self.head(self.features(images))


class GivesObject(Plain):
    """As a classifier of transformers does; with features, which lose channels by right."""

    def forward(self, images: Tensor) -> Any:
        features = self.features(images)
        return SimpleNamespace(pooled=features, logits=self.head(features))


class GivesPair(Plain):
    """As YOLO's classifiers do in eval mode."""

    def forward(self, images: Tensor) -> Any:
        logits = self.head(self.features(images))
        return logits.softmax(1), logits


class Told(Plain):
    """Checks a width that it was told when it was made, as torchvision's VisionTransformer does."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8

    def features(self, images: Tensor) -> Tensor:
        maps = self.norm(self.first(images)).relu()
        if maps.shape[1] != self.width:
            raise ValueError(f"expected {self.width} channels")
        return self.second(maps).relu().mean((2, 3))


class Logits(nn.Module):
    def __init__(self, inner: nn.Module, pick: Any) -> None:
        super().__init__()
        self.inner, self.pick = inner, pick

    def forward(self, images: Tensor) -> Any:
        return self.pick(self.inner(images))


def pruner_of(model: nn.Module, importance: Any, **settings: Any) -> Any:
    kind = settings.pop("kind", tp.pruner.BasePruner)
    settings = {"ignored_layers": [model.get_submodule("head")], **settings}
    return kind(model, IMAGE, importance, pruning_ratio=0.25, **settings)


def widths(model: nn.Module) -> tuple[int, int]:
    return model.get_submodule("first").out_channels, model.get_submodule("second").out_channels


# --- the logits through a wrapper, the pruner without it ---


@pytest.mark.parametrize(
    ("model", "pick", "transform"),
    [
        (GivesObject(), lambda out: out.logits, lambda out: out.logits.sum()),
        (GivesPair(), lambda out: out[1], None),
    ],
)
def test_a_wrapper_gives_the_logits_and_the_model_in_it_is_pruned(
    model: nn.Module, pick: Any, transform: Any
) -> None:
    model = copy.deepcopy(model).eval()
    importance = MagnitudeImportance(Logits(model, pick).eval(), [IMAGE])
    pruner_of(model, importance, output_transform=transform).step()
    assert widths(model) == (6, 9)
    assert pick(model(IMAGE)).shape == (1, 4)


def test_the_model_is_scored_and_a_wrapper_of_it_is_pruned() -> None:
    model = Plain().eval()
    importance = MagnitudeImportance(model, [IMAGE])
    outer = Logits(model, lambda out: {"logits": out}).eval()
    pruner = tp.pruner.BasePruner(
        outer, IMAGE, importance, pruning_ratio=0.25, ignored_layers=[model.head]
    )
    pruner.step()
    assert widths(model) == (6, 9)


def test_a_model_that_fails_as_it_is_is_told_from_cuts_that_break_it() -> None:
    model = Told().eval()
    pruner = pruner_of(model, MagnitudeImportance(model, [IMAGE]))
    model.width = 5
    with pytest.raises(UnsupportedModelError, match=r"with nothing pruned, .* expected 5 channels"):
        pruner.step()


def test_where_every_group_would_be_skipped_the_step_raises() -> None:
    model = Told().eval()
    second = model.second  # what is left to prune breaks the network
    pruner = pruner_of(
        model, MagnitudeImportance(model, [IMAGE]), ignored_layers=[model.head, second]
    )
    with pytest.raises(
        UnsupportedModelError, match=r"none of the 1 groups .*'first'.*expected 8 .*trial=False"
    ):
        pruner.step()
    assert widths(model) == (8, 12)


# --- what the script mends after pruning ---


def mend(model: nn.Module) -> None:
    model.width = model.get_submodule("first").out_channels


def test_without_an_opt_out_such_groups_are_left_alone_and_the_warning_names_it() -> None:
    model = Told().eval()
    with pytest.warns(UserWarning, match=r"1 of 2 groups .*'first': .*trial=False.*trial=a func"):
        pruner_of(model, MagnitudeImportance(model, [IMAGE])).step()
    assert widths(model) == (8, 9)


@pytest.mark.parametrize("trial", [False, mend])
@pytest.mark.parametrize("wrapped", [False, True])
def test_with_an_opt_out_they_are_pruned(trial: Any, wrapped: bool) -> None:
    model = Told().eval()
    scored = Logits(model, lambda out: out).eval() if wrapped else model
    pruner_of(model, MagnitudeImportance(scored, [IMAGE], trial=trial)).step()
    assert widths(model) == (6, 9) and model.width == 8
    mend(model)
    assert model(IMAGE).shape == (1, 4)


def test_a_function_that_mends_does_not_excuse_other_breaks() -> None:
    class Halved(Told):
        def features(self, images: Tensor) -> Tensor:
            return torch.cat(super().features(images).split([6, 6], 1), 1)

    model = Halved().eval()
    with pytest.warns(UserWarning, match=r"1 of 2 groups .*'second': .* split_with_sizes"):
        pruner_of(model, MagnitudeImportance(model, [IMAGE], trial=mend)).step()
    assert widths(model) == (6, 12)


# --- regularisers ---


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (tp.pruner.GroupNormPruner, {}),
        (tp.pruner.BNScalePruner, {}),
        (tp.pruner.BNScalePruner, {"group_lasso": True}),
        (tp.pruner.GrowingRegPruner, {}),
    ],
)
@pytest.mark.filterwarnings("ignore:.* left unpruned")
def test_regularisers_pass_over_groups_without_values(kind: Any, settings: Any) -> None:
    """The head has no scored neuron, and the second convolution no BatchNorm."""
    model = Plain().eval()
    importance = MagnitudeImportance(model, [IMAGE])
    pruner = pruner_of(
        model, importance, kind=kind, ignored_layers=[], **settings, iterative_steps=2
    )
    for _ in range(2):
        model(IMAGE).sum().backward()
        before = [p.grad.clone() for p in model.parameters()]
        pruner.regularize(model)
        after = [p.grad for p in model.parameters()]
        assert not all(map(torch.equal, before, after))
        assert all(p.grad.isfinite().all() for p in model.parameters())
        model.zero_grad()
        pruner.step()
        pruner.update_regularizer()
    assert widths(model) == (6, 9)


def test_the_regularisers_of_other_importances_are_left_as_they_are() -> None:
    model = Plain().eval()
    kept = MagnitudeImportance(model, [IMAGE])
    nothing = pruner_of(model, lambda group: None, kind=tp.pruner.GroupNormPruner)
    with pytest.raises(AttributeError, match="sqrt"):
        nothing.regularize(model)
    assert len(kept.scores.flat) == 20


# --- what is said ---


def test_skipped_groups_are_counted_and_listed_and_the_warning_points_at_the_script() -> None:
    model = Told().eval()
    importance = MagnitudeImportance(model, [IMAGE])
    pruner = pruner_of(model, importance, ignored_layers=[], iterative_steps=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            pruner.step()
    (said,) = caught  # the second step skips the same ones
    assert str(said.message).startswith("2 of 3 groups are left unpruned")
    assert said.filename == __file__
    assert {(skipped.root, skipped.kind) for skipped in importance.skipped} == {
        ("first", "broken"),
        ("head", "unscored"),
    }


def test_heads_that_are_not_touched_are_said_to_be() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", num_classes=4, img_size=32).eval()
    heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv")}
    importance = MagnitudeImportance(model, [IMAGE])
    kept = [importance.scores.sites[0].name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unwrapped parameters")
        pruner = pruner_of(
            model, importance, num_heads=heads, prune_num_heads=True, head_pruning_ratio=0.5
        )
    with pytest.warns(UserWarning, match="no head goes in spite of prune_num_heads=True"):
        pruner.step()
    assert kept and {s.kind for s in importance.skipped} == {"heads"}


# --- images ---


@pytest.mark.parametrize("importance", [CLPImportance, MagnitudeImportance, RandomImportance])
def test_criteria_that_read_weights_take_no_image_one_or_few(importance: Any) -> None:
    model = Plain().eval()
    few = CleanData(noise_images(3), torch.tensor([2, 2, 2]))  # one class, fewer than classes
    scores = [importance(model, images).scores for images in (None, [IMAGE], few)]
    assert all(torch.equal(scores[0].flat, other.flat) for other in scores)
    assert scores[0].sites == scores[1].sites == scores[2].sites
    assert torch.equal(importance(model).scores.flat, scores[0].flat)


def test_criteria_that_need_images_say_so() -> None:
    with pytest.raises(DataError, match="RNP needs clean images"):
        RNPImportance(Plain().eval())


def test_a_model_whose_images_cannot_be_guessed_needs_one() -> None:
    odd = nn.Sequential(nn.Flatten(), nn.Linear(5 * 7 * 9, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    with pytest.raises(DataError, match="cannot tell what images this Sequential takes; give one"):
        MagnitudeImportance(odd)
    assert len(MagnitudeImportance(odd, [torch.randn(1, 5, 7, 9)]).scores.flat) == 6


# --- what the trial costs ---


def test_all_groups_are_tried_in_one_run_and_each_cut_in_one_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = [m for _ in range(12) for m in (nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)]
    model = nn.Sequential(nn.Conv2d(3, 6, 3), *layers, *head).eval()
    importance = RandomImportance(model, [IMAGE])
    pruner = tp.pruner.BasePruner(
        model, IMAGE, importance, pruning_ratio=0.3, ignored_layers=[model[-1]]
    )
    tried: list[int] = []
    plain = Trial._without
    monkeypatch.setattr(
        Trial, "_without", lambda self, c, g: (tried.append(len(g)), plain(self, c, g))[1]
    )
    pruner.step()
    assert tried == [13, *[1] * 13]
    assert model[0].out_channels == 4


def test_of_many_groups_the_ones_that_break_are_found() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat(x.split([2, 2], 1), 1)

    parts = [
        nn.Sequential(nn.Conv2d(4, 4, 1), *([Fixed()] if i in (2, 9) else [])) for i in range(12)
    ]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *parts)
    model.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]).eval()
    importance = RandomImportance(model, [IMAGE])
    pruner = tp.pruner.BasePruner(
        model, IMAGE, importance, pruning_ratio=0.3, ignored_layers=[model[-1]]
    )
    with pytest.warns(UserWarning, match="2 of 13 groups are left unpruned"):
        pruner.step()
    assert {skipped.root for skipped in importance.skipped} == {"3.0", "10.0"}


# --- masks of torch.nn.utils.prune ---


@pytest.mark.parametrize("both", [False, True])
def test_masking_a_convolution_alone_leaves_the_constant_of_its_norm(both: bool) -> None:
    """What docs/extend.md says of `site.producer` and `site.name`."""
    model = Plain().eval()
    nn.init.constant_(model.norm.bias, 1.0)
    site = next(site for site in find_sites(model, IMAGE) if site.kind == "norm")
    silent = copy.deepcopy(model)
    silence_(silent, Selection((site,), (Neuron(site.name, 3),)))
    for name in {site.producer, site.name} if both else {site.producer}:
        layer = model.get_submodule(name)
        for kind, weight in list(layer.named_parameters(recurse=False)):
            mask = weight.new_ones(weight.shape)
            mask[[3]] = 0
            prune.custom_from_mask(layer, kind, mask)
    assert torch.allclose(model(IMAGE), silent(IMAGE), atol=1e-6) == both
