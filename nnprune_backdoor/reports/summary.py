"""A purification in a few lines of text."""

from __future__ import annotations

from ..training.repair import triggers_of
from .cautions import cautions_of
from .record import Record
from .verdict import verdict_of

_NONE = "no label: no small perturbation was found that sends most images to one"


def headline(record: Record) -> str:
    """Neurons, accuracy and time, a line each."""
    removed = 0 if record.removal is None else len(record.removal.removed)
    return "\n".join(
        [
            f"{len(record.selection)} of {len(record.scores.flat)} neurons silenced, "
            f"{removed} of them removed",
            f"accuracy {record.accuracy or 'not measured'}",
            f"{sum(record.seconds.values()):.1f} seconds",
        ]
    )


def summarise(record: Record) -> str:
    """What was done, what it cost, and what it does not say, a line each."""
    total = len(record.scores.flat)
    share = len(record.selection) / total
    lines = [
        f"verdict    {verdict_of(record)}",
        f"criterion  {record.scores.criterion}",
        f"neurons    {len(record.selection)} of {total} silenced ({share:.2%}), meaning "
        f"'{record.silencing}', in {len(record.selection.by_site())} of "
        f"{len(record.scores.sites)} layers",
        f"because    {record.selection.reason}",
        *_removal(record),
        *_repair(record),
        f"accuracy   {record.accuracy or 'not measured: the clean images have no labels'}",
        *([f"agreement  {record.agreement}"] if record.agreement is not None else []),
        *(f"proxy      {proxy}" for proxy in record.triggers),
        *(f"caution    {caution}" for caution in cautions_of(record)),
        f"seconds    {sum(record.seconds.values()):.1f} ("
        + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in record.seconds.items())
        + ")",
        _limits(record),
    ]
    return "\n".join(lines)


def _limits(record: Record) -> str:
    if not len(record.selection):
        return "limits     finding nothing to silence is no proof that there is no backdoor"
    return (
        "limits     silencing lowers the success of backdoors that use these neurons; it is no "
        "proof that none is left"
    )


def _repair(record: Record) -> list[str]:
    if record.repair_rejected:
        return [f"repair     rejected: {record.repair_rejected}"]
    if not record.repaired:
        return []
    if record.given.repair == "distil":
        return [
            "repair     all weights trained towards the given model's answers"
            + (", and against triggers of the suspect labels" if record.suspects else ""),
            *(f"suspect    {suspect}" for suspect in record.suspects or ()),
            *([] if record.suspects else [f"suspect    {_NONE}"]),
        ]
    count = len(triggers_of(record.scores, record.selection))
    return [
        f"repair     all weights trained further to unlearn {count} recovered trigger(s), and "
        "one recovered from the silenced network"
    ]


def _removal(record: Record) -> list[str]:
    if record.removal is None:
        return ["removal    none: the model has its original shape"]
    first, *others = str(record.removal).splitlines()
    return [f"removal    {first}", *(f"           {line}" for line in others)]
