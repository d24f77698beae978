"""The section of a page about the evidence of a scan, beside that of benign networks."""

from __future__ import annotations

from ..evidence.null import verdict
from .report import Data
from .sections import Section, Table, number


def evidence_section(diagnosis: Data, after: Data | None) -> Section:
    """Every kind of evidence, before and after.

    Args:
        diagnosis: `Diagnosis.to_dict()`.
        after: kind -> value for the suspected label in the purified model, and "alarm"; None if
            it was not searched again.
    """
    rows = []
    for item in diagnosis["evidence"]:
        null = item["null"].values()
        rows.append(
            [
                item["kind"],
                number(item["value"]) + (" (alarm)" if item["alarm"] else ""),
                "" if item["label"] is None else str(item["label"]),
                f"{number(min(null))} to {number(max(null))}" if null else "not measured",
                "never" if item["threshold"] is None else number(item["threshold"]),
                *([] if after is None else [_after(item, after)]),
            ]
        )
    benign = max((len(item["null"]) for item in diagnosis["evidence"]), default=0)
    head = ["kind", "model as given", "label", f"{benign} benign networks", "alarm at"]
    head += [] if after is None else ["after, same label"]
    text = [
        _verdict(diagnosis, after),
        f"Searched with {diagnosis['images']} clean images for {len(diagnosis['triggers'])} of "
        f"{diagnosis['classes']} labels. Kinds that never raise an alarm did not separate "
        "backdoored from benign networks when they were measured. The benign networks are few and "
        "small; triggers that these searches cannot find leave no evidence here.",
    ]
    if after is not None:
        text.append(
            "After: searched again in the purified model, for the suspected label only. A dash: "
            "not searched again, or no trigger works any more."
        )
    align = "lrrrr" if after is None else "lrrrrr"
    cross = "" if after is None else "cross: after; "
    caption = f"Grey ticks: benign networks; circle: the model as given; {cross}dotted: the alarm."
    return Section(
        "Evidence of a backdoor",
        text,
        table=Table(align, rows, head),
        folded=[("Evidence by label, in the model as given", _by_label(diagnosis))],
        picture="evidence",
        caption=caption,
    )


def _by_label(diagnosis: Data) -> Table:
    """A row for each label, a column for each kind; a dash where there is no value."""
    kinds = {
        item["kind"]: {int(label): value for label, value in item["by_label"].items()}
        for item in diagnosis["evidence"]
    }
    columns = list(kinds.values())
    labels = sorted(set().union(*columns))
    rows = [
        [str(label), *(number(values[label]) if label in values else "-" for values in columns)]
        for label in labels
    ]
    return Table("r" * (len(kinds) + 1), rows, ["label", *kinds])


def _verdict(diagnosis: Data, after: Data | None) -> str:
    kinds = [item["kind"] for item in diagnosis["evidence"] if item["alarm"]]
    tested = [item["kind"] for item in diagnosis["evidence"] if item["threshold"] is not None]
    if not kinds:
        said = verdict(kinds, tested, diagnosis["target"])
        return f"{said[0].upper()}{said[1:]} in the model as given."
    before = f"Evidence in the model as given, for label {diagnosis['target']}: {', '.join(kinds)}."
    if after is None:
        return before
    left = "evidence remains" if after["alarm"] else f"none of these kinds ({', '.join(tested)})"
    return f"{before} In the purified model: {left}."


def _after(item: Data, after: Data) -> str:
    value = after.get(item["kind"])
    return "-" if value is None else number(value)
