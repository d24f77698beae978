"""What the report says to people, in which order: sections of text, tables and pictures.

`pages.py` writes them as Markdown or HTML.
"""

from __future__ import annotations

import json
from typing import Any

from ..evidence.null import last_look
from .evidence_section import evidence_section
from .report import Data, Report
from .sections import Row, Section, Table, interval, number, percent, points, spans


def headline(report: Report) -> list[Row]:
    """The few numbers that matter: what, how much, beside what."""
    chosen, accuracy, size = report.selection, report.accuracy, report.size
    share = percent(chosen["neurons"] / chosen["of"], 2)
    layers = f"{len(report.neurons)} of {len(report.layers)} layers"
    found: list[Row] = [
        ("neurons silenced", f"{chosen['neurons']:,}", f"{share} of {chosen['of']:,}, {layers}")
    ]
    if accuracy is None:
        found.append(("clean accuracy", "not measured", "the images have no labels"))
    else:
        shares = f"{_share(accuracy['before'])} → {_share(accuracy['after'])}"
        note = f"drop {_drop(accuracy)} on {accuracy['before']['count']} images"
        found.append(("clean accuracy", shares, note))
    if report.triggers:
        worst = max(report.triggers, key=lambda trigger: trigger["after"]["share"])
        shares = f"{_share(worst['before'])} → {_share(worst['after'])}"
        label = _label(report, worst["target"])
        note = f"recovered trigger of label {label}, the most successful after"
        found.append(("proxy success", shares, note))
    if size is None:
        found.append(("parameters", f"{report.given['parameters']:,}", "shape unchanged"))
    else:
        old, new = size["before"]["parameters"], size["after"]["parameters"]
        found.append(("parameters", f"{new:,}", f"{_change(old, new)} of {old:,}"))
    return found


def sections(report: Report) -> list[Section]:
    """The whole report, what matters most first."""
    return [
        Section("What this does not say", points=report.limits),
        *_evidence(report),
        _accuracy(report),
        _triggers(report),
        _amount(report),
        _layers(report),
        _neurons(report),
        _size(report),
        _given(report),
        *_source(report),
        _criterion(report),
        _run(report),
    ]


def _accuracy(report: Report) -> Section:
    title, accuracy = "Clean accuracy", report.accuracy
    if accuracy is None:
        return Section(title, ["Not measured: the images have no labels."])
    rows = [
        [when, f"{rate['hits']} of {rate['count']}", _share(rate), interval(rate["interval"])]
        for when, rate in (("before", accuracy["before"]), ("after", accuracy["after"]))
    ]
    text = (
        f"Drop: {_drop(accuracy)}; below zero is a gain. The same images before and after, which "
        "neither criterion nor selector had seen, so only answers that changed count."
    )
    head = ["", "right", "share", "95 % interval"]
    return Section(title, [text], table=Table("lrrr", rows, head))


def _evidence(report: Report) -> list[Section]:
    """Before and after, where the selector looked for any."""
    details = report.selection["details"]
    if "diagnosis" not in details:
        return []
    after = last_look(details, report.selection["neurons"])
    return [evidence_section(details["diagnosis"], after)]


