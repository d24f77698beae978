"""No sentence of a result without a caution where the result's own numbers contradict it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from helpers.images import noise_images
from helpers.results import diagnosis, suspicion, trigger
from nnprune_backdoor import CleanData, Purified, create_selector, purify
from nnprune_backdoor.core.agreement import Agreement
from nnprune_backdoor.core.measures import PairedAccuracy, ProxySuccess, SuspectLabel
from nnprune_backdoor.core.scores import ChannelScores, Point, lowest
from nnprune_backdoor.core.sites import Site
from nnprune_backdoor.evidence.probability import Outcome, evidence_left
from nnprune_backdoor.reports import Report, scan_to_markdown
from nnprune_backdoor.reports.pages import to_markdown
from nnprune_backdoor.reports.verdict import outcome_of
from nnprune_backdoor.selectors import AccuracyBudget, Auto, LowestCount, LowestFraction
from nnprune_backdoor.selectors.auto import _look
from nnprune_backdoor.utils.statistics import Rate

BLIND = "nothing here shows that a backdoor went"


@pytest.fixture(scope="module")
def done(_trained: nn.Module, clean: CleanData) -> Purified:
    """Nine neurons silenced by their number."""
    return purify(_trained, clean, "magnitude", selector=LowestCount(9), progress=False)


def accuracy(drop: float, low: float, high: float) -> PairedAccuracy:
    return PairedAccuracy(Rate(95, 100), Rate(95 - round(100 * drop), 100), drop, (low, high))


def by(done: Purified, selector: Any, **selection: Any) -> Purified:
    """As if this selector had decided."""
    given = replace(done.given, selector=selector)
    return replace(done, given=given, selection=replace(done.selection, **selection))


def everywhere(result: Purified, said: str) -> bool:
    """Whether it is said: in all of the result's faces, or in none."""
    report = Report.of(result)
    faces: Sequence[str] = (
        "\n".join(result.cautions),
        "\n".join(line for line in result.summary().splitlines() if line.startswith("caution")),
        "\n".join(result.to_dict()["cautions"]),
        to_markdown(report).replace("\\", "").replace("&gt;", ">"),
        result.to_html(pictures=False).replace("&gt;", ">"),
    )
    found = {said.lower() in face.lower() for face in faces}
    assert len(found) == 1, said
    return found.pop()


def test_a_measured_drop_beyond_the_budget(done: Purified) -> None:
    budget = by(done, AccuracyBudget(max_drop=0.02))
    beyond = replace(budget, accuracy=accuracy(0.111, 0.014, 0.209))
    said = "dropped by +11.1 points [+1.4, +20.9], more than the 2.0% that the selector allows"
    assert everywhere(beyond, said)
    within = replace(budget, accuracy=accuracy(0.02, 0.001, 0.04))
    assert not everywhere(within, "clean accuracy dropped by")
    for selector in ("trigger", "auto"):
        found = replace(by(done, create_selector(selector)), accuracy=beyond.accuracy)
        assert everywhere(found, said)


def test_a_drop_that_no_budget_bounds(done: Purified) -> None:
    lost = replace(done, accuracy=accuracy(0.1, 0.01, 0.2))
    assert everywhere(lost, "clean accuracy was lost: it dropped by +10.0 points [+1.0, +20.0]")
    assert not everywhere(replace(done, accuracy=accuracy(0.1, -0.01, 0.2)), "accuracy was lost")
    unknown = replace(done, accuracy=None)
    assert everywhere(unknown, "the loss of clean accuracy is unknown")


def test_a_selector_that_never_looked_at_a_trigger(done: Purified) -> None:
    assert everywhere(done, BLIND)
    assert everywhere(by(done, AccuracyBudget()), BLIND)
    proxy = ProxySuccess(trigger(), "criterion", Rate(30, 30), Rate(0, 30))
    ranked_by = replace(done, triggers=(proxy,))
    assert everywhere(ranked_by, "the ones that the neurons were ranked by: " + BLIND)
    looked = by(done, create_selector("trigger"), triggers=(trigger(),))
    assert not everywhere(looked, BLIND)


