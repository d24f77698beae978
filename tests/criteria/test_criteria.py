from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from helpers.images import noise_images
from helpers.networks import build
from helpers.settings import ALL, FAST
from helpers.states import assert_same_state, hooks_of, state_of
from nnprune_backdoor import (
    CleanData,
    Criterion,
    create_criterion,
    criteria,
    list_criteria,
    register_criterion,
    scan,
)
from nnprune_backdoor.core.scores import ChannelScores
from nnprune_backdoor.core.sites import Site, find_sites
from nnprune_backdoor.criteria import criterion_class
from nnprune_backdoor.criteria.base import _CRITERIA
from nnprune_backdoor.errors import (
    DataError,
    ScoringError,
    UnknownNameError,
    UnsupportedModelError,
)


@pytest.fixture(params=ALL.values(), ids=ALL.keys())
def criterion(request: pytest.FixtureRequest) -> Criterion:
    """Every registered criterion in turn, with quick settings."""
    name, settings = request.param
    return create_criterion(name, **settings)


@pytest.fixture(scope="session")
def _scores() -> dict[str, ChannelScores]:
    return {}


@pytest.fixture
def expected(
    criterion: Criterion, trained: nn.Module, clean: CleanData, _scores: dict[str, ChannelScores]
) -> ChannelScores:
    """What the criterion says of `trained` with seed 0; made once for all tests."""
    name = repr(criterion)
    if name not in _scores:
        _scores[name] = criterion(copy.deepcopy(trained), clean)
    return _scores[name]


@dataclass
class World:
    """All that a criterion must leave as it was."""

    state: dict[str, Tensor]
    parameters: list[nn.Parameter]
    flags: list[bool]
    gradients: list[Tensor | None]
    modes: list[bool]
    hooks: list[tuple[int, ...]]
    torch_rng: Tensor
    numpy_rng: tuple[Any, ...]
    python_rng: tuple[Any, ...]
    dtype: torch.dtype
    grad_mode: bool

    @classmethod
    def around(cls, model: nn.Module) -> World:
        return cls(
            state_of(model),
            list(model.parameters()),
            [parameter.requires_grad for parameter in model.parameters()],
            [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            [module.training for module in model.modules()],
            hooks_of(model),
            torch.get_rng_state(),
            np.random.get_state(),
            random.getstate(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
        )

    def assert_unchanged(self, model: nn.Module) -> None:
        now = World.around(model)
        assert_same_state(self.state, now.state)
        assert all(a is b for a, b in zip(self.parameters, now.parameters, strict=True))
        for before, after in zip(self.gradients, now.gradients, strict=True):
            assert (before is None) == (after is None)
            assert before is None or torch.equal(before, after)
        assert torch.equal(self.torch_rng, now.torch_rng)
        for before, after in zip(self.numpy_rng, now.numpy_rng, strict=True):
            assert np.array_equal(before, after)
        for name in ("flags", "modes", "hooks", "python_rng", "dtype", "grad_mode"):
            assert getattr(self, name) == getattr(now, name), name


@pytest.fixture
def lived_in(trained: nn.Module) -> nn.Module:
    """A model in the middle of somebody's work: mixed modes, flags, gradients and hooks."""
    trained.train()
    trained.layer2.eval()
    trained.conv1.requires_grad_(False)
    trained.fc.weight.grad = torch.ones_like(trained.fc.weight)
    trained.layer1.register_forward_hook(lambda *_: None)
    return trained


def batches(clean: CleanData, size: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(clean.images.split(size), clean.targets.split(size), strict=True)


def assert_same_scores(one: ChannelScores, other: ChannelScores) -> None:
    assert one.sites == other.sites
    assert torch.equal(one.flat, other.flat)


# ---- the registry -------------------------------------------------------------------------------


def test_the_registry_is_sorted_and_not_empty() -> None:
    names = list_criteria()
    assert names == sorted(names)
    assert {"anp", "cnp", "mnp", "rnp", "tac"} <= set(names)
    assert {"bnp", "clp", "fp", "magnitude", "random"} <= set(names)
    assert set(FAST) <= set(names)


@pytest.mark.parametrize("name", list_criteria())
def test_defaults_and_paper_settings_construct(name: str) -> None:
    cls = criterion_class(name)
    default, paper = create_criterion(name), cls.paper()
    assert type(default) is type(paper) is cls
    assert isinstance(default, Criterion)
    assert cls.reference.strip()
    for needs in (cls.needs_labels, cls.needs_images, cls.needs_batchnorm):
        assert isinstance(needs, bool)
    assert cls.needs_images or not cls.needs_labels
    for made in (default, paper):
        assert made == cls(**{field.name: getattr(made, field.name) for field in fields(cls)})
    with pytest.raises(AttributeError):
        default.anything = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", list_criteria())
def test_repr_makes_the_same_criterion_again(name: str) -> None:
    cls = criterion_class(name)
    made = [create_criterion(name), cls.paper()]
    made += [create_criterion(name, **settings) for settings in FAST.get(name, {}).values()]
    for one in made:
        assert eval(repr(one), {**vars(criteria), cls.__name__: cls}) == one


def test_hyper_parameters_are_set_by_name() -> None:
    assert create_criterion("cnp", temperature=0.2).temperature == 0.2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "hint"),
    [("rmp", "'rmp'; did you mean 'rnp'"), ("ANP", "unknown criterion"), ("xyz", "Available: anp")],
)
def test_an_unknown_criterion_names_the_close_ones(given: str, hint: str) -> None:
    with pytest.raises(UnknownNameError, match=hint):
        create_criterion(given)


@pytest.mark.parametrize("name", list_criteria())
def test_an_unknown_hyper_parameter_names_the_close_ones(name: str) -> None:
    valid = [field.name for field in fields(criterion_class(name))]
    hint = f"did you mean.*'{valid[0]}'" if valid else "Available: none"
    with pytest.raises(UnknownNameError, match=f"of criterion '{name}'.*{hint}"):
        create_criterion(name, **{(valid or ["setting"])[0] + "s": 1})


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'rnp' is registered already"):
        register_criterion("rnp")(criterion_class("anp"))
    assert criterion_class("rnp").__name__ == "RNP"


def test_a_notebook_cell_can_be_run_twice() -> None:
    def cell() -> type[Criterion]:
        @register_criterion("of a notebook")
        @dataclass(frozen=True, kw_only=True)
        class Mine(Criterion):
            def score(
                self,
                model: nn.Module,
                clean: CleanData,
                sites: tuple[Site, ...],
                generator: torch.Generator,
                progress: bool,
            ) -> ChannelScores:
                return ChannelScores(sites, torch.rand(sum(s.channels for s in sites)), repr(self))

        return Mine

    try:
        cell()
        latest = cell()
        assert criterion_class("of a notebook") is latest
        assert latest.paper() == latest()  # one method is enough
        assert latest.needs_labels
    finally:
        del _CRITERIA._classes["of a notebook"]


# ---- scores -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_scores_cover_every_neuron_and_are_finite(
    criterion: Criterion, trained: nn.Module, clean: CleanData, expected: ChannelScores
) -> None:
    sites, scores = find_sites(trained, clean.images[:2]), expected
    assert scores.sites == sites
    assert list(scores.by_site()) == [site.name for site in sites]
    assert all(scores[site.name].shape == (site.channels,) for site in sites)
    assert scores.flat.dtype == torch.float32
    assert scores.flat.device.type == "cpu"
    assert not scores.flat.requires_grad
    assert torch.isfinite(scores.flat).all()
    assert len(scores.flat.unique()) > 1  # a verdict, not a constant
    assert scores.criterion == repr(criterion)


