"""A purification in one sentence, and what it says of a backdoor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..evidence.diagnosis import verdict
from ..evidence.probability import Outcome, evidence_left, last_look
from .record import Record
from .sections import percent


def outcome_of(details: Mapping[str, Any], neurons: int) -> Outcome:
    """What is known of a backdoor in the model that is given out.

    Args:
        details: of the selection.
        neurons: how many were selected.
    """
    if evidence_left(details, neurons):
        return Outcome.EVIDENCE
    if "diagnosis" not in details:
        return Outcome.NOT_SOUGHT
    look = last_look(details, neurons)
    if look is None and neurons:  # what was found before they were silenced says nothing of now
        return Outcome.UNKNOWN
    return Outcome.of((look or details["diagnosis"])["probability"])


def verdict_of(record: Record) -> str:
    """What was found, done and paid, and what is not known; without a full stop."""
    return "; ".join([_found(record), _done(record), _cost(record), _left(record)])


def _found(record: Record) -> str:
    diagnosis = record.selection.details.get("diagnosis")
    if diagnosis is not None:
        said = verdict(diagnosis["probability"], diagnosis["suspicions"][0]["label"])
        return f"{said} in the model as given"
    if record.suspects:
        labels = ", ".join(str(suspect.label) for suspect in record.suspects)
        return f"one small picture sends almost any image to label {labels} of the given model"
    if record.suspects is not None:
        return "no label of the given model stood out"
    if triggers := record.selection.triggers or record.scores.triggers:
        labels = ", ".join(map(str, sorted({trigger.target for trigger in triggers})))
        return f"triggers of label {labels} were recovered from the given model"
    return "a backdoor was not looked for"


def _done(record: Record) -> str:
    if not len(record.selection):
        return "nothing was silenced, so the model is as it was given"
    removed = 0 if record.removal is None else len(record.removal.removed)
    done = (
        f"{len(record.selection):,} of {len(record.scores.flat):,} neurons were silenced, "
        f"{removed:,} of them removed"
    )
    if not record.repaired:
        return done
    aim = (
        "towards the given model's answers"
        if record.given.repair == "distil"
        else "to unlearn recovered triggers"
    )
    return f"{done}, and all weights trained {aim}"


def _cost(record: Record) -> str:
    if record.accuracy is not None:
        before, after = record.accuracy.before, record.accuracy.after
        return (
            f"clean accuracy {percent(before.value)} before and {percent(after.value)} after, on "
            f"{before.count} images"
        )
    if record.agreement is None:
        return "clean accuracy was not measured"
    same = record.agreement.same
    return (
        f"clean accuracy was not measured, and {percent(same.value)} of {same.count} images keep "
        "the given model's label"
    )


def _left(record: Record) -> str:
    if evidence_left(record.selection.details, len(record.selection)):
        return "evidence of a backdoor remains"
    return "none of this proves that no backdoor is left"