@pytest.mark.parametrize("source", ["criterion", "selector"])
def test_a_recovered_trigger_that_still_works(done: Purified, source: Any) -> None:
    reason = "recovered triggers of label 1 succeed on <= 5% of held-out images"
    found = by(done, create_selector("trigger"), triggers=(trigger(),), reason=reason)
    name = f"trigger of label 1 recovered by the {source}"
    rates = {"gone": (30, 1), "still works: 100.0% -> 40.0%": (30, 12), "works better": (12, 30)}
    for said, (before, after) in rates.items():
        proxy = ProxySuccess(trigger(), source, Rate(before, 30), Rate(after, 30))
        result = replace(found, triggers=(proxy,))
        assert everywhere(result, f"{name} {said}") is (said != "gone")
        assert any(name in caution for caution in result.cautions) is (said != "gone")


def test_nothing_silenced(_trained: nn.Module, clean: CleanData) -> None:
    result = purify(_trained, clean, "magnitude", selector=LowestCount(0), progress=False)
    assert everywhere(result, "nothing was silenced: the model is as it was given")
    assert "silencing lowers" not in result.summary()
    assert BLIND not in result.summary()
    asked = replace(result, given=replace(result.given, repair="unlearn"))
    assert everywhere(asked, "was not done, since nothing was silenced")


def test_a_rejected_repair(done: Purified) -> None:
    rejected = replace(done, repair_rejected="it would have cost accuracy, 90 -> 80")
    assert everywhere(rejected, "was rejected: it would have cost accuracy, 90 -> 80")


def test_what_was_not_scored(_trained: nn.Module, clean: CleanData) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 64, 2), nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip
    images = CleanData(noise_images(80))
    result = purify(model, images, "magnitude", selector=LowestFraction(0.2), progress=False)
    assert everywhere(
        result, "not scored: 96 channels of 2 ConvTranspose2d layers, which stay as they are"
    )


# ---- what the selector says, and what is measured -----------------------------------------------


def scores(count: int = 8) -> ChannelScores:
    sites = (Site("s", count, "layer", "s"),)
    return ChannelScores(sites, torch.arange(count).float(), "given")


def test_a_count_that_cannot_be_reached_is_not_claimed() -> None:
    assert lowest(scores(), 20, "the 20 lowest scores").reason == (
        "the 20 lowest scores; only 7 can go, since each layer keeps one"
    )
    assert lowest(scores(), 7, "the 7 lowest scores").reason == "the 7 lowest scores"


@pytest.mark.parametrize("alarm", [False, True])
@pytest.mark.parametrize("success", [0.0, 0.9])
def test_words_alarm_and_exit_code_of_auto_agree(
    done: Purified, monkeypatch: pytest.MonkeyPatch, success: float, alarm: bool
) -> None:
    """The last look decides, whether triggers recovered before still succeed or not."""
    left = suspicion(alarm)
    monkeypatch.setattr(
        "nnprune_backdoor.selectors.trigger.TriggerGone.trace",
        lambda *_, **__: [Point(0, 0.0, 1.0), Point(3, 0.0, success)],
    )
    monkeypatch.setattr(Auto, "_remaining", lambda *_, **__: left)
    monkeypatch.setattr("nnprune_backdoor.selectors.auto.clone", lambda model: model)
    monkeypatch.setattr("nnprune_backdoor.selectors.auto.silence_", lambda *_, **__: None)
    held_out: Any = type("Some", (), {"model": None, "silencing": "zero"})
    auto = Auto()
    found = auto._decide(scores(), held_out, None, diagnosis(True), [trigger()])  # type: ignore[arg-type]
    assert len(found) == 3
    assert ("remains" in found.reason) is alarm
    assert ("is gone" in found.reason) is not alarm
    assert ("succeed on 90%" in found.reason) is (success > 0.05)
    assert evidence_left(found.details, len(found)) is alarm
    result = by(done, auto, neurons=done.selection.neurons[:3], reason=found.reason,
                details=found.details, triggers=found.triggers)  # fmt: skip
    outcome = Outcome.EVIDENCE if alarm else Outcome.NONE
    assert outcome_of(result.selection.details, 3) == outcome
    assert everywhere(result, "evidence of a backdoor remains in the model that is given out") is (
        alarm
    )
    still = "triggers still succeed on 90.0% of the held-out images, more than 5.0%"
    assert everywhere(result, still) is (success > 0.05 and not alarm)
    assert ("In the purified model: evidence remains" in result.to_markdown()) is alarm


@pytest.mark.parametrize(("left", "said"), [(0.04, False), (0.2, True)])
def test_triggers_that_succeed_after_the_repair(done: Purified, left: float, said: bool) -> None:
    looks = {
        "remaining": [_look(9, 0.0, suspicion(False))],
        "repaired": _look(9, left, suspicion(False)),
    }
    result = by(done, Auto(), details=looks, triggers=(trigger(),))
    assert everywhere(result, "triggers still succeed on 20.0% of the held-out images") is said


