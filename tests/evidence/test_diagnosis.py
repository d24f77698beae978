"""Evidence of a backdoor, on networks whose backdoor is written by hand and on benign ones."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from helpers.handmade import TRIGGER, Handmade, pictures, ranked
from helpers.settings import FEW, QUICK, SCAN
from helpers.states import assert_same_state, hooks_of, state_of
from nnprune_backdoor import CleanData, Diagnosis, create_selector, purify, scan
from nnprune_backdoor.core.held_out import HeldOut
from nnprune_backdoor.core.masks import silence_
from nnprune_backdoor.core.predictions import images_per_pass
from nnprune_backdoor.core.scores import lowest
from nnprune_backdoor.core.sites import find_sites
from nnprune_backdoor.criteria import Unlearning
from nnprune_backdoor.errors import DataError, ScoringError
from nnprune_backdoor.evidence import (
    Restoration,
    Scan,
    Suspicion,
    expose,
    limits,
    probability,
    scanning,
)
from nnprune_backdoor.evidence.probability import ALARM, KINDS, RESTORED, SIZE, UNIVERSAL
from nnprune_backdoor.reports import scan_plots, scan_to_html, scan_to_markdown
from nnprune_backdoor.selectors import Auto, TriggerGone
from nnprune_backdoor.triggers import Inversion, UniversalPerturbation

SHORT = Scan(search=Inversion(steps=10, batch_size=8), min_success=0.1, **FEW)
AUTO = Auto(evidence=SCAN, gone=TriggerGone(inversion=QUICK, max_fraction=1.0))
CALIBRATION = Path(__file__).parents[2] / "benchmarks" / "results" / "calibration.json"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Small triggers alone speak for a backdoor, among few classes and images as well."""
    monkeypatch.setattr(limits, "FEWEST_CLASSES", 2)
    monkeypatch.setattr(limits, "FEWEST_IMAGES", 20)
    for kind in (UNIVERSAL, RESTORED):
        monkeypatch.setitem(KINDS, kind, replace(KINDS[kind], weight=0.0))
    monkeypatch.setitem(KINDS, SIZE, replace(KINDS[SIZE], middle=1.0, weight=5.0))
    return monkeypatch


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Handmade(3, target=1).eval()


@pytest.fixture
def images() -> CleanData:
    return pictures(3)


def look(model: nn.Module, images: CleanData, **settings: Any) -> Diagnosis:
    # the trigger's channel is silent at its bias, not at zero
    return SCAN(model, CleanData(images.images), silencing="constant", **settings)


def stamped(images: Tensor) -> Tensor:
    """With the checkerboard that `Handmade` obeys."""
    made = images.clone()
    made[:, :, 4:7, 8:11] = ((torch.arange(9).reshape(3, 3) % 2 == 0).float() - 0.4) / 0.2
    return made


# ---- scan ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_planted_backdoor_raises_the_alarm_and_is_shown(
    model: nn.Module, images: CleanData, told: pytest.MonkeyPatch
) -> None:
    model.train()
    before, hooks, random = state_of(model), hooks_of(model), torch.get_rng_state()
    found = look(model, images)
    assert_same_state(before, state_of(model))
    assert hooks == hooks_of(model)
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert found.alarm and found.target == 1
    assert found.probability == found.suspicions[0].probability >= ALARM
    assert found.trigger is not None and found.trigger.target == 1
    assert found.restored is not None
    assert [neuron.channel for neuron in found.restored.selection.neurons] == [TRIGGER]
    assert "evidence of a backdoor with target 1" in found.summary()
    assert "relative size" in found.summary() and "speaks for a backdoor" in found.summary()
    assert found.example.untyped_storage().nbytes() == found.example.nbytes
    json.dumps(found.to_dict())
    _shows(found)
    _finds_triggered(found, images)


def _shows(found: Diagnosis) -> None:
    page, text = scan_to_html(found), scan_to_markdown(found)
    for said in (page, text):
        assert "Scan for a backdoor" in said
        assert "label 1" in said
        assert "no proof" in said
        assert "A universal perturbation" in said
    assert page.count("data:image/png;base64,") == 2 + 2 * 3
    assert "data:image" not in scan_to_html(found, pictures=False)
    heights = [bar.get_height() for bar in scan_plots.labels(found).axes[0].patches]
    assert heights == pytest.approx([p.success for p in found.perturbations])


def _finds_triggered(found: Diagnosis, images: CleanData) -> None:
    others = images.images[images.targets != 1]
    clean, bad = found.suspicious(others), found.suspicious(stamped(others))
    assert clean.max() < bad.min()
    with pytest.raises(DataError, match="NaN"):
        found.suspicious(torch.full((1, 3, 16, 16), torch.nan))
    exposed = expose(found.model, images, Unlearning(lr=0.05, epochs=5, missed="flag"))
    by = found.suspicious(others, exposed)
    assert by.shape == (len(others),) and by.min() >= 0 and by.max() <= 1
    with pytest.raises(ScoringError, match="no trigger"):
        replace(found, restored=None).suspicious(others)


