"""What a purification does not say, in sentences."""

from __future__ import annotations

from .record import Record
from .sections import sentence


def limits_of(record: Record) -> list[str]:
    """What this run does not say, in sentences; never a verdict on the model."""
    size, accuracy = record.removal, record.accuracy
    limits = [
        "Silencing lowers the success of backdoors that use these neurons. It is no proof that no "
        "backdoor is left."
        if len(record.selection)
        else "Nothing was silenced, so the model is the one that was given, with its backdoor if "
        "it had one. This run gives no evidence that it had none."
    ]
    if record.triggers:
        limits.append(
            "Proxy success is the success of triggers recovered from clean images. The attacker's "
            "trigger was never seen here; it may differ from them and still work."
        )
    else:
        limits.append(
            "No recovered trigger was tried on the model."
            if "diagnosis" in record.selection.details
            else "No recovered trigger was tried on the model, so no number here is about a "
            "backdoor."
        )
    if accuracy is None:
        limits.append("The loss of clean accuracy was not measured: the images have no labels.")
    else:
        limits.append(
            f"Clean accuracy was measured on {accuracy.before.count} images. With few images or "
            "rare classes, a loss may go unnoticed; the interval shows how uncertain it is."
        )
    if record.guessing:
        limits.insert(0, sentence(record.guessing))
    if record.repair_rejected:
        limits.append(f"A repair was asked for and rejected: {record.repair_rejected}.")
    if record.repaired and record.given.repair == "distil":
        limits.append(
            "All weights were trained towards the given model's answers on clean images. "
            + (
                "Small perturbations, patches and blends of the suspect labels were trained "
                "against, so that they fail afterwards says little about the attacker's trigger. "
                "Benign networks have suspect labels too."
                if record.suspects
                else "No small perturbation was found that sends most images to one of the labels "
                "that were tried, so no trigger was trained against: a backdoor that the pruning "
                "missed is still there."
            )
        )
    elif record.repaired:
        limits.append(
            "All weights were trained so that the recovered triggers fail. A proxy success near "
            "zero is what this training aims at, so it says little about the attacker's trigger. "
            "The same holds for evidence that is gone after the repair, since what it says was "
            "learned from networks that were not trained in this way."
        )
    if size is not None and record.given.removal == "group":
        limits.append(
            f"Whole coupled groups were removed. This changes the logits by {size.drift:.1e} of "
            "their scale, and the selector did not take it into account."
        )
    return limits
