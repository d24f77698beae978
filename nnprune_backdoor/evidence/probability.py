"""From what was found for a label to the probability of a backdoor: one logistic function.

Ours. A backdoor's label stands out within its own network: small pictures and small patches reach
it where other labels resist, and the neurons that its patch works through can be silenced while
images keep their labels. No kind of evidence decides alone, since in some benign networks one of
them stands out as well. The numbers below were fitted to 101 networks of eight architectures
(benchmarks/evidence/calibration.py). With each architecture left out of the fit in turn:
docs/results/diagnosis.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ..utils.short_repr import ShortRepr

ALARM = 0.7  # probability from which on there is evidence; the network is as likely benign before
QUIET = 0.3  # and up to which there is none


class Outcome(StrEnum):
    """What a run says of a backdoor; exit codes and documents follow it."""

    EVIDENCE = "evidence"
    NONE = "no evidence"
    UNKNOWN = "cannot tell"  # no probability can be given, or one that decides nothing
    NOT_SOUGHT = "not looked for"

    @classmethod
    def of(cls, probability: float | None) -> Outcome:
        """From the probability of a backdoor; None: it cannot be told."""
        if probability is not None and probability >= ALARM:
            return cls.EVIDENCE
        return cls.NONE if probability is not None and probability <= QUIET else cls.UNKNOWN


@dataclass(frozen=True)
class Kind:
    """One kind of evidence, and how it counts.

    Attributes:
        does: What it is, in words.
        middle: Halfway between the means of benign and of backdoored networks.
        weight: Log-odds that one more adds.
    """

    does: str
    middle: float
    weight: float

    def log_odds(self, value: float) -> float:
        """What this value adds to the log-odds of a backdoor."""
        return self.weight * (value - self.middle)


class _Ratio(Kind):
    """Counts by the logarithm; small values are suspicious."""

    def log_odds(self, value: float) -> float:
        return self.weight * (-math.log(max(value, 1e-6)) - self.middle)


UNIVERSAL, SIZE, RESTORED = "universal", "relative size", "restoration"
KINDS: dict[str, Kind] = {
    UNIVERSAL: Kind(
        "share of images that one small picture, added, sends to the label", 0.864, 16.2
    ),
    SIZE: _Ratio(
        "size of the label's recovered trigger, as a share of the median of other labels'",
        2.07,
        1.63,
    ),
    RESTORED: Kind(
        "share of triggered images that get their own label back once few neurons are silent",
        0.48,
        3.8,
    ),
}
_START = -0.744  # log-odds where every kind is at its middle


@dataclass(frozen=True, repr=False)
class Evidence(ShortRepr):
    """One kind of evidence for one label.

    Attributes:
        kind: One of `KINDS`.
        value: What was found.
    """

    kind: str
    value: float

    @property
    def log_odds(self) -> float:
        """What it adds to the log-odds of a backdoor; below zero it speaks against one."""
        return KINDS[self.kind].log_odds(self.value)


@dataclass(frozen=True, repr=False)
class Suspicion(ShortRepr):
    """All evidence for one label.

    Attributes:
        label: The label.
        evidence: One item for each kind.
    """

    label: int
    evidence: tuple[Evidence, ...]

    @classmethod
    def of(cls, label: int, *, universal: float, size: float, restored: float) -> Suspicion:
        """From what was found (see `KINDS`)."""
        found = {UNIVERSAL: universal, SIZE: size, RESTORED: restored}
        return cls(label, tuple(Evidence(kind, value) for kind, value in found.items()))

    @property
    def probability(self) -> float:
        """That the label is a backdoor's target, where every second network has a backdoor."""
        odds = _START + sum(item.log_odds for item in self.evidence)
        return 1 / (1 + math.exp(-max(-50.0, min(50.0, odds))))

    def __getitem__(self, kind: str) -> float:
        """The value of a kind."""
        return {item.kind: item.value for item in self.evidence}[kind]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        items = {
            item.kind: {"value": item.value, "log_odds": item.log_odds} for item in self.evidence
        }
        return {"label": self.label, "probability": self.probability, "evidence": items}


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