@pytest.mark.slow
def test_only_the_given_sites_are_scored(
    criterion: Criterion, trained: nn.Module, clean: CleanData
) -> None:
    subset = find_sites(trained, clean.images[:2])[2:6:2]
    scores = criterion(trained, clean, sites=subset, seed=4)
    assert scores.sites == subset
    assert torch.isfinite(scores.flat).all()
    assert len(scores.flat) == sum(site.channels for site in subset)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_scores_bit_for_bit(
    criterion: Criterion, trained: nn.Module, clean: CleanData, expected: ChannelScores
) -> None:
    torch.manual_seed(99)  # whatever the global generators are at
    np.random.seed(99)
    random.seed(99)
    assert_same_scores(expected, criterion(trained, clean, seed=0))


@pytest.mark.slow
def test_random_loaders_are_seeded_too(trained: nn.Module, clean: CleanData) -> None:
    """Augmentation draws from torch, numpy or random; `seed` starts all three."""
    criterion = create_criterion("anp", **FAST["anp"]["response"])

    def loader(draw: Callable[[], Any]) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in batches(clean):
            yield images + draw(), labels

    for draw in (lambda: torch.randn(1), np.random.rand, random.random):
        first, again, other = (criterion(trained, loader(draw), seed=seed) for seed in (5, 5, 6))
        assert_same_scores(first, again)
        assert not torch.equal(first.flat, other.flat)


