"""The report of a purification as plain data, fit for strict JSON: no NaN, no objects.

What people read is laid out from it in `layout.py`; pictures are drawn in `plots.py`.
"""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..core.measures import PairedAccuracy, ProxySuccess
from ..core.scores import Selection
from ..errors import DataError
from ..removal.compaction import RemovalReport
from ..utils.statistics import Rate
from ..version import __version__
from .record import Record

Data = dict[str, Any]


_LARGE = 1000  # numbers; larger arrays among settings and details are only named


NOT_ASKED = "removal was not asked for"


@dataclass(frozen=True)
class Report:
    """Plain data: dictionaries, lists, strings, numbers, booleans and None.

    Numbers that are not finite become None, objects of other kinds their `repr`, large arrays their
    shape. Rates are {"hits", "count", "share", "interval"}, intervals at 95 %; seconds are wall
    time.
    """

    given: Data  # model, images, what was asked
    criterion: Data  # name, reference, settings, details of the run
    selection: Data  # selector, its settings, reason, neurons and layers that it takes, details
    curve: list[Data]  # amounts tried: neurons, drop, success (of a proxy, or None), chosen
    triggers: list[Data]  # recovered ones: source, target, mask norm, proxy success
    layers: list[Data]  # every scored layer: channels, scores, how many silenced and removed
    neurons: list[Data]  # layers that lose some: channels removed, channels silenced and why
    accuracy: Data | None  # None: the images had no labels
    size: Data | None  # before, after, drift; None: nothing was taken out of the tensors
    seconds: dict[str, float]  # of each stage
    seed: int
    versions: dict[str, str]
    limits: list[str]  # what all this does not say
    source: Data = field(default_factory=dict)  # of model and images, as the caller says

    @classmethod
    def of(cls, record: Record) -> Self:
        """What a purification left on record."""
        given, scores, selection = record.given, record.scores, record.selection
        facts = (
            "architecture", "classes", "parameters", "where", "images", "labelled", "parts",
            "removal", "repair", "shares", "sha256",
        )  # fmt: skip
        return cls(
            given={
                **{name: plain(getattr(given, name)) for name in facts},
                "shape": list(given.example.shape),
                "silencing": record.silencing,
                "compute": _settings(given.compute),
            },
            criterion={
                "name": type(given.criterion).__name__,
                "reference": plain(given.criterion.reference),
                "settings": _settings(given.criterion),
                "details": plain(scores.details),
            },
            selection={
                "selector": type(given.selector).__name__,
                "settings": _settings(given.selector),
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
            size=None if record.removal is None else _size(record.removal, given.probe),
            seconds=plain(record.seconds),
            seed=record.seed,
            versions=_versions(),
            limits=_limits(record),
            source=plain(record.source),
        )

    def to_dict(self) -> Data:
        """Fit for `json.dumps(..., allow_nan=False)`, and what that gives back when read."""
        return {"format": 1, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Data) -> Self:
        """What `to_dict` gave. The entries are there and of the right type; no more is checked.

        Raises:
            DataError: another format, an entry that is missing, unknown or of another type.
        """
        if data.get("format") != 1:
            raise DataError(f"expected a report of format 1, got {data.get('format')!r}")
        types = {name: _TYPES[str(f.type)] for name, f in cls.__dataclass_fields__.items()}
        given = {name: entry for name, entry in data.items() if name != "format"}
        given.setdefault("source", {})  # written before there was one
        wrong = sorted(given.keys() ^ types.keys())
        wrong += [n for n, entry in given.items() if n in types and type(entry) not in types[n]]
        if wrong:
            raise DataError(f"not a report of this library: {wrong[0]!r} missing, unknown or wrong")
        return cls(**given)


_TYPES = {
    "Data": (dict,),
    "Data | None": (dict, type(None)),
    "dict[str, float]": (dict,),
    "dict[str, str]": (dict,),
    "list[Data]": (list,),
    "list[str]": (list,),
    "int": (int,),
}


def plain(value: Any) -> Any:  # noqa: PLR0911 - a kind of value a line
    """`value` as data that strict JSON can hold."""
    match value:
        case None | bool() | int():
            return value
        case float():
            return float(value) if math.isfinite(value) else None
        case str():
            return value.encode(errors="replace").decode()  # lone surrogates cannot be written
        case Mapping():
            return {plain(str(key)): plain(entry) for key, entry in value.items()}
        case list() | tuple() | set() | frozenset():
            return [plain(entry) for entry in value]
        case Tensor() | np.ndarray() | np.generic():
            large = math.prod(value.shape) > _LARGE
            return plain(f"array of shape {tuple(value.shape)}" if large else value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _settings(value)
    if callable(value):  # its repr holds an address, which differs from run to run
        return plain(getattr(value, "__qualname__", type(value).__name__))
    return plain(repr(value))


def _settings(configured: Any) -> Data:
    """The fields of a criterion or selector; none where it is not a dataclass."""
    if not dataclasses.is_dataclass(configured):
        return {}
    names = [field.name for field in dataclasses.fields(configured)]
    return {name: plain(getattr(configured, name)) for name in names}


def _rate(rate: Rate) -> Data:
    return {
        "hits": rate.hits,
        "count": rate.count,
        "share": rate.value,
        "interval": list(rate.interval),
    }


def _curve(selection: Selection) -> list[Data]:
    taken = max((p.neurons for p in selection.curve if p.neurons <= len(selection)), default=None)
    return [
        {**plain(point._asdict()), "chosen": point.neurons == taken} for point in selection.curve
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
    silent = record.selection.by_site()
    removed = record.removal.removed if record.removal is not None else ()
    gone = [neuron.site for neuron in removed]
    return [
        {
            "layer": plain(site.name),
            "kind": site.kind,
            "producer": plain(site.producer),
            "channels": site.channels,
            "lowest": piece.min().item(),
            "median": piece.quantile(0.5).item(),
            "highest": piece.max().item(),
            "silenced": len(silent.get(site.name, [])),
            "removed": gone.count(site.name),
        }
        for site, piece in zip(record.scores.sites, record.scores.by_site().values(), strict=True)
    ]


def _neurons(record: Record) -> list[Data]:
    """Layer by layer; a neuron is removed, or stays in the tensors, silent, for a reason."""
    reasons = {} if record.removal is None else record.removal.silenced
    removed = set() if record.removal is None else set(record.removal.removed)
    layers: dict[str, Data] = {
        name: {"layer": plain(name), "removed": [], "silenced": []}
        for name in record.selection.by_site()
    }
    whys: dict[tuple[str, str], list[int]] = {}
    for neuron in sorted(record.selection.neurons):
        if neuron in removed:
            layers[neuron.site]["removed"].append(neuron.channel)
        else:
            why = reasons.get(neuron, NOT_ASKED)
            whys.setdefault((neuron.site, why), []).append(neuron.channel)
    for (name, why), channels in whys.items():
        layers[name]["silenced"].append({"why": plain(why), "channels": channels})
    return list(layers.values())


def _accuracy(accuracy: PairedAccuracy) -> Data:
    return {
        "before": _rate(accuracy.before),
        "after": _rate(accuracy.after),
        "drop": accuracy.drop,
        "interval": plain(accuracy.interval),
    }


def _size(removal: RemovalReport, batch: int) -> Data:
    return {
        "before": plain(removal.before),
        "after": plain(removal.after),
        "batch": batch,  # images that the latency is of
        "removed": len(removal.removed),
        "silenced": len(removal.silenced),
        "channels": removal.channels,
        "drift": plain(removal.drift),
    }


def _versions() -> dict[str, str]:
    found = {"nnprune_backdoor": __version__, "python": platform.python_version()}
    found |= {"torch": str(torch.__version__), "numpy": np.__version__}
    try:
        return found | {"timm": metadata.version("timm")}
    except metadata.PackageNotFoundError:
        return found


def _limits(record: Record) -> list[str]:
    """What this run does not say, in plain words; never a verdict on the model."""
    size, accuracy = record.removal, record.accuracy
    said = [
        "Silencing lowers the success of backdoors that use these neurons. It is no proof that no "
        "backdoor is left."
        if len(record.selection)
        else "Nothing was silenced, so the model computes what it did before, a backdoor included "
        "if it had one. This run gives no evidence that it had none."
    ]
    if record.triggers:
        said.append(
            "Proxy success is that of triggers recovered from clean images. The attacker's trigger "
            "was never seen here; it may be another one and still work."
        )
    else:
        said.append(
            "No recovered trigger was tried on the model, so no number here is about a backdoor: "
            "what was measured is clean accuracy and size."
        )
    if accuracy is None:
        said.append("What clean accuracy it cost was not measured: the images have no labels.")
    else:
        said.append(
            f"Clean accuracy was measured on {accuracy.before.count} images; with few images or "
            "rare classes a loss can stay unseen. The interval says how far the number goes."
        )
    if record.guessing:
        said.insert(0, f"{record.guessing[0].upper()}{record.guessing[1:]}.")
    if record.repair_rejected:
        said.append(f"A repair was asked for and undone: {record.repair_rejected}.")
    if record.repaired:
        said.append(
            "All weights were trained further so that the recovered triggers do nothing. A proxy "
            "success of nearly zero is what that training asked for; it says less about the "
            "attacker's trigger than it would without. So does evidence that is gone after it: "
            "the benign networks that it is held against were not trained so."
        )
    if size is not None and record.given.removal == "group":
        said.append(
            "Whole coupled groups were removed. That changes what the model computes, by "
            f"{size.drift:.1e} of the scale of the logits, and was not foreseen when selecting."
        )
    return said
