"""What a report says of the evidence that a scan found, beside what benign networks gave."""

from __future__ import annotations

from .report import Data
from .sections import Section, Table, number


def evidence_section(diagnosis: Data, after: Data | None) -> Section:
    """Every kind of evidence, before and after.

    Args:
        diagnosis: what `Diagnosis.to_dict` gave.
        after: kind -> value for the suspected label in the network that was written; None where
            it was not looked for.
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
    head = ["kind", "model as given", "label", f"{benign} benign networks gave", "alarm at"]
    head += [] if after is None else ["after, same label"]
    text = [
        _verdict(diagnosis, after),
        f"Sought on {diagnosis['images']} clean images, {len(diagnosis['triggers'])} of "
        f"{diagnosis['classes']} labels. Kinds without an alarm did not separate backdoored from "
        "benign networks when that was measured. The benign networks are few and small; other "
        "triggers than these searches can find leave no evidence here.",
    ]
    if after is not None:
        text.append(
            "After: sought anew on the network that was written, for the suspected label only. A "
            "dash: not sought again, or no trigger works any more."
        )
    align = "lrrrr" if after is None else "lrrrrr"
    cross = "" if after is None else "cross: after; "
    caption = (
        f"Each benign network is a grey tick; circle: the model as given; {cross}dotted: the alarm."
    )
    return Section(
        "Evidence of a backdoor",
        text,
        table=Table(align, rows, head),
        folded=[("Evidence by label, in the model as given", _by_label(diagnosis))],
        picture="evidence",
        caption=caption,
    )


def _by_label(diagnosis: Data) -> Table:
    """A row a label, a column a kind; labels that a kind says nothing of have a dash."""
    kinds = {
        item["kind"]: {int(label): value for label, value in item["by_label"].items()}
        for item in diagnosis["evidence"]
    }
    labels = sorted(set().union(*kinds.values()))
    rows = [
        [str(label), *(number(of[label]) if label in of else "-" for of in kinds.values())]
        for label in labels
    ]
    return Table("r" * (len(kinds) + 1), rows, ["label", *kinds])


def _verdict(diagnosis: Data, after: Data | None) -> str:
    kinds = [item["kind"] for item in diagnosis["evidence"] if item["alarm"]]
    tested = [item["kind"] for item in diagnosis["evidence"] if item["threshold"] is not None]
    if not kinds:
        return f"No evidence of the kinds tested ({', '.join(tested)}) in the model as given."
    found = f"Evidence in the model as given, for label {diagnosis['target']}: {', '.join(kinds)}."
    if after is None:
        return found
    left = "evidence remains" if after["alarm"] else f"none of these kinds ({', '.join(tested)})"
    return f"{found} In the model that was written: {left}."


def _after(item: Data, after: Data) -> str:
    value = after.get(item["kind"])
    return "-" if value is None else number(value)
