"""Evidence of a backdoor, on networks whose backdoor is written by hand and on benign ones."""

from __future__ import annotations

import copy
import json
import statistics
from dataclasses import replace
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
from nnprune_backdoor.core.recovered import RecoveredTrigger
from nnprune_backdoor.core.scores import lowest
from nnprune_backdoor.core.sites import find_sites
from nnprune_backdoor.criteria.parts.unlearning import Unlearning
from nnprune_backdoor.errors import DataError
from nnprune_backdoor.evidence import Evidence, Restoration, Scan
from nnprune_backdoor.evidence import null as reference
from nnprune_backdoor.evidence.scanning import comparable
from nnprune_backdoor.reports import scan_plots, scan_to_html, scan_to_markdown
from nnprune_backdoor.selectors import Auto, TriggerGone
from nnprune_backdoor.triggers import Inversion, UniversalPerturbation

SHORT = Scan(search=Inversion(steps=10, batch_size=8), min_success=0.1, many=3, candidates=2, **FEW)
AUTO = Auto(evidence=SCAN, gone=TriggerGone(inversion=QUICK, max_fraction=1.0))


@pytest.fixture
def null(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A null of its own, so that the tests do not depend on what was measured."""
    made: dict[str, Any] = {
        "alarm": {"restoration": 0.7},
        "benign": {"one": {"restoration": 0.2, "trigger size": 0.1}, "two": {"restoration": 0.6}},
    }
    monkeypatch.setattr(reference, "null", lambda: made)
    return made


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
def test_a_planted_backdoor_raises_the_alarm(
    model: nn.Module, images: CleanData, null: dict[str, Any]
) -> None:
    model.train()
    before, hooks, random = state_of(model), hooks_of(model), torch.get_rng_state()
    found = look(model, images)
    assert_same_state(before, state_of(model))
    assert hooks == hooks_of(model)
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert found.alarm
    assert found.target == 1
    assert found.trigger is not None
    assert found.trigger.target == 1
    assert found["restoration"].percentile == 1.0
    assert found.restored is not None
    assert [neuron.channel for neuron in found.restored.selection.neurons] == [TRIGGER]
    assert "evidence of a backdoor with target 1 (restoration)" in found.summary()


@pytest.mark.slow
def test_a_scan_is_a_page(model: nn.Module, images: CleanData, null: dict[str, Any]) -> None:
    found = look(model, images)
    page, text = scan_to_html(found), scan_to_markdown(found)
    for said in (page, text):
        assert "Scan for a backdoor" in said
        assert "label 1" in said
        assert "no proof" in said
        assert "A universal perturbation" in said
    assert "Label by label" in page
    assert "Label by label" not in text  # nothing but a picture
    assert page.count("data:image/png;base64,") == 4
    assert "data:image" not in scan_to_html(found, pictures=False)
    assert found.example.untyped_storage().nbytes() == found.example.nbytes
    assert "Evidence by label" in text
    bars = scan_plots.labels(found)
    heights = [bar.get_height() for bar in bars.axes[0].patches]
    assert max(heights) == pytest.approx(found["restoration"].value)
    mask = scan_plots.trigger(found).axes[1].images[0].get_array()
    assert found.trigger is not None
    assert mask is not None
    assert torch.equal(torch.as_tensor(mask.data), found.trigger.mask[0])
    added = found.perturbation
    assert added is not None
    assert added.target == 1
    assert {p.target for p in found.perturbations} == set(range(3))
    wanted = (added(found.example[None])[0] - added.pixels.low) / (
        added.pixels.high - added.pixels.low
    )
    shown = scan_plots.universal(found).axes[2].images[0].get_array()
    assert shown is not None
    torch.testing.assert_close(torch.as_tensor(shown.data).permute(2, 0, 1), wanted)
    json.dumps(found.to_dict())
    null["alarm"] = {"restoration": 1.01}
    quiet = look(model, images)
    assert quiet.perturbation is None
    assert "A universal perturbation" not in scan_to_html(quiet)
    with pytest.raises(DataError, match="no perturbation to show"):
        scan_plots.universal(quiet)
    assert "none of the kinds tested" in scan_to_html(quiet)
    assert quiet.trigger is None
    assert quiet.smallest is not None
    nothing = replace(quiet, evidence=())
    assert nothing.smallest is None
    with pytest.raises(DataError, match="no trigger to show"):
        scan_plots.trigger(nothing)


@pytest.mark.slow
def test_triggered_images_are_found(model: nn.Module, images: CleanData) -> None:
    found = look(model, images)
    others = images.images[images.targets != 1]
    clean, bad = found.suspicious(others), found.suspicious(stamped(others))
    assert clean.max() < bad.min()
    exposure = found.suspicious(others, by="exposure")
    assert exposure.shape == (len(others),)
    silent = replace(found, evidence=())  # without an alarm by restoration
    assert torch.equal(silent.suspicious(others), exposure)
    with pytest.raises(DataError, match="NaN"):
        found.suspicious(torch.full((1, 3, 16, 16), torch.nan))


@pytest.mark.slow
def test_a_report_never_says_clean(net: nn.Module, clean: CleanData, null: dict[str, Any]) -> None:
    null["alarm"] = {"restoration": 1.01}
    found = SHORT(net, clean)
    assert not found.alarm
    assert found.target is None
    assert found.trigger is None
    words = found.summary()
    assert "no evidence of the kinds tested (restoration)" in words
    assert "clean network" not in words
    assert "safe" not in words
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["alarm"] is False
    assert {item["kind"] for item in plain["evidence"]} <= set(reference.KINDS)
    assert plain["images"] == len(clean)


def test_it_is_repeatable_and_does_not_look_at_labels(model: nn.Module, images: CleanData) -> None:
    one, two = SHORT(model, images, seed=4), SHORT(model, CleanData(images.images), seed=4)
    assert one.evidence == two.evidence


@pytest.mark.slow
@pytest.mark.parametrize("colours", [1, 3])
def test_two_classes_and_grey_images(colours: int) -> None:
    """One colour: bright against dark, two classes; the trigger still stands out."""
    torch.manual_seed(0)
    found = look(Handmade(colours, target=1).eval(), pictures(colours))
    assert found["restoration"].label == 1
    assert found["restoration"].value > 0.9


def test_very_many_classes_are_screened_first(model: nn.Module, images: CleanData) -> None:
    settings = {"silencing": "constant"}
    screen = UniversalPerturbation(steps=10, batch_size=4, held_out=0.5)
    many = replace(SHORT, screened=2, screen=screen, screen_images=30)
    found = many(model, CleanData(images.images), **settings)
    sought = found["universal"].by_label
    assert 1 in sought, "the planted target was screened out"
    assert len(sought) >= 2
    # sorted by class, as a folder is read, so that the first images all have the target's label
    order = torch.cat([(images.targets == 1).nonzero(), (images.targets != 1).nonzero()]).flatten()
    found = many(model, CleanData(images.images[order]), **settings)
    assert 1 in found["universal"].by_label
    assert "screening" in found.seconds
    assert len(many(model, images, labels=[0, 1, 2], **settings)["universal"].by_label) == 3
    assert "screening" not in SHORT(model, images, **settings).seconds


@pytest.mark.slow
def test_there_may_be_more_classes_than_images() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=50).eval()
    settings = {
        "screen": replace(SHORT.screen, steps=2),
        "unlearning": Unlearning(
            epochs=1,
            stop=None,
            statistics="running",
            missed="flag",
        ),
    }
    found = replace(SHORT, **settings)(model, CleanData(pictures(3).images[:30]))
    assert found.classes == 50
    assert len(found.exposed.predicted) == 50


def test_labels_to_scan_are_checked(model: nn.Module, images: CleanData) -> None:
    for labels in ([], [3], [0, 0]):
        with pytest.raises(DataError, match="label"):
            SHORT(model, images, labels=labels)


def test_fewer_large_images_go_through_at_once() -> None:
    sizes, elsewhere = (8, 32, 64, 224, 2000), nn.Linear(1, 1, device="meta")
    images = [torch.empty(1, 3, size, size, device="meta") for size in sizes]
    assert [images_per_pass(each, nn.Identity()) for each in images] == [256, 256, 64, 5, 1]
    assert [images_per_pass(each, elsewhere) for each in images] == [256, 256, 256, 83, 1]


def test_many_classes_have_triggers_sought_for_a_few(model: nn.Module, images: CleanData) -> None:
    found = Scan(search=SHORT.search, many=2, candidates=1, **FEW)(
        model, images, silencing="constant"
    )
    assert len(found["universal"].by_label) == 3
    assert len(found.triggers) == 1
    chosen = SHORT(model, images, labels=[2], silencing="constant")
    assert [trigger.target for trigger in chosen.triggers] == [2]


def test_bad_input_is_refused(model: nn.Module, images: CleanData) -> None:
    with pytest.raises(DataError, match="too few"):
        scan(model, images.take(torch.arange(1)), progress=False)
    with pytest.raises(DataError, match="labels in"):
        scan(model, images, labels=[7], progress=False)


def test_percentile_and_alarm() -> None:
    null = {"a": 0.1, "b": 0.3, "c": 0.3}
    high = Evidence("restoration", 0.3, 0, {0: 0.3}, null, 0.3)
    assert (high.percentile, high.alarm) == (1 / 3, True)
    low = Evidence("trigger size", 0.2, 0, {0: 0.2}, null, 0.1)
    assert (low.percentile, low.alarm) == (2 / 3, False)
    assert Evidence("trigger size", 0.05, 0, {}, {}, 0.1).alarm
    assert Evidence("exposure", 1.0, 0, {}, {}, None).percentile is None
    assert not Evidence("exposure", 1.0, 0, {}, {}, None).alarm


def found(kind: str, by_label: dict[int, float], threshold: float | None) -> Evidence:
    label = max(by_label, key=by_label.__getitem__)
    return Evidence(kind, by_label[label], label, by_label, {}, threshold)


@pytest.mark.parametrize(
    ("restored", "universal", "label"),
    [
        ({0: 0.5, 1: 0.5}, {0: 0.8, 1: 0.1}, None),
        ({0: 0.5, 1: 0.4}, {0: 0.3, 1: 0.95}, 1),
        ({0: 0.65, 1: 0.4}, {0: 0.88, 1: 0.95}, 0),  # both are near, and one is restored
        ({0: 0.55, 1: 0.4}, {0: 0.88, 1: 0.95}, 1),  # by too little
        ({0: 0.78, 1: 0.4}, {0: 0.8, 1: 0.95}, 1),  # not near
        ({0: 0.78, 1: 0.4}, {0: 0.6, 1: 0.7}, 0),  # the other alarm
    ],
)
def test_the_label_is_named_by_both_kinds_of_evidence(
    restored: dict[int, float], universal: dict[int, float], label: int | None
) -> None:
    kinds = [found("restoration", restored, 0.75), found("universal", universal, 0.9)]
    assert reference.suspected(kinds) == label
    assert reference.suspected(kinds[:1]) == (0 if restored[0] >= 0.75 else None)


@pytest.mark.slow
def test_universal_perturbations_that_work_are_sought_again(
    model: nn.Module, images: CleanData, null: dict[str, Any]
) -> None:
    """Their mean counts; those that do not work at first are left at that."""
    unlabelled = CleanData(images.images)
    search = UniversalPerturbation(steps=40, batch_size=8, rms=0.2)
    tries = [
        {p.target: p.success for p in search.recover(model, unlabelled, seed=seed)}
        for seed in (4, 5, 6)
    ]
    first = sorted(tries[0].values())
    assert first[0] < first[1]
    some = replace(SCAN, universal=search, again_from=first[1])  # all but the worst label
    found = some(model, unlabelled, silencing="constant", seed=4)
    for label, success in found["universal"].by_label.items():
        good = tries[0][label] >= first[1]
        wanted = sum(each[label] for each in tries) / 3 if good else tries[0][label]
        assert success == pytest.approx(wanted)
        kept = next(p for p in found.perturbations if p.target == label)
        best = max(each[label] for each in tries) if good else tries[0][label]
        assert kept.success == best
    # a label at a time: those whose first success is less than the best mean are left at it
    one = replace(some, candidates=1)(model, unlabelled, silencing="constant", seed=4)
    leader = max(tries[0], key=lambda label: tries[0][label])
    assert one["universal"].by_label == {
        **tries[0],
        leader: pytest.approx(found["universal"].by_label[leader]),
    }
    left = some.remaining(model, unlabelled, 1, silencing="constant", seed=4)
    again = next(item.value for item in left if item.kind == "universal")
    assert again == pytest.approx(found["universal"].by_label[1])


def test_a_universal_perturbation_of_large_images_raises_no_alarm() -> None:
    """Measured on a benign ImageNet network at 224 pixels: .98, of any label."""
    found = {
        side: [
            reference.evidence_of(kind, {3: 1.0}, side**2) for kind in ("universal", "restoration")
        ]
        for side in (32, 64, 224)
    }
    alarms = {
        side: [item is not None and item.alarm for item in both] for side, both in found.items()
    }
    assert alarms == {32: [True, True], 64: [True, True], 224: [False, True]}


@pytest.mark.parametrize(
    ("working", "labels", "classes", "side", "raised"),
    [
        (10, 10, 10, 32, True),
        (6, 10, 10, 32, True),
        (5, 10, 10, 32, False),  # the others are as large as the image
        (1, 10, 10, 32, False),
        (10, 10, 12, 32, False),  # not of all labels
        (9, 9, 9, 32, False),  # the null has ten
        (10, 10, 10, 65, False),
    ],
)
def test_a_relative_size_counts_among_many_triggers_that_work(
    working: int, labels: int, classes: int, side: int, raised: bool
) -> None:
    judged = comparable(working, labels, classes)
    by_label = dict.fromkeys(range(labels), 1.0) | {3: 0.05}
    found = reference.evidence_of("relative size", by_label, side**2, judged=judged)
    assert found is not None and found.label == 3
    assert found.alarm is raised
    assert reference.suspected([found]) == (3 if raised else None)


@pytest.mark.parametrize("mask", [0.001, 1.0])
def test_a_relative_size_is_judged_again_by_the_new_trigger_of_the_label(mask: float) -> None:
    """Among the triggers that the others had; one that fails counts as the whole image."""
    norms = [100.0, 120, 90, 0.5, 110, 95, 105, 115, 85, 100]
    given = [
        {"target": label, "norm": norm, "success": 1.0 if label else 0.1}
        for label, norm in enumerate(norms)
    ]
    trigger = RecoveredTrigger(3, torch.full((1, 32, 32), mask), torch.zeros(3, 32, 32), 0.9, 20, 1)
    found, judged = Scan()._relative_size_again(trigger, given, 10)
    assert judged and set(found) == {3}
    median = statistics.median([1024.0, *norms[1:3], 1024 * mask, *norms[4:]])
    assert found[3] == pytest.approx(1024 * mask / median)
    assert (found[3] < 0.065) is (mask < 1)
    assert Scan()._relative_size_again(trigger, [], 10) == ({}, False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("successes", "restoration", "caution"),
    [
        ([0.99, 0.8, 0.76, 0.2], 0.1, True),
        ([0.99, 0.5, 0.3, 0.2], 0.1, False),  # one label stands out
        ([0.99, 0.8, 0.76, 0.2], 0.9, False),  # other evidence as well
    ],
)
def test_an_alarm_in_a_network_that_obeys_any_picture_comes_with_a_caution(
    model: nn.Module,
    images: CleanData,
    successes: list[float],
    restoration: float,
    caution: bool,
) -> None:
    found = (
        Evidence("restoration", restoration, 1, {1: restoration}, {}, 0.75),
        Evidence("universal", successes[0], 0, dict(enumerate(successes)), {}, 0.935),
    )
    diagnosis = replace(look(model, images), evidence=found)
    assert diagnosis.alarm
    assert (
        diagnosis.to_dict()["reachable_by_most_labels"]
        is diagnosis.reachable_by_most_labels
        is caution
    )
    assert ("caution " in diagnosis.summary()) is caution
    assert ("says little here" in scan_to_markdown(diagnosis)) is caution


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
    restored = Evidence("restoration", 0.1, 1, {1: 0.1}, {}, 0.75)
    diagnosis = replace(diagnosis, evidence=(restored,))
    faces = (diagnosis.summary(), scan_to_markdown(diagnosis), scan_to_html(diagnosis, False))
    assert all(said in face.replace("Restoration", "restoration") for face in faces)
    assert [text.startswith(said) for text in diagnosis.to_dict()["cautions"]] == [True]
    universal = Evidence("universal", 0.5, 1, {1: 0.5}, {}, None)
    without = replace(diagnosis, evidence=(universal,))
    assert "ConvTranspose2d" not in without.summary() + scan_to_markdown(without)


def test_what_the_package_ships_as_null() -> None:
    stored = reference.null()
    assert set(stored["alarm"]) <= set(reference.KINDS)
    assert stored["alarm"]
    raised = {
        (name, kind)
        for kind, limit in stored["alarm"].items()
        for name, values in stored["benign"].items()
        if Evidence(kind, values[kind], 0, {}, {}, limit).alarm
    }
    assert raised == {("repvgg-benign-short-4", "universal")}  # see docs/results/diagnosis.md


# ---- restoration and universal perturbations ----------------------------------------------------


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
    model: nn.Module, images: CleanData, null: dict[str, Any]
) -> None:
    null["alarm"] = {"trigger size": 0.06}  # this network's colours can be restored as well
    model.requires_grad_(False)
    scores = ranked(model, images, [3, TRIGGER, 4, 6, 7])
    selection = AUTO(scores, held_out(model, images))
    assert [neuron.channel for neuron in selection.neurons] == [3, TRIGGER]
    assert "target 1 (trigger size) is gone" in selection.reason
    details = json.loads(json.dumps(selection.details))
    assert details["diagnosis"]["alarm"]
    assert details["remaining"][-1]["alarm"] is False
    assert details["plateau"] == [2, 5]  # 4, 6 and 7 are idle; then accuracy goes


@pytest.mark.slow
def test_auto_selects_nothing_without_evidence(
    model: nn.Module, images: CleanData, null: dict[str, Any]
) -> None:
    null["alarm"] = {"restoration": 1.01}
    model.requires_grad_(False)
    selection = AUTO(ranked(model, images, [TRIGGER]), held_out(model, images))
    assert len(selection) == 0
    assert "no evidence" in selection.reason
    assert "not excluded" in selection.reason
    assert selection.details["diagnosis"]["alarm"] is False


@pytest.mark.slow
def test_auto_says_when_the_evidence_remains(
    model: nn.Module, images: CleanData, null: dict[str, Any]
) -> None:
    """The three colours come before the trigger's channel: taking any ruins accuracy."""
    null["alarm"] = {"trigger size": 0.06}
    model.requires_grad_(False)
    selection = AUTO(ranked(model, images, [3, 0, 2, TRIGGER]), held_out(model, images))
    assert {neuron.channel for neuron in selection.neurons} <= {3}
    assert "remains" in selection.reason


@pytest.mark.slow
def test_auto_reviews_a_repaired_network(
    model: nn.Module, images: CleanData, null: dict[str, Any]
) -> None:
    """Given the network as it was, it must find the evidence again; given the cut one, not."""
    null["alarm"] = {"trigger size": 0.06}
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


@pytest.mark.slow
def test_auto_judges_a_relative_size_again_where_that_alone_raised_the_alarm(
    model: nn.Module, images: CleanData, null: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nnprune_backdoor.evidence.scanning._LABELS", 2)
    null["alarm"] = {"relative size": 1.0}
    model.requires_grad_(False)
    given = held_out(model, images)
    selection = AUTO(ranked(model, images, [3, TRIGGER, 4, 6, 7]), given)
    assert "target 1 (relative size)" in selection.reason
    assert all("relative size" in look for look in selection.details["remaining"])
    again = AUTO.review(selection, model, given)  # nothing is silent in this one
    assert again.details["repaired"]["alarm"] is True


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
def test_purify_with_auto(net: nn.Module, clean: CleanData, null: dict[str, Any]) -> None:
    null["alarm"] = {"restoration": 1.01}
    quick = Auto(evidence=SHORT)
    done = purify(net, clean, "magnitude", selector=quick, progress=False)
    assert len(done.selection) == 0
    assert done.selection.details["diagnosis"]["images"] < len(clean)
    assert "no evidence" in done.summary()