@pytest.mark.parametrize(("left", "said"), [(0.04, False), (0.2, True)])
def test_triggers_that_the_selector_itself_still_saw_succeed(
    done: Purified, left: float, said: bool
) -> None:
    curve = (Point(0, 0.0, 1.0), Point(9, 0.0, left), Point(12, 0.1, 0.0))
    result = by(done, create_selector("trigger"), curve=curve, triggers=(trigger(),))
    assert everywhere(result, "triggers still succeed on 20.0% of the held-out images") is said


def test_an_alarm_without_a_trigger_is_no_silence(
    done: Purified, monkeypatch: pytest.MonkeyPatch, clean: CleanData
) -> None:
    """Nothing can be selected by it, but the network that is given out is the one under alarm."""
    found = replace(diagnosis(True), triggers=())
    monkeypatch.setattr("nnprune_backdoor.evidence.scanning.Scan.__call__", lambda *_, **__: found)
    held_out: Any = type("Some", (), {"model": None, "silencing": "zero", "clean": clean,
                                      "scored": clean, "progress": False})  # fmt: skip
    selection = Auto()(scores(), held_out)
    assert len(selection) == 0
    assert "no evidence" not in selection.reason
    assert selection.reason.startswith("evidence of a backdoor with target 1 (probability 0.8")
    assert evidence_left(selection.details, 0)
    result = by(done, Auto(), neurons=(), reason=selection.reason, details=selection.details)
    assert outcome_of(result.selection.details, 0) == Outcome.EVIDENCE


def test_a_look_says_how_probable_a_backdoor_is() -> None:
    look = _look(3, 0.9, suspicion(True))
    assert look["alarm"]
    assert f"still probable by {look['probability']:.2f}" in Auto()._outcome(look)


def test_a_scan_that_cannot_tell_says_so() -> None:
    found = diagnosis(True, cannot_tell="ten images are too few")
    assert not found.alarm and found.probability is None and found.target is None
    page = scan_to_markdown(found)
    for said in (found.summary(), page):
        assert "annot tell whether there is a backdoor" in said
        assert "en images are too few" in said
        assert "evidence of a backdoor with target" not in said


# ---- what a scan's own numbers say against it ---------------------------------------------------


@pytest.mark.parametrize(
    ("alarm", "found", "said"),
    [
        (True, {"universal": 0.9, "size": 0.1}, ""),
        (True, {"universal": 0.7, "size": 0.001}, "universal (0.7) speaks against a backdoor"),
        (False, {"universal": 0.3, "size": 0.5}, ""),
        (False, {"universal": 0.7, "size": 0.03}, "relative size (0.03) speaks for a backdoor"),
    ],
)
def test_evidence_that_is_outweighed(alarm: bool, found: Any, said: str) -> None:
    result = diagnosis(alarm, suspicions=(suspicion(alarm, **found),))
    assert result.alarm is alarm
    text = scan_to_markdown(result).replace("\\", "")
    for face in (" ".join(result.cautions), result.summary(), text):
        assert ("outweigh" in face) is bool(said)
        assert said.lower() in face.lower()


def test_two_labels_that_alarm() -> None:
    both = diagnosis(True, suspicions=(suspicion(True), suspicion(True, 4)))
    said = "label 4 is suspicious too (probability 0.86)"
    assert said in " ".join(both.cautions)
    one = replace(both, suspicions=(suspicion(True), suspicion(False, 4)))
    assert not one.cautions
    untold = replace(both, cannot_tell="too few images")
    assert untold.cautions == ("too few images",), "nothing is said that could be contradicted"


def test_a_suspect_label_that_is_still_reached(done: Purified) -> None:
    for after, said in ((40, False), (60, True)):
        suspect = SuspectLabel(2, Rate(95, 100), Rate(after, 100))
        result = replace(done, suspects=(suspect,))
        assert everywhere(result, "still sends 60.0% of 100 images to label 2") is said


def test_answers_that_changed_where_there_are_no_labels(done: Purified) -> None:
    for same, said in ((99, False), (80, True)):
        result = replace(done, accuracy=None, agreement=Agreement(Rate(same, 100), 0.1))
        text = "gives 20.0% of 100 images another label than the given model"
        assert everywhere(result, text) is said
        assert not everywhere(replace(result, accuracy=accuracy(0, 0, 0)), text)
