"""The plain call: prune a little, distil, remove."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from helpers.networks import planted
from helpers.settings import shorten_training
from helpers.states import assert_same_state, state_of
from nnprune_backdoor import CleanData, Purified, Selector, create_criterion, purify
from nnprune_backdoor.core.agreement import Agreement
from nnprune_backdoor.core.measures import SuspectLabel
from nnprune_backdoor.core.predictions import predict, predict_logits
from nnprune_backdoor.core.scores import ChannelScores, Selection, lowest
from nnprune_backdoor.core.sites import Site
from nnprune_backdoor.criteria import Unlearning
from nnprune_backdoor.errors import DataError
from nnprune_backdoor.pipeline import job
from nnprune_backdoor.reports import Report
from nnprune_backdoor.selectors import AccuracyBudget, LowestCount, LowestFraction
from nnprune_backdoor.selectors.accuracy import amounts_to_try
from nnprune_backdoor.selectors.agreement import Agreeing
from nnprune_backdoor.training import Distillation
from nnprune_backdoor.triggers import Inversion, SuspectLabels, UniversalPerturbation
from nnprune_backdoor.utils.statistics import Rate


@pytest.fixture(scope="module")
def before() -> tuple[nn.Module, CleanData, Tensor, int]:
    """A network, clean images, triggered ones, and the target."""
    return planted()


@pytest.fixture(scope="module")
def purified(before: Any) -> Iterator[Purified]:
    model, clean, _, _ = before
    given = state_of(model)
    yield purify(model, clean.take(torch.arange(160)), "rnp", progress=False)
    assert_same_state(given, state_of(model))


@pytest.fixture
def quick(before: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, CleanData]:
    """The network, fewer images, and short distilling."""
    model, clean, _, _ = before
    shorten_training(monkeypatch)
    return model, clean.take(torch.arange(80))


def obeys(model: nn.Module, triggered: Tensor, target: int) -> float:
    return (predict(model, triggered) == target).float().mean().item()


@pytest.mark.slow
def test_the_backdoor_goes_and_accuracy_stays(before: Any, purified: Purified) -> None:
    model, clean, triggered, target = before
    others = triggered[predict(model, clean.images) != target]
    assert obeys(model, others, target) > 0.95
    assert obeys(purified.model, others, target) < 0.2
    right = (predict(purified.model, clean.images) == clean.targets).float().mean()
    assert right > 0.95
    assert purified.agreement is not None and purified.agreement.same.value > 0.95


@pytest.mark.slow
def test_a_share_of_the_neurons_is_taken_out_of_the_tensors(purified: Purified) -> None:
    assert 0 < len(purified.selection) <= round(0.05 * len(purified.scores.flat))
    assert purified.removal is not None and len(purified.removal.removed) > 0
    assert purified.removal.drift < 1e-4  # of the distilled network's logits
    assert purified.repaired


@pytest.mark.slow
def test_the_report_tells_how_alike_the_networks_are(purified: Purified) -> None:
    data = purified.to_dict()
    assert Report.from_dict(data).agreement == data["agreement"]
    older = {name: entry for name, entry in data.items() if name != "agreement"}
    assert Report.from_dict(older).agreement is None
    assert Report.from_dict(data).suspects == data["suspects"]
    page, text = purified.to_markdown(), purified.summary()
    assert "| same label |" in page
    assert "agreement  " in text and "towards the given model's answers" in text
    assert any("nothing here shows that a backdoor went" in line for line in purified.cautions)


def test_agreement_is_of_answers(before: Any) -> None:
    model, clean, triggered, _ = before
    images = torch.cat([clean.images[:20], triggered[:12]])
    logits = predict_logits(model, images)
    assert Agreement.of(model, copy.deepcopy(model), images) == Agreement(Rate(32, 32), 0.0)
    other = copy.deepcopy(model)
    other.get_classifier().bias.data += torch.tensor([40.0, 0, 0, 0])
    found = Agreement.of(model, other, images)
    changed = predict_logits(other, images)
    assert found.same.hits == (logits.argmax(1) == changed.argmax(1)).sum() < 32
    wanted, given = logits.log_softmax(1), changed.log_softmax(1)
    divergence = (wanted.exp() * (wanted - given)).sum(1).mean().item()
    assert found.divergence == pytest.approx(divergence, rel=1e-4)

    before = state_of(other.train())
    assert Agreement.of(model, other, images) == found
    assert_same_state(before, state_of(other))
    assert other.training


def test_a_criterion_gets_the_models_answers_where_there_are_no_labels(quick: Any) -> None:
    model, clean = quick
    answers = CleanData(clean.images, predict(model, clean.images))
    rnp = create_criterion("rnp", unlearning=Unlearning(epochs=2, missed="flag", batch_size=32))
    unlabelled = purify(model, CleanData(clean.images), rnp, progress=False)
    assert unlabelled.accuracy is None and unlabelled.agreement is not None
    assert any("took the model's own answers" in line for line in unlabelled.cautions)
    with pytest.raises(DataError, match="labelled"):
        rnp(model, CleanData(clean.images))
    with pytest.raises(DataError, match="labelled"):
        purify(model, CleanData(clean.images), rnp, selector="accuracy", progress=False)
    labelled = purify(model, answers, rnp, progress=False)
    assert not any("own answers" in line for line in labelled.cautions)


def test_any_selector_can_be_followed_by_distilling(quick: Any) -> None:
    model, clean = quick
    deep = LowestFraction(0.3)
    pruned = purify(model, clean, "magnitude", selector=deep, progress=False)
    learned = purify(model, clean, "magnitude", selector=deep, repair="distil", progress=False)
    assert not pruned.repaired and learned.repaired
    assert pruned.suspects is None and learned.suspects is not None
    assert pruned.selection.neurons == learned.selection.neurons
    assert pruned.agreement is not None and learned.agreement is not None
    assert learned.agreement.divergence < pruned.agreement.divergence
    again = purify(model, clean, "magnitude", selector=deep, repair="distil", progress=False)
    assert_same_state(state_of(learned.model), state_of(again.model))


@pytest.mark.parametrize("suspicious", [0.0, 1.0])
def test_it_is_said_whether_a_label_was_suspected(
    suspicious: float, before: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, clean, _, _ = before
    search = SuspectLabels(
        labels=1,
        suspicious=suspicious,
        working=0.0,
        perturbations=UniversalPerturbation(steps=1, rms=1e-6),
        patches=Inversion(steps=1),
        far=0.0,
    )
    monkeypatch.setattr(job, "Distillation", partial(Distillation, epochs=1, search=search))
    purified = purify(model, clean.take(torch.arange(80)), "magnitude", progress=False)
    page, text = purified.to_markdown(), purified.summary()
    assert purified.suspects is not None
    assert len(purified.suspects) == len(purified.to_dict()["suspects"]) == (suspicious == 0)
    assert ("suspect    no label" in text) == (suspicious == 1)
    assert ("against triggers of the suspect labels" in text) == (suspicious == 0)
    assert ("no trigger was trained against" in page) == (suspicious == 1)
    assert ("by a small perturbation" in page) == (suspicious == 0)


def test_a_suspect_label_is_told_where_no_image_can_tell_more(quick: Any) -> None:
    """Of images that the given model has all at this label already."""
    model, clean = quick
    answers = predict(model, clean.images)
    label = int(answers[0])
    there = clean.take((answers == label).nonzero().flatten())
    purified = purify(model, clean, "magnitude", repair="none", progress=False)
    suspect = SuspectLabel.of(label, torch.clone, model, model, there)
    assert suspect == SuspectLabel(label, None, None)
    told = replace(purified, suspects=(suspect,), given=replace(purified.given, repair="distil"))
    assert told.to_dict()["suspects"] == [{"label": label, "before": None, "after": None}]
    assert Report.from_dict(told.to_dict()).suspects == told.to_dict()["suspects"]
    assert f"suspect    label {label}: no image was left" in told.summary()
    assert "| suspect label | **not measured** |" in told.to_markdown()


@pytest.mark.parametrize(
    ("given", "selector", "repair"),
    [
        ({}, Agreeing(), "distil"),
        ({"repair": "distil"}, Agreeing(), "distil"),
        ({"repair": "none"}, AccuracyBudget(), "none"),
        ({"selector": "accuracy"}, AccuracyBudget(), "none"),
        ({"selector": LowestCount(3), "repair": "distil"}, LowestCount(3), "distil"),
    ],
)
def test_selector_and_repair_where_one_is_not_given(
    given: dict[str, Any], selector: Selector, repair: str, quick: Any
) -> None:
    model, clean = quick
    purified = purify(model, clean, "magnitude", progress=False, **given)
    assert purified.given.selector == selector and purified.given.repair == repair


@dataclass(frozen=True)
class Recovering(LowestCount):
    """Counts on the selecting images what a repair left, as `trigger` does."""

    recovers_triggers: ClassVar[bool] = True


@pytest.mark.parametrize(("selector", "count"), [(LowestCount(2), 68), (Recovering(2), 48)])
def test_what_is_counted_on_once_more_does_not_teach(
    selector: Selector, count: int, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = []

    def watched(
        student: nn.Module, teacher: nn.Module, clean: CleanData, *_: Any, **__: Any
    ) -> Any:
        taught.append(len(clean))
        return student, ()

    monkeypatch.setattr(job, "distil_with_triggers", watched)
    model, clean = quick
    purified = purify(model, clean, "magnitude", selector=selector, repair="distil", progress=False)
    assert taught == [count]
    assert purified.given.parts == (48, 20, 12)


class Changing:
    """A hundred held-out images; each silent neuron changes the labels of so many."""

    def __init__(self, each: float) -> None:
        self.clean, self.each = CleanData(torch.zeros(100, 1, 2, 2)), each

    def predict(self, selection: Selection, images: Tensor) -> Tensor:
        return (torch.arange(len(images)) < self.each * len(selection)).long()


@pytest.mark.parametrize(
    ("each", "count"),
    [(0.0, 50), (0.1, 50), (1.0, 15), (5.0, 3), (40.0, 1)],
)
def test_the_amount_is_what_the_answers_bear(each: float, count: int) -> None:
    scores = ChannelScores((Site("a", 1000, "layer", "a"),), torch.arange(1000.0), "test")
    rule = Agreeing(points=200)  # all amounts up to 50
    selection = rule(scores, Changing(each))  # type: ignore[arg-type]
    assert selection.neurons == lowest(scores, count).neurons
    assert f"{min(1.0, each * count / 100):.1%} of 100 held-out images" in selection.reason
    assert [p.neurons for p in selection.curve] == [0, *amounts_to_try(1000, 0.05, 200)]
    for point in selection.curve:
        assert point.same == pytest.approx(1 - min(1.0, each * point.neurons / 100), abs=0.01)
        assert math.isnan(point.drop) and point.success is None, "there are no labels"
    with pytest.raises(DataError, match="held-out"):
        rule(scores)
