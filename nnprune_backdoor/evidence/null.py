"""Kinds of evidence of a backdoor, each beside what benign networks gave.

Each kind of evidence is a number that backdoored networks tend to have higher (or lower) than
benign ones, and is held against what benign networks gave (`null.json`, made by
benchmarks/evidence/diagnosis.py). Kinds that did not separate the two are reported, and raise no
alarm (docs/results/diagnosis.md). No alarm means no evidence of these kinds, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from ..utils.short_repr import ShortRepr

# kind -> whether high or low values are suspicious, and what it is
KINDS: dict[str, tuple[Literal["high", "low"], str]] = {
    "restoration": (
        "high",
        "share of stamped images that get their own label back once few neurons are silent",
    ),
    "trigger size": ("low", "smallest recovered trigger that works, as a share of the image"),
    "relative size": ("low", "the smallest trigger as a share of the median label's"),
    "anomaly": ("high", "how far the smallest trigger lies below the others (Neural Cleanse)"),
    "universal": (
        "high",
        "success of the best small picture that is added to any image, mean of three searches",
    ),
    "exposure": ("high", "most frequent label once the clean task is unlearned, as a share"),
}


@dataclass(frozen=True, repr=False)
class Evidence(ShortRepr):
    """One kind of evidence, and where it lies among benign networks.

    Attributes:
        kind: One of `KINDS`.
        value: The most suspicious label's value.
        label: That label; None where the kind names none.
        by_label: Value of each label that was searched.
        null: Reference distribution: benign network to its value.
        threshold: Value that raises the alarm; None where this kind never does.
    """

    kind: str
    value: float
    label: int | None
    by_label: dict[int, float]
    null: dict[str, float]
    threshold: float | None

    @property
    def percentile(self) -> float | None:
        """Share of the benign networks that are less suspicious than this; None without any."""
        if not self.null:
            return None
        return sum(self._beyond(value) for value in self.null.values()) / len(self.null)

    @property
    def alarm(self) -> bool:
        """Whether the value has reached the threshold."""
        if self.threshold is None:
            return False
        return self.value == self.threshold or self._beyond(self.threshold)

    def _beyond(self, value: float) -> bool:
        """Whether this evidence is more suspicious than `value`."""
        high = KINDS[self.kind][0] == "high"
        return self.value > value if high else self.value < value


# found with the thresholds, on benign and backdoored networks (docs/results/diagnosis.md)
_NEAR = 0.9  # of the best universal perturbation's success

_RESTORED = 0.6


def suspected(evidence: Sequence[Evidence]) -> int | None:
    """The label that the evidence points to; None where none of it raises the alarm.

    Where the alarm is the universal perturbation's: among the labels that come near the best one,
    that of most restored images if these are many, else the best one. Each kind alone is
    sometimes wrong, by a class that any network is quick to say.
    """
    alarms = [item for item in evidence if item.alarm]
    if not alarms:
        return None
    kinds = {item.kind: item for item in evidence}
    universal = kinds.get("universal")
    if universal is None or not universal.alarm:
        return alarms[0].label
    near = [k for k, share in universal.by_label.items() if share >= _NEAR * universal.value]
    restored = kinds["restoration"].by_label if "restoration" in kinds else {}
    best = max(near, key=lambda label: restored.get(label, 0.0))
    return best if restored.get(best, 0.0) >= _RESTORED else universal.label


def verdict(found: Sequence[str], tested: Sequence[str], target: int | None) -> str:
    """Whether there is evidence, in words.

    Args:
        found: kinds that raise the alarm.
        tested: kinds that could.
        target: the suspected label.
    """
    if found:
        return f"evidence of a backdoor with target {target} ({', '.join(found)})"
    if not tested:
        return "no kind of evidence could be tested"
    return f"no evidence of the kinds tested ({', '.join(tested)})"


# of images up to which a universal perturbation raises the alarm. The null is of 32 x 32; with more
# pixels the same root mean square sends any network's images anywhere, as it did a benign
# ImageNet network's at 224 x 224 (success .98)
LARGEST = 64 * 64


def evidence_of(
    kind: str, by_label: dict[int, float], pixels: int, *, judged: bool = True
) -> Evidence | None:
    """The most suspicious label's, beside what benign networks gave; None without a label.

    Args:
        pixels: height times width of the images.
        judged: whether the alarm's threshold holds for this value.
    """
    if not by_label:
        return None
    worst = max if KINDS[kind][0] == "high" else min
    label = worst(by_label, key=by_label.__getitem__)
    stored = null()
    benign = {name: values[kind] for name, values in stored["benign"].items() if kind in values}
    judged &= kind not in ("universal", "relative size") or pixels <= LARGEST
    threshold = stored["alarm"].get(kind) if judged else None
    return Evidence(kind, by_label[label], label, by_label, benign, threshold)


@cache
def null() -> dict[str, Any]:
    """What benign networks gave, name -> kind -> value, and the values that raise the alarm."""
    stored: dict[str, Any] = json.loads(
        files(__package__).joinpath("null.json").read_text(encoding="utf-8")
    )
    return stored


def evidence_left(details: Mapping[str, Any], neurons: int) -> bool:
    """Whether the network that is given out shows evidence, as far as a selector has looked.

    The words, the page and the exit code all say what this says.

    Args:
        details: of the selection.
        neurons: how many were selected.
    """
    look = last_look(details, neurons)
    if look is not None:
        return bool(look["alarm"])
    return not neurons and bool(details.get("diagnosis", {}).get("alarm"))


def last_look(details: Mapping[str, Any], neurons: int) -> dict[str, Any] | None:
    """What the selector `auto` noted of the network that is given out; None: it did not look.

    Args:
        details: of the selection.
        neurons: how many were selected.
    """
    if "repaired" in details:
        return dict(details["repaired"])
    looked = (look for look in details.get("remaining", ()) if look["neurons"] == neurons)
    return next((dict(look) for look in looked), None)
