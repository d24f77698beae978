"""The section of a page about the evidence of a scan: what speaks for a backdoor, what against."""

from __future__ import annotations

from ..evidence.diagnosis import verdict
from ..evidence.probability import KINDS, Outcome
from .report import Data
from .sections import Section, Table, number

_LEFT = {
    Outcome.EVIDENCE: "evidence remains",
    Outcome.NONE: "no evidence of these kinds is left",
    Outcome.UNKNOWN: "undecided whether evidence is left",
}


def evidence_section(diagnosis: Data, after: Data | None) -> Section:
    """Every kind of evidence for the most suspicious label, before and after.

    Args:
        diagnosis: `Diagnosis.to_dict()`.
        after: kind -> value for that label in the purified model, "probability" and "alarm"; None
            if it was not searched again.
    """
    first = diagnosis["suspicions"][0]
    rows = [
        [
            KINDS[kind].does if kind in KINDS else kind,
            number(item["value"]),
            f"{'for' if item['log_odds'] > 0 else 'against'} ({item['log_odds']:+.1f})",
            *([] if after is None else [number(after[kind]) if kind in after else "-"]),
        ]
        for kind, item in first["evidence"].items()
    ]
    head = ["evidence", "model as given", "speaks", *([] if after is None else ["after"])]
    text = [
        _verdict(diagnosis, after),
        f"Searched with {diagnosis['images']} clean images for {len(diagnosis['perturbations'])} "
        f"of {diagnosis['classes']} labels; the table is about label {first['label']}, the most "
        "suspicious one. In brackets: what a kind adds to the log-odds of a backdoor, learned from "
        "small networks of which every second one had one. Triggers that these searches cannot "
        "find leave no evidence here.",
    ]
    if after is not None:
        text.append("After: searched again in the purified model, for this label only.")
    cross = "" if after is None else "; cross: after"
    return Section(
        "Evidence of a backdoor",
        text,
        table=Table("lrrr" if after is not None else "lrr", rows, head),
        folded=[("Suspected labels, in the model as given", _labels(diagnosis))],
        picture="evidence",
        caption=f"Right of the line: speaks for a backdoor. Circle: the model as given{cross}.",
    )


def _labels(diagnosis: Data) -> Table:
    """A row for each label that was looked at closely."""
    kinds = list(diagnosis["suspicions"][0]["evidence"])
    rows = [
        [
            str(item["label"]),
            number(item["probability"]),
            *(number(item["evidence"][kind]["value"]) for kind in kinds),
        ]
        for item in diagnosis["suspicions"]
    ]
    return Table("r" * (len(kinds) + 2), rows, ["label", "probability", *kinds])


def _verdict(diagnosis: Data, after: Data | None) -> str:
    said = verdict(diagnosis["probability"], diagnosis["suspicions"][0]["label"])
    before = f"{said[0].upper()}{said[1:]} in the model as given"
    why = diagnosis["cannot_tell"]
    if why:
        return f"{before}: {why}."
    if after is None:
        return f"{before}."
    left = _LEFT[Outcome.of(after["probability"])]
    return f"{before}. In the purified model: {left} (probability {after['probability']:.2f})."
