"""The plain call: prune a little, distil, rank again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.criteria import Arbitrary
from helpers.networks import planted
from helpers.states import assert_same_state, state_of
from nnprune_backdoor import CleanData, Criterion, Purified, purify
from nnprune_backdoor.core.agreement import Agreement
from nnprune_backdoor.core.predictions import predict
from nnprune_backdoor.core.scores import ChannelScores, Selection, lowest
from nnprune_backdoor.core.sites import Site
from nnprune_backdoor.criteria import RNP
from nnprune_backdoor.errors import DataError, ScoringError
from nnprune_backdoor.reports import Report
from nnprune_backdoor.selectors import LowestFraction, Stages
from nnprune_backdoor.training import Distillation
from nnprune_backdoor.utils.statistics import Rate


@pytest.fixture(scope="module")
def before() -> tuple[nn.Module, CleanData, Tensor, int]:
    """A network, clean images, triggered ones, and the target."""
    return planted()


@pytest.fixture(scope="module")
def purified(before: Any) -> Iterator[Purified]:
    model, clean, _, _ = before
    given = state_of(model)
    yield purify(model, clean, RNP(), selector=Stages(most=2), progress=False)
    assert_same_state(given, state_of(model))


@pytest.fixture
def quick(before: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, CleanData]:
    """The network, fewer images, and short distilling."""
    model, clean, _, _ = before
    monkeypatch.setattr(Distillation, "closer", partial(Distillation, epochs=2))
    return model, clean.take(torch.arange(80))


def obeys(model: nn.Module, triggered: Tensor, target: int) -> float:
    return (predict(model, triggered) == target).float().mean().item()


def test_the_backdoor_goes_and_accuracy_stays(before: Any, purified: Purified) -> None:
    model, clean, triggered, target = before
    others = triggered[predict(model, clean.images) != target]
    assert obeys(model, others, target) > 0.95
    assert obeys(purified.model, others, target) < 0.2
    right = (predict(purified.model, clean.images) == clean.targets).float().mean()
    assert right > 0.95
    assert purified.agreement is not None and purified.agreement.same.value > 0.95


def test_silent_neurons_are_of_every_stage_up_to_the_one_that_was_kept(purified: Purified) -> None:
    total = len(purified.scores.flat)
    assert [stage.silent for stage in purified.stages] == [
        round(0.05 * total) * number for number in range(1, len(purified.stages) + 1)
    ]
    (kept,) = [stage for stage in purified.stages if stage.kept]
    assert kept.silent == len(purified.selection)
    assert kept.agreement.divergence == min(s.agreement.divergence for s in purified.stages)
    assert purified.removal is not None and len(purified.removal.removed) > 0
    assert purified.repaired and "like the given one" in purified.selection.reason


def test_the_report_tells_the_stages(purified: Purified) -> None:
    data = purified.to_dict()
    assert [stage["silent"] for stage in data["stages"]] == [s.silent for s in purified.stages]
    assert Report.from_dict(data).agreement == data["agreement"]
    older = {name: e for name, e in data.items() if name not in ("stages", "agreement")}
    assert Report.from_dict(older).stages == []
    page, text = purified.to_markdown(), purified.summary()
    assert "## Stages" in page and "| 1 |" in page
    assert "agreement  " in text and "towards the given model's answers" in text
    assert any("nothing here shows that a backdoor went" in line for line in purified.cautions)


class Failing(Arbitrary):
    """Ranks the network as given, and refuses one that was distilled."""

    def score(self, model: nn.Module, *args: Any) -> ChannelScores:
        weights = torch.cat([weight.flatten() for weight in model.parameters()])
        if not (weights == GIVEN[0]).all():
            raise ScoringError("cannot rank this")
        return super().score(model, *args)


GIVEN: list[Tensor] = []


def test_a_criterion_that_fails_later_ends_the_stages(quick: Any) -> None:
    model, clean = quick
    GIVEN[:] = [torch.cat([weight.flatten() for weight in model.parameters()])]
    purified = purify(model, clean, Failing(), progress=False)
    assert len(purified.stages) == 1
    assert purified.selection.reason.endswith("the next stage failed: cannot rank this")
    other = copy.deepcopy(model)
    next(iter(other.parameters())).data.mul_(2)
    with pytest.raises(ScoringError, match="cannot rank this"):
        purify(other, clean, Failing(), progress=False)


def test_labels_are_optional_where_the_criterion_needs_none(quick: Any) -> None:
    model, clean = quick
    images = CleanData(clean.images)
    purified = purify(model, images, "magnitude", selector=Stages(most=1), progress=False)
    assert purified.accuracy is None and purified.agreement is not None
    with pytest.raises(DataError, match="labelled"):
        purify(model, images, "rnp", progress=False)


def test_any_selector_can_be_followed_by_distilling(quick: Any) -> None:
    model, clean = quick
    deep = LowestFraction(0.3)
    pruned = purify(model, clean, "magnitude", selector=deep, progress=False)
    learned = purify(model, clean, "magnitude", selector=deep, repair="distil", progress=False)
    assert not pruned.repaired and learned.repaired and not learned.stages
    assert pruned.selection.neurons == learned.selection.neurons
    assert pruned.agreement is not None and learned.agreement is not None
    assert learned.agreement.divergence < pruned.agreement.divergence
    again = purify(model, clean, "magnitude", selector=deep, repair="distil", progress=False)
    assert_same_state(state_of(learned.model), state_of(again.model))


@pytest.mark.parametrize("repair", ["none", "unlearn"])
def test_stages_need_distilling(repair: Any, before: Any) -> None:
    model, clean, _, _ = before
    with pytest.raises(DataError, match="'stages' ranks a network that was distilled"):
        purify(model, clean, "tac", selector="stages", repair=repair, progress=False)


# --- the rule -----------------------------------------------------------------------------------


def agreements(*divergences: float) -> list[Agreement]:
    return [Agreement(Rate(9, 10), divergence) for divergence in divergences]


def test_it_goes_on_while_networks_stay_as_alike() -> None:
    rule = Stages(most=3)
    assert rule.goes_on(agreements(0.2))
    assert rule.goes_on(agreements(0.2, 0.1))
    assert not rule.goes_on(agreements(0.2, 0.3))
    assert not rule.goes_on(agreements(0.3, 0.2, 0.1))
    assert rule.best(agreements(0.2, 0.1, 0.3)) == 1
    assert not Stages(most=1).goes_on(agreements(0.2))


def test_more_neurons_are_added_to_the_silent_ones_whatever_their_scores() -> None:
    sites = (Site("a", 6, "layer", "a"), Site("b", 4, "layer", "b"))
    first = ChannelScores(sites, torch.arange(10.0), "test")
    silent = Stages(share=0.3).more(first, Selection(sites, ()))
    assert silent.neurons == lowest(first, 3).neurons
    other = ChannelScores(sites, -torch.arange(10.0), "test")
    both = Stages(share=0.3).more(other, silent)
    assert both.neurons[:3] == silent.neurons
    assert both.neurons[3:] == lowest(other, 3).neurons
    most = Stages(share=0.9).more(other, both)
    assert len(most) == 8  # each layer keeps one
    assert {site: len(gone) for site, gone in most.by_site().items()} == {"a": 5, "b": 3}


@pytest.mark.parametrize("given", [{"share": 0.0}, {"share": 1.0}, {"most": 0}])
def test_settings_are_checked(given: Any) -> None:
    with pytest.raises(DataError):
        Stages(**given)


def test_the_criterion_is_asked_about_the_distilled_network(quick: Any) -> None:
    """And not about the silent neurons of the given one."""
    model, clean = quick
    asked: list[nn.Module] = []

    class Asked(Arbitrary):
        def score(self, model: nn.Module, *args: Any) -> ChannelScores:
            asked.append(copy.deepcopy(model))
            return super().score(model, *args)

    criterion: Criterion = Asked()
    purified = purify(model, clean, criterion, selector=Stages(most=2), progress=False)
    assert len(asked) == len(purified.stages)
    assert_same_state(state_of(asked[0]), state_of(model))
    if len(asked) > 1:
        site = purified.selection.neurons[0]
        assert asked[1].get_submodule(site.site).weight[site.channel].abs().sum() == 0
