"""Content of the page about a purification: sections of text, tables and pictures, in order.

`pages` writes them as Markdown or HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ..evidence.probability import last_look
from .confusion import confusion_section
from .evidence_section import evidence_section
from .neurons_sections import amount_section, layers_section, neurons_section
from .report import Data, Report
from .sections import (
    Row,
    Section,
    Shelf,
    Table,
    interval,
    json_of,
    number,
    percent,
    points,
    sentence,
    settings_table,
)


def headline(report: Report) -> list[Row]:
    """The most important numbers: name, value, note."""
    chosen, accuracy, size = report.selection, report.accuracy, report.size
    share = percent(chosen["neurons"] / chosen["of"], 2)
    layers = f"{len(report.neurons)} of {len(report.layers)} layers"
    rows: list[Row] = [
        ("neurons silenced", f"{chosen['neurons']:,}", f"{share} of {chosen['of']:,}, {layers}")
    ]
    if accuracy is None:
        rows.append(("clean accuracy", "not measured", "the images have no labels"))
    else:
        shares = f"{_share(accuracy['before'])} → {_share(accuracy['after'])}"
        note = f"drop {_drop(accuracy)} on {accuracy['before']['count']} images"
        rows.append(("clean accuracy", shares, note))
    if report.agreement is not None:
        same = report.agreement["same"]
        note = f"of {same['count']} images, as by the given model"
        rows.append(("same label", _share(same), note))
    for suspect in report.suspects or ():
        shares = "not measured"
        if suspect["before"] is not None:
            shares = f"{_share(suspect['before'])} → {_share(suspect['after'])}"
        note = f"sent to label {report.label(suspect['label'])} by a small perturbation"
        rows.append(("suspect label", shares, note))
    if report.triggers:
        worst = max(report.triggers, key=lambda trigger: trigger["after"]["share"])
        shares = f"{_share(worst['before'])} → {_share(worst['after'])}"
        label = report.label(worst["target"])
        note = f"recovered trigger of label {label}, the most successful afterwards"
        rows.append(("proxy success", shares, note))
    if size is None:
        rows.append(("parameters", f"{report.given['parameters']:,}", "shape unchanged"))
    else:
        old, new = size["before"]["parameters"], size["after"]["parameters"]
        rows.append(("parameters", f"{new:,}", f"{_change(old, new)} of {old:,}"))
    return rows


def sections(
    report: Report, shelves: Mapping[str, Sequence[Shelf]] = MappingProxyType({})
) -> list[Section]:
    """The whole report, the most important first; `shelves` as for `pages.to_html`."""
    return [
        *cautions(report),
        Section("What this does not say", points=report.limits),
        *_evidence(report),
        _accuracy(report),
        *_examples(shelves.get("examples", ())),
        *_confusion(report),
        _triggers(report, shelves.get("triggers", ())),
        amount_section(report),
        layers_section(report),
        neurons_section(report),
        _size(report),
        _given(report),
        *_source(report),
        _criterion(report),
        _run(report),
    ]


def cautions(report: Report) -> list[Section]:
    """What contradicts or weakens the outcome, if anything does."""
    shown = [sentence(text) for text in report.cautions]
    return [Section("Cautions", points=shown)] if shown else []


def _accuracy(report: Report) -> Section:
    title, accuracy = "Clean accuracy", report.accuracy
    if accuracy is None:
        return Section(title, ["Not measured: the images have no labels."])
    rows = [
        [when, f"{rate['hits']} of {rate['count']}", _share(rate), interval(rate["interval"])]
        for when, rate in (("before", accuracy["before"]), ("after", accuracy["after"]))
    ]
    text = (
        f"Drop: {_drop(accuracy)}; below zero is a gain. Measured before and after on the same "
        "images, which neither criterion nor selector used; the interval depends only on the "
        "predictions that changed."
    )
    head = ["", "correct", "share", "95 % interval"]
    return Section(title, [text], table=Table("lrrr", rows, head))


def _evidence(report: Report) -> list[Section]:
    """Before and after, if the selector looked for evidence."""
    details = report.selection["details"]
    if "diagnosis" not in details:
        return []
    after = last_look(details, report.selection["neurons"])
    return [evidence_section(details["diagnosis"], after)]


def _examples(shelves: Sequence[Shelf]) -> list[Section]:
    if not shelves:
        return []
    text = (
        "A few of the clean images that measured accuracy, and the answers of both models. A "
        "recovered trigger is what the given model reacts to; it need not look like an attacker's."
    )
    return [Section("Before and after on a few images", [text], shelves=shelves)]


def _confusion(report: Report) -> list[Section]:
    if report.confusion is None:
        return []
    return [confusion_section(report.confusion, report.given["classes"], report.label)]


def _triggers(report: Report, shelves: Sequence[Shelf]) -> Section:
    title = "Recovered triggers"
    if not report.triggers:
        text = "No recovered trigger was tried on the model."
        if report.suspects:
            text = (
                "Recovered from the given model: small changes of any image that send it to a "
                "suspect label. The model was trained against them. Benign networks have suspect "
                "labels too."
            )
        return Section(title, [text], shelves=shelves)
    text = (
        "Triggers recovered by inversion from clean images alone. Proxy success: the share of "
        "images, not used before, that the recovered trigger sends to its label. It stands in for "
        "the success of the attack, whose trigger is unknown here."
    )
    rows = [
        [
            trigger["source"],
            report.label(trigger["target"]),
            f"{number(trigger['norm'])} of {trigger['pixels']:,}",
            f"{_share(trigger['before'])} {interval(trigger['before']['interval'])}",
            f"{_share(trigger['after'])} {interval(trigger['after']['interval'])}",
            str(trigger["after"]["count"]),
        ]
        for trigger in report.triggers
    ]
    head = [
        "recovered by",
        "label",
        "mask norm (pixels)",
        "proxy success before",
        "after",
        "images",
    ]
    return Section(title, [text], table=Table("lrrrrr", rows, head), shelves=shelves)


def _size(report: Report) -> Section:
    title, size = "Size and speed", report.size
    if size is None:
        return Section(
            title, ["Nothing was removed from the tensors: shape and speed are as before."]
        )
    old, new = size["before"], size["after"]
    rows = [
        [name, show(old[key]), show(new[key]), _change(old[key], new[key])]
        for name, key, show in (
            ("parameters", "parameters", "{:,}".format),
            ("multiply-accumulates of an image", "macs", "{:,}".format),
            (f"seconds of a batch of {size['batch']}", "latency", "{:.4f}".format),
        )
    ]
    drift = "not finite" if size["drift"] is None else f"{size['drift']:.1e}"
    text = (
        f"Neurons removed from the tensors: {size['removed']}, only silenced: {size['silenced']}. "
        f"Channels removed: {size['channels']}, including those that only removed neurons needed "
        "or that were never used. "
        f"Logits differ from the silenced model's by {drift} of their scale."
    )
    return Section(title, [text], table=Table("lrrr", rows, ["", "before", "after", "change"]))


def _compute(compute: dict[str, Any]) -> str:
    """The fields of `Compute` that are not at their defaults."""
    changed = [f"{name} {value}" for name, value in compute.items() if value not in (None, False)]
    return ", ".join(text for text in changed if text != "precision float32") or "default"


def _given(report: Report) -> Section:
    given = report.given
    scoring, selecting, measuring = given["parts"]
    labels = "with labels" if given["labelled"] else "without labels"
    rows = [
        ["architecture", given["architecture"]],
        ["parameters", f"{given['parameters']:,}"],
        ["classes", f"{given['classes']:,}"],
        ["device, dtype", given["where"]],
        ["image", ", ".join(map(str, given["shape"])) + " (channels, height, width)"],
        ["clean images", f"{given['images']:,}, {labels}"],
        ["of these", f"{scoring} to score, {selecting} to select, {measuring} to measure"],
        ["silencing", given["silencing"]],
        ["removal", given["removal"]],
        ["repair", given["repair"]],
        ["computation", _compute(given["compute"])],
    ]
    return Section("What was given", table=Table("lc", rows))


def _source(report: Report) -> list[Section]:
    """Names, hashes and classes, if the caller gave any."""
    rows = [[k, v if isinstance(v, str) else json_of(v)] for k, v in report.source.items()]
    text = "As given by the caller; not checked."
    return [Section("Where it came from", [text], table=Table("lc", rows))] if rows else []


def _criterion(report: Report) -> Section:
    criterion = report.criterion
    folded = [settings_table("Settings of the criterion", criterion["settings"])]
    if criterion["details"]:
        folded.append(settings_table("Details of the run", criterion["details"]))
    text = f"{criterion['name']}: {criterion['reference']}."
    return Section("Criterion", [text.replace("..", ".")], folded=folded)


def _run(report: Report) -> Section:
    rows = [[stage, f"{seconds:.1f} s"] for stage, seconds in report.seconds.items()]
    rows.append(["total", f"{sum(report.seconds.values()):.1f} s"])
    rows.append(["seed", str(report.seed)])
    if threads := report.given.get("threads"):  # reports written before have none
        rows.append(["CPU threads", str(threads)])
    rows += [[name, version] for name, version in report.versions.items()]
    return Section("Time, seed and versions", table=Table("lr", rows))


def _share(rate: Data) -> str:
    return percent(rate["share"])


def _drop(accuracy: Data) -> str:
    low, high = accuracy["interval"]
    return f"{points(accuracy['drop'])} points [{points(low)}, {points(high)}]"


def _change(old: float, new: float) -> str:
    return f"{new / old - 1:+.1%}" if old else ""