@pytest.mark.slow
def test_modes_trainability_and_the_size_of_batches_do_not_matter(
    criterion: Criterion, trained: nn.Module, clean: CleanData, expected: ChannelScores
) -> None:
    training = copy.deepcopy(trained).train()
    assert_same_scores(expected, criterion(training, [(clean.images, clean.targets)]))
    frozen = copy.deepcopy(trained).requires_grad_(False)
    world = World.around(frozen)
    assert_same_scores(expected, criterion(frozen, batches(clean, 7)))
    world.assert_unchanged(frozen)


@pytest.mark.slow
def test_no_grad_and_progress_bars_change_nothing(
    criterion: Criterion,
    trained: nn.Module,
    clean: CleanData,
    expected: ChannelScores,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with torch.no_grad():
        assert_same_scores(expected, criterion(trained, clean, progress=True))
        assert not torch.is_grad_enabled()
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err == ""  # no terminal, no bar


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # one-core machines
@pytest.mark.parametrize("name", ["anp", "clp", "fp"])  # the loader is read before `score`
def test_workers_of_the_loader_do_not_matter(
    name: str, trained: nn.Module, clean: CleanData
) -> None:
    criterion = create_criterion(name, **next(iter(FAST.get(name, {"default": {}}).values())))
    data, results = TensorDataset(clean.images, clean.targets), []
    for workers in (0, 1, 2):
        torch.manual_seed(workers)  # shuffling draws from the global generator
        loader = DataLoader(data, batch_size=16, shuffle=True, num_workers=workers)
        results.append(criterion(trained, loader))
    assert_same_scores(results[0], results[1])
    assert_same_scores(results[0], results[2])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_are_scored_in_their_own(
    criterion: Criterion, trained: nn.Module, clean: CleanData, dtype: torch.dtype
) -> None:
    """The images stay float32: what a loader gives."""
    model = trained.to(dtype)
    world = World.around(model)
    scores = criterion(model, clean)
    world.assert_unchanged(model)
    assert scores.flat.dtype == torch.float32
    assert torch.isfinite(scores.flat).all()
    assert len(scores.flat.unique()) > 1


# ---- the model and the world are left as they were ----------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_changes_when_the_loader_raises_midway(
    criterion: Criterion, lived_in: nn.Module, clean: CleanData, error: type[BaseException]
) -> None:
    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        yield clean.images[:16] + torch.randn(1), clean.targets[:16]
        np.random.rand()
        random.random()
        raise error("disk")

    world = World.around(lived_in)
    with pytest.raises(error, match="disk"):
        criterion(lived_in, loader())
    world.assert_unchanged(lived_in)


