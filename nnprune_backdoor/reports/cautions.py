"""What contradicts or weakens a purification's outcome, from the numbers that the report shows."""

from __future__ import annotations

from collections.abc import Iterator

from ..core.measures import PairedAccuracy
from ..evidence.diagnosis import REACHABLE
from ..evidence.probability import evidence_left, last_look
from ..selectors.base import Selector
from ..triggers.suspects import SuspectLabels
from .record import Record
from .sections import interval, percent, points

FAILS = 0.05  # success up to which a recovered trigger counts as failing, if the selector has none
_WORKS = SuspectLabels().working  # success from which a suspect label's perturbation works
_CHANGED = 0.02  # share of labels, as large as the loss of accuracy that selectors allow


def cautions_of(record: Record) -> tuple[str, ...]:
    """Sentences without a full stop, the gravest first."""
    return (
        *([record.guessing] if record.guessing else []),
        *_accuracy(record),
        *_evidence(record),
        *_triggers(record),
        *_suspects(record),
        *_selection(record),
        *_repair(record),
        *(f"not scored: {what}, which stay as they are" for what in record.given.unscored),
    )


def _accuracy(record: Record) -> Iterator[str]:
    accuracy, allowed = record.accuracy, allowed_drop(record.given.selector)
    if accuracy is None:
        if len(record.selection):
            yield "the loss of clean accuracy is unknown: the images have no labels"
            yield from _changed_answers(record)
        if record.given.criterion.needs_labels:
            yield (
                "the images have no labels, so the criterion took the model's own answers for them"
            )
    elif allowed is not None and accuracy.drop > allowed:
        yield (
            f"clean accuracy dropped by {_drop(accuracy)}, more than the {percent(allowed)} that "
            "the selector allows"
        )
    elif allowed is None and accuracy.interval[0] > 0:
        yield f"clean accuracy was lost: it dropped by {_drop(accuracy)}"


def _changed_answers(record: Record) -> Iterator[str]:
    """Without labels, what the given model answered is all that accuracy can be guessed by."""
    same = None if record.agreement is None else record.agreement.same
    if same is not None and same.interval[1] < 1 - _CHANGED:
        yield (
            f"the purified model gives {percent(1 - same.value)} of {same.count} images another "
            "label than the given model"
        )


def allowed_drop(selector: Selector) -> float | None:
    """Largest loss of accuracy that a selector allows, as a share; None if it has no limit."""
    allowed = getattr(selector, "max_drop", None)
    return float(allowed) if isinstance(allowed, int | float) else None


def _drop(accuracy: PairedAccuracy) -> str:
    low, high = accuracy.interval
    return f"{points(accuracy.drop)} points [{points(low)}, {points(high)}]"


def _evidence(record: Record) -> Iterator[str]:
    details, limit = record.selection.details, _success_limit(record.given.selector)
    left = _success_left(record)
    if evidence_left(details, len(record.selection)):
        yield "evidence of a backdoor remains in the model that is given out"
    elif left is not None and left > limit:
        yield (
            f"recovered triggers still succeed on {percent(left)} of the held-out images, more "
            f"than {percent(limit)}, so a backdoor may be left that raises no alarm"
        )
    if details.get("diagnosis", {}).get("reachable_by_most_labels"):
        yield REACHABLE


def _success_left(record: Record) -> float | None:
    """Success of the selector's triggers in the model that is given out; None: it did not look."""
    selection = record.selection
    look = last_look(selection.details, len(selection))
    if look is not None:
        return look.get("success")
    if record.repaired:
        return None
    return next((p.success for p in selection.curve if p.neurons == len(selection)), None)


def _success_limit(selector: Selector) -> float:
    """Success up to which a recovered trigger counts as failing."""
    return float(getattr(getattr(selector, "gone", selector), "max_success", FAILS))


def _triggers(record: Record) -> Iterator[str]:
    limit = _success_limit(record.given.selector)
    for proxy in record.triggers:
        before, after = proxy.before.value, proxy.after.value
        change = f"{percent(before)} -> {percent(after)} of {proxy.after.count} images"
        name = f"trigger of label {proxy.trigger.target} recovered by the {proxy.source}"
        if after > before:
            yield f"the {name} works better than before: {change}"
        elif after > limit:
            ends = interval(proxy.after.interval)
            yield f"the {name} still works: {change} {ends}, more than {percent(limit)}"


def _suspects(record: Record) -> Iterator[str]:
    for suspect in record.suspects or ():
        if suspect.after is not None and suspect.after.value > _WORKS:
            yield (
                f"a small picture, recovered from the given model, still sends "
                f"{percent(suspect.after.value)} of {suspect.after.count} images to label "
                f"{suspect.label}, against which all weights were trained"
            )


def _selection(record: Record) -> Iterator[str]:
    if not len(record.selection):
        yield "nothing was silenced: the model is as it was given, with its backdoor if it had one"
        return
    if record.selection.triggers or "diagnosis" in record.selection.details:
        return
    name = type(record.given.selector).__name__
    tried = ""
    if record.triggers:
        tried = ", and those tried are the ones that the neurons were ranked by"
    yield (
        f"the selector {name} never looked at a trigger{tried}: nothing here shows that a "
        "backdoor went"
    )


def _repair(record: Record) -> Iterator[str]:
    if record.repair_rejected:
        yield f"the repair that was asked for was rejected: {record.repair_rejected}"
    elif record.given.repair != "none" and not record.repaired:
        yield "the repair that was asked for was not done, since nothing was silenced"