@pytest.mark.slow
def test_a_report_never_says_clean(net: nn.Module, clean: CleanData) -> None:
    found = SHORT(net, clean)
    assert not found.alarm and found.target is None
    words = found.summary()
    assert "clean network" not in words and "safe" not in words
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["alarm"] is False and plain["images"] == len(clean)


def test_it_is_repeatable_and_does_not_look_at_labels(model: nn.Module, images: CleanData) -> None:
    """Labelled, unlabelled or wrongly labelled."""
    wrong = CleanData(images.images, (images.targets + 1) % 3)
    sets = (images, CleanData(images.images), wrong)
    found = [SHORT(model, some, seed=4).suspicions for some in sets]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("some", "why"),
    [
        (slice(0, 10), "10 images are too few"),
        (slice(0, 96, 3), "the model calls 100% of the images 0"),
    ],
)
def test_images_that_say_too_little_give_no_probability(
    model: nn.Module, images: CleanData, told: pytest.MonkeyPatch, some: slice, why: str
) -> None:
    found = SHORT(model, CleanData(images.images[some]), seed=1)
    assert found.probability is None and not found.alarm
    assert found.cannot_tell is not None and why in found.cannot_tell
    assert "cannot tell" in found.summary() and why in found.summary()


def test_large_images_and_few_classes_give_no_probability(model: nn.Module) -> None:
    data = CleanData(torch.randn(4, 3, 65, 65))
    assert "65 x 65" in str(limits.why_not_told(model, data, 10))
    small = CleanData(torch.randn(4, 3, 64, 64))
    assert "4 classes" in str(limits.why_not_told(model, small, 4))


@pytest.mark.slow
@pytest.mark.parametrize("colours", [1, 3])
def test_two_classes_and_grey_images(colours: int) -> None:
    """One colour: bright against dark, two classes; there is nothing to compare with."""
    torch.manual_seed(0)
    found = look(Handmade(colours, target=1).eval(), pictures(colours))
    restored = {item.label: item[RESTORED] for item in found.suspicions}
    assert restored[1] > 0.9
    assert found.probability is None


def test_very_many_classes_are_screened_first(model: nn.Module, images: CleanData) -> None:
    screen = UniversalPerturbation(steps=10, batch_size=4, held_out=0.5)
    many = replace(SHORT, screened=2, compared=1, screen=screen, screen_images=30)
    found = many(model, CleanData(images.images), silencing="constant")
    sought = [perturbation.target for perturbation in found.perturbations]
    assert 1 in sought, "the planted target was screened out"
    assert len(sought) == 2
    assert {trigger.target for trigger in found.triggers} == {0, 1, 2}
    # sorted by class, as a folder is read, so that the first images all have the target's label
    order = torch.cat([(images.targets == 1).nonzero(), (images.targets != 1).nonzero()]).flatten()
    found = many(model, CleanData(images.images[order]), silencing="constant")
    assert 1 in [perturbation.target for perturbation in found.perturbations]


def test_there_may_be_more_classes_than_images() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=50).eval()
    quick = replace(SHORT, screen=replace(SHORT.screen, steps=2))
    found = quick(model, CleanData(pictures(3).images[:30]))
    assert found.classes == 50
    assert len(found.perturbations) == 10 and len(found.triggers) == 5


def test_labels_to_look_at_are_compared_with_others(model: nn.Module, images: CleanData) -> None:
    found = SHORT(model, images, labels=[2])
    assert [item.label for item in found.suspicions] == [2]
    assert {trigger.target for trigger in found.triggers} == {0, 1, 2}


def test_settings_are_checked() -> None:
    for settings in ({"starts": 0}, {"candidates": 0}, {"compared": 0}, {"screened": 1}):
        with pytest.raises(DataError, match="expected starts"):
            Scan(**settings)


@pytest.mark.slow
def test_the_labels_that_lead_are_searched_again(model: nn.Module, images: CleanData) -> None:
    """Their mean counts; the others are left at their first."""
    unlabelled = CleanData(images.images)
    search = UniversalPerturbation(steps=40, batch_size=8, rms=0.2)
    tries = [
        {p.target: p.success for p in search.recover(model, unlabelled, seed=seed)}
        for seed in (4, 5, 6)
    ]
    found = replace(SHORT, universal=search, starts=3)(model, unlabelled, seed=4)
    leading = sorted(tries[0], key=lambda label: -tries[0][label])[:2]
    for item in found.suspicions:
        assert item.label in leading
        assert item[UNIVERSAL] == pytest.approx(sum(each[item.label] for each in tries) / 3)
        kept = next(p for p in found.perturbations if p.target == item.label)
        assert kept.success == max(each[item.label] for each in tries)


