"""The report of a purification as plain data for strict JSON: without NaN and objects.

`purify_page` makes sections of a page from it; pictures are drawn in `plots`.
"""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Self

import numpy as np
import torch

from ..core.agreement import Agreement
from ..core.measures import PairedAccuracy, ProxySuccess, SuspectLabel
from ..core.scores import Selection
from ..errors import DataError
from ..removal.report import RemovalReport
from ..utils.short_repr import ShortRepr
from ..utils.statistics import Rate
from ..version import __version__
from .cautions import cautions_of
from .confusion import confusion_of
from .limits import limits_of
from .plain import plain, settings_of
from .record import Record
from .verdict import verdict_of

Data = dict[str, Any]


NOT_ASKED = "removal was not asked for"


@dataclass(frozen=True, repr=False)
class Report(ShortRepr):
    """Plain data: dictionaries, lists, strings, numbers, booleans and None.

    Numbers that are not finite become None, large arrays their shape, and other objects their
    `repr`. Rates are {"hits", "count", "share", "interval"} with 95 % intervals; seconds are wall
    time.

    Attributes:
        verdict: What was found, done, paid, and is not known, in one sentence.
        given: Model, images and options.
        criterion: Name, reference, settings, and details of the run.
        selection: Selector, its settings, reason, number of neurons, details.
        curve: Amounts that were tried: neurons, drop, proxy success, share of the images with the
            same label, chosen; None where it was not measured.
        triggers: Recovered triggers: source, target, mask norm, proxy success.
        layers: All scored layers: channels, scores, numbers of neurons silenced and removed.
        neurons: Layers with silenced neurons: channels removed, channels only silenced and why.
        accuracy: Before, after, drop; None if the images had no labels.
        agreement: Of the purified model with the given one: same label, divergence (nats).
        confusion: Which labels the models take for which, on the same images.
        suspects: Labels that a small perturbation reached in the given model: label, shares of the
            images before and after, None where there was no image; None: not looked for.
        size: Before, after, drift; None if nothing was removed from the tensors.
        seconds: Stage -> seconds.
        seed: As for `purify`.
        versions: Package -> version.
        cautions: What contradicts or weakens the outcome, in sentences.
        limits: What the report does not say, in sentences.
        source: Of the model and the images, as given by the caller.
    """

    verdict: str
    given: Data
    criterion: Data
    selection: Data
    curve: list[Data]
    triggers: list[Data]
    layers: list[Data]
    neurons: list[Data]
    accuracy: Data | None
    agreement: Data | None
    confusion: Data | None
    suspects: list[Data] | None
    size: Data | None
    seconds: dict[str, float]
    seed: int
    versions: dict[str, str]
    cautions: list[str]
    limits: list[str]
    source: Data

    @classmethod
    def of(cls, record: Record) -> Self:
        """The report of a purification."""
        given, scores, selection = record.given, record.scores, record.selection
        facts = (
            "architecture", "classes", "parameters", "where", "images", "labelled", "parts",
            "removal", "repair", "shares", "sha256", "threads", "date",
        )  # fmt: skip
        return cls(
            verdict=plain(verdict_of(record)),
            given={
                **{name: plain(getattr(given, name)) for name in facts},
                "shape": list(given.example.shape),
                "silencing": record.silencing,
                "compute": settings_of(given.compute),
            },
            criterion={
                "name": type(given.criterion).__name__,
                "reference": plain(given.criterion.reference),
                "settings": settings_of(given.criterion),
                "details": plain(scores.details),
            },
            selection={
                "selector": type(given.selector).__name__,
                "settings": settings_of(given.selector),
                "reason": plain(selection.reason),
                "neurons": len(selection),
                "of": len(scores.flat),
                "details": plain(selection.details),
            },
            curve=_curve(selection),
            triggers=[_trigger(proxy) for proxy in record.triggers],
            layers=_layers(record),
            neurons=_neurons(record),
            accuracy=None if record.accuracy is None else _accuracy(record.accuracy),
            agreement=None if record.agreement is None else _agreement(record.agreement),
            confusion=None if record.answers is None else confusion_of(record.answers),
            suspects=None if record.suspects is None else [_suspect(s) for s in record.suspects],
            size=None if record.removal is None else _size(record.removal, given.probe),
            seconds=plain(record.seconds),
            seed=record.seed,
            versions=versions_used(),
            cautions=plain(cautions_of(record)),
            limits=limits_of(record),
            source=plain(record.source),
        )

    def label(self, label: int) -> str:
        """A label, with its name if the caller gave names of the classes."""
        names = self.source.get("classes")
        if not isinstance(names, list) or not 0 <= label < len(names):
            return str(label)
        return f"{label} ({str(names[label])[:40]})"

    def to_dict(self) -> Data:
        """Plain data, which a round trip through strict JSON does not change."""
        return {"format": 1, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Data) -> Self:
        """The inverse of `to_dict`; only the names and types of the entries are checked.

        Raises:
            DataError: another format, or an entry that is missing, unknown or of another type.
        """
        if data.get("format") != 1:
            raise DataError(f"expected a report of format 1, got {data.get('format')!r}")
        types = {name: _TYPES[str(f.type)] for name, f in cls.__dataclass_fields__.items()}
        # reports written before there were these have none
        later: Data = {"verdict": "", "cautions": []}
        later |= dict.fromkeys(("agreement", "confusion", "suspects"))
        given = {**later, **{k: entry for k, entry in data.items() if k != "format"}}
        wrong = sorted(given.keys() ^ types.keys())
        wrong += [n for n, entry in given.items() if n in types and type(entry) not in types[n]]
        if wrong:
            raise DataError(
                f"not a report of this library: {wrong[0]!r} is missing, unknown or of another "
                "type; give a report that this version wrote"
            )
        return cls(**given)


