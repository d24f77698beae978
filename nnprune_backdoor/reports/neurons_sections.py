"""Sections about the neurons: how many were silenced, of which layers, and what became of them."""

from __future__ import annotations

from collections.abc import Sequence

from .report import Data, Report
from .sections import Section, Table, number, percent, points, settings_table, spans


def amount_section(report: Report) -> Section:
    """How many, and why so many; the amounts that were tried, if any."""
    chosen = report.selection
    share = percent(chosen["neurons"] / chosen["of"], 2)
    text = [
        f"{chosen['neurons']:,} of {chosen['of']:,} neurons ({share}) were silenced. "
        f"Reason given by {chosen['selector']}: {chosen['reason'] or 'none'}."
    ]
    folded = [settings_table("Settings of the selector", chosen["settings"])]
    # the diagnosis has a section of its own
    if details := {k: v for k, v in chosen["details"].items() if k != "diagnosis"}:
        folded.append(settings_table("Details of the selection", details))
    if not report.curve:
        return Section("Number of neurons", text, folded=folded)
    folded.insert(0, (f"The {len(report.curve)} amounts tried", _curve(report.curve)))
    caption = (
        "Amounts tried on held-out clean images, before any repair. Dashed: the amount chosen; "
        "dotted: the limit of the selector. Diamond: the purified model in the end, on the images "
        "that measured it."
    )
    return Section("Number of neurons", text, folded=folded, picture="curve", caption=caption)


def _curve(curve: Sequence[Data]) -> Table:
    """A row for each amount, with what was measured there."""
    shown = {"drop": ("accuracy drop, points", points), "same": ("same label", percent)}
    shown["success"] = ("proxy success", percent)
    # reports written before lack "same"
    columns = [name for name in shown if any(point.get(name) is not None for point in curve)]
    rows = []
    for point in curve:
        values = [(point.get(name), shown[name][1]) for name in columns]
        cells = ["" if value is None else show(value) for value, show in values]
        rows.append([f"{point['neurons']:,}", *cells, "chosen" if point["chosen"] else "-"])
    head = ["neurons silenced", *(shown[name][0] for name in columns), "chosen"]
    return Table("r" * (1 + len(columns)) + "l", rows, head)


def layers_section(report: Report) -> Section:
    """Scores, and what became of the neurons, layer by layer."""
    rows = [
        [
            layer["layer"],
            layer["kind"],
            str(layer["channels"]),
            *(number(layer[name]) for name in ("lowest", "median", "highest")),
            str(layer["silenced"] or ""),
            str(layer["removed"] or ""),
        ]
        for layer in report.layers
    ]
    head = ["layer", "kind", "neurons", "lowest", "median", "highest", "silenced", "removed"]
    return Section(
        "Neurons by layer",
        [
            "Neurons with low scores are silenced first. Each criterion has its own scale. Removed "
            "neurons are no longer in the tensors; silenced ones are, with weights of zero."
        ],
        folded=[(f"All {len(rows)} layers", Table("clrrrrrr", rows, head))],
        picture="scores",
        caption="A row for each layer. Left: the score of every neuron. Right: how many were kept, "
        "only silenced, and removed.",
    )


def neurons_section(report: Report) -> Section:
    """Each silenced neuron by its number."""
    if not report.neurons:
        return Section("Neurons silenced", ["None."])
    rows = []
    for layer in report.neurons:
        if layer["removed"]:
            rows.append([layer["layer"], "removed", spans(layer["removed"]), ""])
        for part in layer["silenced"]:
            rows.append([layer["layer"], "silenced", spans(part["channels"]), part["why"]])
    text = (
        "Removed: no longer in the tensors. Silenced: still there, with weights of zero, for the "
        "reason given. Channels and heads are numbered as in the model as given."
    )
    head = ["layer", "what happened", "neurons", "why not removed"]
    return Section("Neurons silenced", [text], table=Table("clll", rows, head))