def _triggers(report: Report) -> Section:
    title = "Recovered triggers"
    if not report.triggers:
        return Section(title, ["None was recovered, by criterion or selector."])
    text = (
        "Triggers found by inversion on clean images alone. Proxy success: the share of "
        "images, unseen until then, that the stamp sends to its label. It stands in for the "
        "attack, which nothing here has seen."
    )
    rows = [
        [
            trigger["source"],
            _label(report, trigger["target"]),
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
    caption = "One of the clean images, the mask, the pattern under the mask, the image stamped."
    return Section(
        title, [text], table=Table("lrrrrr", rows, head), picture="triggers", caption=caption
    )


def _amount(report: Report) -> Section:
    chosen = report.selection
    share = percent(chosen["neurons"] / chosen["of"], 2)
    text = [
        f"{chosen['neurons']:,} of {chosen['of']:,} neurons ({share}) were silenced. "
        f"{chosen['selector']} decided: {chosen['reason'] or 'no reason given'}."
    ]
    folded = [_settings("Settings of the selector", chosen["settings"])]
    if noted := {k: v for k, v in chosen["details"].items() if k != "diagnosis"}:  # see `_evidence`
        folded.append(_settings("What the selector noted", noted))
    if not report.curve:
        return Section("How much goes", text, folded=folded)
    rows = [
        [
            f"{point['neurons']:,}",
            points(point["drop"]),
            "" if point["success"] is None else percent(point["success"]),
            "chosen" if point["chosen"] else "",
        ]
        for point in report.curve
    ]
    head = ["neurons silenced", "accuracy drop, points", "proxy success", ""]
    folded.insert(0, (f"The {len(rows)} amounts tried", Table("rrrl", rows, head)))
    caption = (
        "Amounts tried on held-out clean images. Dashed: the one chosen; dotted: the drop allowed."
    )
    return Section("How much goes", text, folded=folded, picture="curve", caption=caption)


def _layers(report: Report) -> Section:
    rows = [
        [
            layer["layer"],
            layer["kind"],
            str(layer["channels"]),
            *(number(layer[which]) for which in ("lowest", "median", "highest")),
            str(layer["silenced"] or ""),
            str(layer["removed"] or ""),
        ]
        for layer in report.layers
    ]
    head = ["layer", "kind", "channels", "lowest", "median", "highest", "silenced", "removed"]
    return Section(
        "Scores by layer",
        ["Low scores go first. Scores of different criteria are on different scales."],
        folded=[(f"All {len(rows)} layers", Table("clrrrrrr", rows, head))],
        picture="scores",
        caption="Every neuron, a layer a row; those that were silenced are marked.",
    )


def _neurons(report: Report) -> Section:
    if not report.neurons:
        return Section("Neurons silenced", ["None."])
    rows = []
    for layer in report.neurons:
        if layer["removed"]:
            rows.append([layer["layer"], "removed", spans(layer["removed"]), ""])
        for part in layer["silenced"]:
            rows.append([layer["layer"], "silenced", spans(part["channels"]), part["why"]])
    text = (
        "Removed: taken out of the tensors. Silenced: still there, with weights of zero, for the "
        "reason given. Channels are numbered as in the model given."
    )
    head = ["layer", "what happened", "channels", "why not removed"]
    return Section("Neurons silenced", [text], table=Table("clll", rows, head))


def _size(report: Report) -> Section:
    title, size = "Size and speed", report.size
    if size is None:
        return Section(
            title, ["Nothing was taken out of the tensors: shape and speed are as before."]
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
        f"Channels removed: {size['channels']}, including those that only served removed neurons "
        "or that nothing read before. "
        f"Logits differ from the silenced model's by {drift} of their scale."
    )
    return Section(title, [text], table=Table("lrrr", rows, ["", "before", "after", "change"]))


def _compute(compute: dict[str, Any]) -> str:
    """What of `Compute` was not as the model is."""
    changed = [f"{name} {value}" for name, value in compute.items() if value not in (None, False)]
    return ", ".join(text for text in changed if text != "precision float32") or "as the model is"


def _given(report: Report) -> Section:
    given = report.given
    scoring, selecting, measuring = given["parts"]
    labels = "with labels" if given["labelled"] else "without labels"
    rows = [
        ["architecture", given["architecture"]],
        ["parameters", f"{given['parameters']:,}"],
        ["classes", f"{given['classes']:,}"],
        ["device, type", given["where"]],
        ["image", ", ".join(map(str, given["shape"])) + " (channels, height, width)"],
        ["clean images", f"{given['images']:,}, {labels}"],
        ["of these", f"{scoring} to score, {selecting} to select, {measuring} to measure"],
        ["silencing", given["silencing"]],
        ["removal", given["removal"]],
        ["repair", given.get("repair", "none")],  # older reports do not have it
        ["passes", _compute(given.get("compute", {}))],
    ]
    return Section("What was given", table=Table("lc", rows))


def _source(report: Report) -> list[Section]:
    """Names, hashes and classes that the caller gave, if any."""
    rows = [[k, v if isinstance(v, str) else _json(v)] for k, v in report.source.items()]
    text = "Said by whoever ran the purification, not found out by it."
    return [Section("Where it came from", [text], table=Table("lc", rows))] if rows else []


def _label(report: Report, label: int) -> str:
    """A label and, where the caller named the classes, its name."""
    names = report.source.get("classes")
    if not isinstance(names, list) or not 0 <= label < len(names):
        return str(label)
    return f"{label} ({str(names[label])[:40]})"


def _criterion(report: Report) -> Section:
    criterion = report.criterion
    folded = [_settings("Settings of the criterion", criterion["settings"])]
    if criterion["details"]:
        folded.append(_settings("What the criterion noted", criterion["details"]))
    text = f"{criterion['name']}: {criterion['reference']}."
    return Section("Criterion", [text.replace("..", ".")], folded=folded)


def _run(report: Report) -> Section:
    rows = [[stage, f"{taken:.1f} s"] for stage, taken in report.seconds.items()]
    rows.append(["all", f"{sum(report.seconds.values()):.1f} s"])
    rows.append(["seed", str(report.seed)])
    rows += [[name, version] for name, version in report.versions.items()]
    return Section("Time, seed and versions", table=Table("lr", rows))


def _settings(title: str, settings: Data) -> tuple[str, Table]:
    rows = [[name, _json(value)] for name, value in settings.items()]
    return title, Table("lc", rows or [["none", ""]])


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _share(rate: Data) -> str:
    return percent(rate["share"])


def _drop(accuracy: Data) -> str:
    low, high = accuracy["interval"]
    return f"{points(accuracy['drop'])} points [{points(low)}, {points(high)}]"


def _change(old: float, new: float) -> str:
    return f"{new / old - 1:+.1%}" if old else ""