_TYPES = {
    "Data": (dict,),
    "Data | None": (dict, type(None)),
    "dict[str, float]": (dict,),
    "dict[str, str]": (dict,),
    "list[Data]": (list,),
    "list[Data] | None": (list, type(None)),
    "list[str]": (list,),
    "str": (str,),
    "int": (int,),
}


def _rate(rate: Rate) -> Data:
    return {
        "hits": rate.hits,
        "count": rate.count,
        "share": rate.value,
        "interval": list(rate.interval),
    }


def _curve(selection: Selection) -> list[Data]:
    chosen = max((p.neurons for p in selection.curve if p.neurons <= len(selection)), default=None)
    return [
        {**plain(point._asdict()), "chosen": point.neurons == chosen} for point in selection.curve
    ]


def _trigger(proxy: ProxySuccess) -> Data:
    trigger = proxy.trigger
    return {
        "source": proxy.source,
        "target": trigger.target,
        "norm": plain(trigger.norm),
        "pixels": trigger.mask.numel(),
        "steps": trigger.steps,
        "recovered": {"share": plain(trigger.success), "count": trigger.tested},
        "before": _rate(proxy.before),
        "after": _rate(proxy.after),
    }


def _layers(record: Record) -> list[Data]:
    silenced = record.selection.by_site()
    removed = record.removal.removed if record.removal is not None else ()
    sites_of_removed = [neuron.site for neuron in removed]
    return [
        {
            "layer": plain(site.name),
            "kind": site.kind,
            "producer": plain(site.producer),
            "channels": site.channels,
            "lowest": scores.min().item(),
            "median": scores.quantile(0.5).item(),
            "highest": scores.max().item(),
            "silenced": len(silenced.get(site.name, [])),
            "removed": sites_of_removed.count(site.name),
        }
        for site, scores in zip(record.scores.sites, record.scores.by_site().values(), strict=True)
    ]


def _neurons(record: Record) -> list[Data]:
    """Silenced neurons layer by layer: channels removed, and channels only silenced by reason."""
    reasons = {} if record.removal is None else record.removal.silenced
    removed = set() if record.removal is None else set(record.removal.removed)
    layers: dict[str, Data] = {
        name: {"layer": plain(name), "removed": [], "silenced": []}
        for name in record.selection.by_site()
    }
    only_silenced: dict[tuple[str, str], list[int]] = {}
    for neuron in sorted(record.selection.neurons):
        if neuron in removed:
            layers[neuron.site]["removed"].append(neuron.channel)
        else:
            reason = reasons.get(neuron, NOT_ASKED)
            only_silenced.setdefault((neuron.site, reason), []).append(neuron.channel)
    for (name, reason), channels in only_silenced.items():
        layers[name]["silenced"].append({"why": plain(reason), "channels": channels})
    return list(layers.values())


def _accuracy(accuracy: PairedAccuracy) -> Data:
    return {
        "before": _rate(accuracy.before),
        "after": _rate(accuracy.after),
        "drop": accuracy.drop,
        "interval": plain(accuracy.interval),
    }


def _suspect(suspect: SuspectLabel) -> Data:
    rates = (None if rate is None else _rate(rate) for rate in (suspect.before, suspect.after))
    return {"label": suspect.label, **dict(zip(("before", "after"), rates, strict=True))}


def _agreement(agreement: Agreement) -> Data:
    return {"same": _rate(agreement.same), "divergence": plain(agreement.divergence)}


def _size(removal: RemovalReport, batch: int) -> Data:
    return {
        "before": plain(removal.before),
        "after": plain(removal.after),
        "batch": batch,  # images for which the latency was measured
        "removed": len(removal.removed),
        "silenced": len(removal.silenced),
        "channels": removal.channels,
        "drift": plain(removal.drift),
    }


def versions_used() -> dict[str, str]:
    """Package -> version, of those that a result depends on."""
    versions = {"nnprune_backdoor": __version__, "python": platform.python_version()}
    versions |= {"torch": str(torch.__version__), "numpy": np.__version__}
    try:
        return versions | {"timm": metadata.version("timm")}
    except metadata.PackageNotFoundError:
        return versions