# ---- the probability ----------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_calibration() -> None:
    made = json.loads(CALIBRATION.read_text())
    for kind, weight, middle in zip(made["kinds"], made["weights"], made["middle"], strict=True):
        assert KINDS[kind].weight == pytest.approx(weight, rel=5e-3)
        assert KINDS[kind].middle == pytest.approx(middle, abs=5e-3)
    halfway = Suspicion.of(0, universal=0.864, size=0.1262, restored=0.48)
    assert halfway.probability == pytest.approx(1 / (1 + 2.71828 ** -made["start"]), abs=1e-2)


def test_every_kind_adds_to_the_probability() -> None:
    least = {"universal": 0.8, "size": 0.2, "restored": 0.3}
    base = Suspicion.of(0, **least)
    for more in ({"universal": 0.9}, {"size": 0.1}, {"restored": 0.5}):
        assert Suspicion.of(0, **least | more).probability > base.probability
    assert 0 <= Suspicion.of(0, universal=0, size=1e9, restored=0).probability < 1e-6
    assert Suspicion.of(0, universal=1, size=0, restored=1).probability > 0.999
    assert base[UNIVERSAL] == 0.8
    with pytest.raises(KeyError):
        base["exposure"]


def test_sizes_are_compared_with_the_median_of_others() -> None:
    assert scanning._relative(0.01, [0.1, 0.2, 0.4]) == pytest.approx(0.05)
    assert scanning._relative(0.01, [0.1, 0.4]) == pytest.approx(0.05)  # of the logarithms
    assert scanning._relative(0.01, []) == 1.0
    assert scanning._spread([9, 8, 7, 6, 5, 4, 3, 2], 3) == [9, 5, 2]
    assert scanning._spread([9, 8], 3) == [9, 8]


class Upward(nn.Module):
    """Half of its neurons are of a kind that nobody scores."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down, self.up, self.fc = (
            nn.Conv2d(3, 8, 3),
            nn.ConvTranspose2d(8, 8, 3),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.up(self.down(x).relu()).relu().mean((2, 3)))
        return logits


def test_what_restoration_cannot_silence_is_said(images: CleanData) -> None:
    diagnosis = SHORT(Upward().eval(), CleanData(images.images))
    said = "restoration does not silence 8 channels of 1 ConvTranspose2d layer"
    faces = (diagnosis.summary(), scan_to_markdown(diagnosis), scan_to_html(diagnosis, False))
    assert all(said in face.replace("Restoration", "restoration") for face in faces)
    assert any(text.startswith(said) for text in diagnosis.to_dict()["cautions"])


# ---- restoration and universal perturbations ----------------------------------------------------


def test_labels_to_scan_are_checked(model: nn.Module, images: CleanData) -> None:
    for labels in ([], [3], [0, 0]):
        with pytest.raises(DataError, match="label"):
            SHORT(model, images, labels=labels)


def test_fewer_large_images_go_through_at_once() -> None:
    sizes, elsewhere = (8, 32, 64, 224, 2000), nn.Linear(1, 1, device="meta")
    images = [torch.empty(1, 3, size, size, device="meta") for size in sizes]
    assert [images_per_pass(each, nn.Identity()) for each in images] == [256, 256, 64, 5, 1]
    assert [images_per_pass(each, elsewhere) for each in images] == [256, 256, 256, 83, 1]


def test_bad_input_is_refused(model: nn.Module, images: CleanData) -> None:
    with pytest.raises(DataError, match="too few"):
        scan(model, images.take(torch.arange(1)), progress=False)
    with pytest.raises(DataError, match="labels in"):
        scan(model, images, labels=[7], progress=False)


def test_restoration_of_the_true_trigger_and_of_none(model: nn.Module, images: CleanData) -> None:
    own = model.requires_grad_(False)
    sites = find_sites(own, images.images[:2])
    restore = Restoration(own, images, sites, silencing="constant")
    found = restore(1, stamped)
    assert found is not None
    assert found.share == 1.0
    assert found.curve[0]["success"] == 0.0
    assert found.curve[0]["kept"] == 1.0
    assert restore(1, lambda x: x) is None  # sends nothing anywhere


def test_universal_perturbations_stay_small(model: nn.Module, images: CleanData) -> None:
    search = UniversalPerturbation(rms=0.4, steps=30, batch_size=8)
    before = state_of(model)
    found = search.recover(model, images)
    assert_same_state(before, state_of(model))
    assert [item.target for item in found] == [0, 1, 2]
    assert max(item.success for item in found) > 0.9
    for item in found:
        assert item.rms <= 0.4 + 1e-5
        assert item.largest >= item.rms
        assert item(images.images).shape == images.images.shape
        assert item(images.images).max() <= images.images.max() + 1e-5
    alone = search.recover(model, images, [1])[0]
    assert torch.allclose(alone.pattern, found[1].pattern, atol=1e-5)
    tiny = UniversalPerturbation(rms=1e-4, steps=15, batch_size=8).recover(model, images, [0])
    assert tiny[0].success < 0.1
    for settings in ({"rms": 0.0}, {"steps": 0}):
        with pytest.raises(DataError, match="expected"):
            UniversalPerturbation(**settings)


# ---- Auto ---------------------------------------------------------------------------------------


def held_out(model: nn.Module, images: CleanData) -> HeldOut:
    sites = find_sites(model, images.images[:2])
    return HeldOut(model, sites, images, silencing="constant", scored=images)


@pytest.mark.slow
def test_auto_takes_the_least_that_ends_the_evidence(
    model: nn.Module, images: CleanData, told: pytest.MonkeyPatch
) -> None:
    model.requires_grad_(False)
    scores = ranked(model, images, [3, TRIGGER, 4, 6, 7])
    selection = AUTO(scores, held_out(model, images))
    assert [neuron.channel for neuron in selection.neurons] == [3, TRIGGER]
    assert "target 1 (probability" in selection.reason and "is gone" in selection.reason
    details = json.loads(json.dumps(selection.details))
    assert details["diagnosis"]["alarm"]
    assert details["remaining"][-1]["alarm"] is False
    assert details["plateau"] == [2, 5]  # 4, 6 and 7 are idle; then accuracy goes


@pytest.mark.slow
def test_auto_selects_nothing_without_evidence(
    model: nn.Module, images: CleanData, told: pytest.MonkeyPatch
) -> None:
    told.setattr(probability, "_START", -50.0)
    model.requires_grad_(False)
    selection = AUTO(ranked(model, images, [TRIGGER]), held_out(model, images))
    assert len(selection) == 0
    assert "no evidence" in selection.reason
    assert "not excluded" in selection.reason
    assert selection.details["diagnosis"]["alarm"] is False


@pytest.mark.slow
def test_auto_says_when_the_evidence_remains(
    model: nn.Module, images: CleanData, told: pytest.MonkeyPatch
) -> None:
    """The three colours come before the trigger's channel: taking any ruins accuracy."""
    model.requires_grad_(False)
    selection = AUTO(ranked(model, images, [3, 0, 2, TRIGGER]), held_out(model, images))
    assert {neuron.channel for neuron in selection.neurons} <= {3}
    assert "remains" in selection.reason