@pytest.mark.slow
def test_nothing_changes_by_work_that_ends_or_is_stopped(
    criterion: Criterion, lived_in: nn.Module, clean: CleanData
) -> None:
    calls, last = [], 0
    error: type[BaseException] = RuntimeError

    def stop(*_: object) -> None:  # runs on the criterion's private copy as well
        calls.append(True)
        if len(calls) == last:
            raise error("stop")

    lived_in.layer3.register_forward_hook(stop)
    images, labels = clean.images.clone(), clean.targets.clone()
    world = World.around(lived_in)
    criterion(lived_in, clean, seed=7)
    world.assert_unchanged(lived_in)
    assert torch.equal(clean.images, images)
    assert torch.equal(clean.targets, labels)
    whole = len(calls)
    for last, error in ((whole, RuntimeError), ((whole + 1) // 2, KeyboardInterrupt)):
        calls.clear()
        with pytest.raises(error, match="stop"):
            criterion(lived_in, clean, seed=7)
        assert len(calls) == last
        world.assert_unchanged(lived_in)


@pytest.mark.slow
def test_what_the_caller_has_set_changes_no_score(
    criterion: Criterion, trained: nn.Module, clean: CleanData, expected: ChannelScores
) -> None:
    """With gradient checkpointing a block would be computed again without its masks."""
    checkpointed = copy.deepcopy(trained)
    checkpointed.set_grad_checkpointing(True)  # type: ignore[operator]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            assert_same_scores(expected, criterion(checkpointed, clean))
            assert torch.is_inference_mode_enabled()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert checkpointed.grad_checkpointing is True


class Recomputing(nn.Module):
    """A network that checkpoints by itself, without a switch that anybody knows."""

    def __init__(self, net: nn.Module, reentrant: bool, rounded: bool = False) -> None:
        super().__init__()
        self.net, self.reentrant, self.rounded = net, reentrant, rounded

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        net: Any = self.net
        if self.rounded:  # no gradient reaches the images
            x = (x * 8).to(torch.int8).to(x) / 8
        x = net.maxpool(net.act1(net.bn1(net.conv1(x))))
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return net.forward_head(x)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_network_that_recomputes_by_itself_is_refused_where_it_would_matter(
    criterion: Criterion, net: nn.Module, clean: CleanData, reentrant: bool, rounded: bool
) -> None:
    model = Recomputing(net, reentrant, rounded).eval()
    if criterion.needs_images and criterion.needs_gradients:
        with pytest.raises(UnsupportedModelError, match="again in the backward pass"):
            criterion(model, clean)
    else:
        scores = criterion(model, clean).flat
        if rounded:
            assert torch.isfinite(scores).all()
        else:
            assert torch.equal(scores, criterion(net, clean).flat)


class Odd(nn.Module):
    """A network with habits that get in the way of gradients through images, and of copying."""

    def __init__(self, net: nn.Module, habit: str) -> None:
        super().__init__()
        self.net, self.habit, self.kept = net, habit, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        if self.habit == "numpy":
            x = torch.from_numpy(x.detach().numpy().copy())
        elif self.habit == "in place":
            x = x.clone().sigmoid_().mul_(2).logit_(1e-3)
        elif self.habit == "graph in place":
            x = x.sigmoid().mul_(2)
        elif self.habit == "no grad":
            with torch.no_grad():
                x = x + 0
        logits: Tensor = self.net(x)
        if self.habit == "keeps":
            self.kept = [logits]
        return logits


@pytest.mark.slow
@pytest.mark.parametrize("habit", ["numpy", "in place", "graph in place", "no grad", "keeps"])
@pytest.mark.parametrize("name", ["anp", "rnp"])
def test_odd_networks_are_not_taken_for_recomputing_ones(
    net: nn.Module, clean: CleanData, name: str, habit: str
) -> None:
    settings = FAST[name]["response"]
    scores = create_criterion(name, **settings)(Odd(net, habit).eval(), clean)
    assert torch.isfinite(scores.flat).all()


def test_a_scan_refuses_a_network_that_recomputes(net: nn.Module, clean: CleanData) -> None:
    model = Recomputing(net, reentrant=False).eval()
    with pytest.raises(UnsupportedModelError, match="again in the backward pass"):
        scan(model, clean, progress=False)


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_criterion_that_needs_labels_says_so(
    criterion: Criterion, trained: nn.Module, clean: CleanData
) -> None:
    unlabelled = CleanData(clean.images)
    if not criterion.needs_labels:
        assert torch.isfinite(criterion(trained, unlabelled).flat).all()
        return
    with pytest.raises(DataError, match="expected labelled clean images"):
        criterion(trained, unlabelled)


@pytest.mark.parametrize("name", [n for n in list_criteria() if criterion_class(n).needs_batchnorm])
def test_a_criterion_that_needs_batchnorm_says_so(name: str, clean: CleanData) -> None:
    """It is said before any scoring, and what the layers are instead."""
    with pytest.raises(UnsupportedModelError, match=r"running statistics.*these are: .*Linear"):
        create_criterion(name)(build("mixer"), clean)


@pytest.mark.parametrize(
    "name", [n for n in list_criteria() if not criterion_class(n).needs_images]
)
def test_a_criterion_that_needs_no_images_does_not_read_them(
    name: str, trained: nn.Module, clean: CleanData
) -> None:
    criterion, other = create_criterion(name), CleanData(noise_images(3, seed=9))
    assert_same_scores(criterion(trained, clean), criterion(trained, other))


def test_a_model_without_sites_is_refused(criterion: Criterion, clean: CleanData) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(clean.images[0].numel(), 10))
    with pytest.raises(UnsupportedModelError, match=r"found no neuron.*Flatten, Linear"):
        criterion(model, clean)


def test_a_model_with_nan_is_refused(
    criterion: Criterion, trained: nn.Module, clean: CleanData
) -> None:
    with torch.no_grad():
        trained.layer1[0].conv1.weight[0, 0] = torch.nan
    with pytest.raises(UnsupportedModelError, match=r"layer1.0.conv1.weight.*NaN or inf"):
        criterion(trained, clean)


def test_a_wrapped_model_is_refused(
    criterion: Criterion, trained: nn.Module, clean: CleanData
) -> None:
    with pytest.raises(UnsupportedModelError, match=r"DataParallel.*model\.module"):
        criterion(nn.DataParallel(trained), clean)


def test_scores_for_other_sites_than_asked_are_an_error(
    trained: nn.Module, clean: CleanData
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Wrong(Criterion):
        reference = "none"
        needs_labels = False

        @classmethod
        def paper(cls) -> Wrong:
            return cls()

        def score(self, model: Any, clean: Any, sites: Any, *_: Any) -> ChannelScores:
            other = (Site("bn1", 1, "norm", "conv1"),)
            return ChannelScores(other, torch.zeros(1), "wrong")

    with pytest.raises(ScoringError, match="Wrong did not score the sites"):
        Wrong()(trained, clean)