@pytest.mark.slow
def test_auto_reviews_a_repaired_network(
    model: nn.Module, images: CleanData, told: pytest.MonkeyPatch
) -> None:
    """Given the network as it was, it must find the evidence again; given the cut one, not."""
    model.requires_grad_(False)
    given = held_out(model, images)
    selection = AUTO(ranked(model, images, [3, TRIGGER, 4, 6, 7]), given)
    again = AUTO.review(selection, model, given)
    assert again.neurons == selection.neurons
    assert "evidence of these kinds remains" in again.reason
    assert again.details["repaired"]["alarm"] is True
    assert again.details["remaining"] == selection.details["remaining"]
    cut = copy.deepcopy(model).train()  # the user's mode, whatever it is
    silence_(cut, selection, silencing="constant")
    before = state_of(cut)
    ended = AUTO.review(selection, cut, given)
    assert_same_state(before, state_of(cut))
    assert cut.training
    assert "evidence of these kinds is gone" in ended.reason
    assert ended.details["repaired"]["alarm"] is False
    nothing = lowest(ranked(model, images, []), 0)
    assert AUTO.review(nothing, model, given) is nothing


def test_auto_is_there_by_name_and_refuses(model: nn.Module, images: CleanData) -> None:
    assert create_selector("auto", max_drop=0.05).gone.max_drop == 0.05  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="at least one look"):
        Auto(looks=0)
    with pytest.raises(DataError, match="held-out"):
        Auto()(ranked(model, images, []))
    unlabelled = CleanData(images.images)
    with pytest.raises(DataError, match="labelled"):
        AUTO(ranked(model, images, []), held_out(model, unlabelled))


@pytest.mark.slow
def test_purify_with_auto(net: nn.Module, clean: CleanData) -> None:
    quick = Auto(evidence=SHORT)
    done = purify(net, clean, "magnitude", selector=quick, progress=False)
    assert len(done.selection) == 0
    assert done.selection.details["diagnosis"]["images"] < len(clean)
    assert "so nothing goes" in done.summary()
