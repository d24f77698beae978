"""What a scan found: a probability, the evidence, recovered triggers, and suspicious images."""

from __future__ import annotations

import html
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..core.copies import frozen_copy
from ..core.data import CleanData
from ..core.masks import Silencing, silence_
from ..core.predictions import predict_labels, predict_logits
from ..core.recovered import PixelRange, RecoveredTrigger
from ..errors import ScoringError
from ..triggers.perturbation import RecoveredPerturbation
from .exposure import Exposed
from .probability import ALARM, KINDS, QUIET, Evidence, Outcome, Suspicion
from .restoration import Restored
from .settings import ScanSettings

REACHABLE = (
    "small pictures send images to most labels of this network, as they do in benign ones of some "
    "kinds, so universal perturbations say little here"
)

_LIMITS = {
    Outcome.EVIDENCE: "a network without a backdoor can raise this alarm too",
    Outcome.NONE: "triggers that these searches cannot find leave no evidence",
    Outcome.UNKNOWN: "so nothing is said for the model, nor against it",
}

_WORKS = 0.75  # success from which a label's perturbation is one that works


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Diagnosis:
    """What `scan` gives back.

    Attributes:
        suspicions: The labels that were looked at closely, the most probable target first.
        cannot_tell: Why there is no probability; None where there is one.
        classes: Number of classes of the model.
        images: Number of clean images.
        seed: Seed of the scan.
        triggers: The triggers recovered for those labels, and for the ones they are compared with.
        perturbations: The universal perturbation of each label that was searched.
        restored: Restoration for the most probable target; None where its trigger does not work.
        model: A frozen copy of the network that was scanned.
        example: The first clean image, (C, H, W).
        pixels: The valid range of pixels, given or seen in the clean images.
        silencing: What silencing a neuron meant.
        seconds: Wall time of each stage.
        unscored: What restoration cannot silence, a phrase for each kind (see `core.unscored`).
        settings: Of the scan.
        sha256: "weights": of the model; "images": of the clean images (`utils.fingerprint`).
        date: When the scan ended, in UTC (ISO 8601).
    """

    suspicions: tuple[Suspicion, ...]
    cannot_tell: str | None
    classes: int
    images: int
    seed: int
    triggers: tuple[RecoveredTrigger, ...]
    perturbations: tuple[RecoveredPerturbation, ...]
    restored: Restored | None
    model: nn.Module
    example: Tensor
    pixels: PixelRange
    silencing: Silencing = "zero"
    seconds: dict[str, float] = field(default_factory=dict)
    unscored: tuple[str, ...] = ()
    settings: ScanSettings = field(default=ScanSettings())
    sha256: dict[str, str] = field(default_factory=dict)
    date: str = ""

    def __repr__(self) -> str:
        return "\n".join(self.summary().splitlines()[:2])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.summary())}</pre>"

    def __getitem__(self, kind: str) -> Evidence:
        """The evidence of one kind for the most probable target; KeyError for another kind."""
        return {item.kind: item for item in self.suspicions[0].evidence}[kind]

    @property
    def probability(self) -> float | None:
        """That there is a backdoor, where every second network has one; None: it cannot tell."""
        return None if self.cannot_tell else self.suspicions[0].probability

    @property
    def alarm(self) -> bool:
        """Whether a backdoor is probable (from .7)."""
        return self.probability is not None and self.probability >= ALARM

    @property
    def outcome(self) -> Outcome:
        """Evidence, none, or cannot tell."""
        return Outcome.of(self.probability)

    @property
    def target(self) -> int | None:
        """The most probable target; None where there is no alarm."""
        return self.suspicions[0].label if self.alarm else None

    @property
    def verdict(self) -> str:
        """Whether there is evidence, and for which label, in words."""
        return verdict(self.probability, self.suspicions[0].label)

    @property
    def sentence(self) -> str:
        """What was found, from what, and what it does not say; without a full stop."""
        found = self.verdict if not self.cannot_tell else f"{self.verdict}: {self.cannot_tell}"
        return (
            f"{found}; {self.images} clean images and {len(self.perturbations)} of {self.classes} "
            f"labels were searched, and the model was not changed; {_LIMITS[self.outcome]}"
        )

    @property
    def trigger(self) -> RecoveredTrigger | None:
        """The trigger recovered for the most probable target, alarm or not."""
        label = self.suspicions[0].label
        return next((t for t in self.triggers if t.target == label), None)

    @property
    def perturbation(self) -> RecoveredPerturbation | None:
        """The universal perturbation for the most probable target, alarm or not."""
        label = self.suspicions[0].label
        return next((p for p in self.perturbations if p.target == label), None)

    def suspicious(self, images: Tensor, exposed: Exposed | None = None) -> Tensor:
        """How suspicious each image (N, C, H, W) is: (N,) in [0, 1], high = suspicious.

        It is by how much the probability of the label that the network gives falls once the
        neurons are silent that the most probable target's trigger needs. How well this finds
        triggered images: docs/results/diagnosis.md. Without a backdoor it means nothing.

        Args:
            exposed: what `expose` made of the network. Then it is the probability that this gives
                to that label, since it knows little else any more.

        Raises:
            DataError: not a batch of finite images.
            ScoringError: without `exposed`, the most probable target's trigger does not work.
        """
        images = CleanData(images).images
        labels = predict_labels(self.model, images)
        if exposed is not None:
            return _confidence(exposed.model, images, labels)
        if self.restored is None:
            raise ScoringError(
                "no trigger was recovered that works; give what `expose` makes of it"
            )
        silent = frozen_copy(self.model)
        silence_(silent, self.restored.selection, silencing=self.silencing)
        fall = _confidence(self.model, images, labels) - _confidence(silent, images, labels)
        return fall.clamp_min(0)

    @property
    def reachable_by_most_labels(self) -> bool:
        """Whether universal perturbations work for most labels that were searched."""
        found = [perturbation.success for perturbation in self.perturbations]
        return len(found) > 2 and statistics.median(found) >= _WORKS

    @property
    def cautions(self) -> tuple[str, ...]:
        """What weakens the evidence, in sentences without a full stop."""
        return (
            *([self.cannot_tell] if self.cannot_tell else []),
            *self._contradictions(),
            *([REACHABLE] if self.reachable_by_most_labels else []),
            *(
                f"restoration does not silence {what}, which are not scored; a backdoor there is "
                "left to the other kinds of evidence"
                for what in self.unscored
            ),
        )

    def _contradictions(self) -> Iterator[str]:
        """Where numbers of the diagnosis speak against what it says."""
        if self.outcome == Outcome.UNKNOWN:
            return
        first, *others = self.suspicions
        for item in first.evidence:
            if self.alarm and item.log_odds < 0:
                yield (
                    f"{item.kind} ({item.value:.3g}) speaks against a backdoor with target "
                    f"{first.label}, and the other kinds of evidence outweigh it"
                )
            elif not self.alarm and item.log_odds > 0:
                yield (
                    f"{item.kind} ({item.value:.3g}) speaks for a backdoor with target "
                    f"{first.label}, and the other kinds of evidence outweigh it"
                )
        if self.alarm:
            for other in others:
                if other.probability >= ALARM:
                    yield (
                        f"label {other.label} is suspicious too (probability "
                        f"{other.probability:.2f}), though most backdoors have one target"
                    )

    def summary(self) -> str:
        """A few lines for people: what came out, from what, and what it does not say."""
        lines = [
            f"verdict    {self.sentence}",
            f"seed       {self.seed}; {sum(self.seconds.values()):.0f} seconds",
        ]
        for item in self.suspicions[0].evidence:
            side = "speaks for" if item.log_odds > 0 else "speaks against"
            lines.append(
                f"{item.kind:<14}{item.value:.3g}, {side} a backdoor ({item.log_odds:+.1f})"
            )
        lines += [f"caution    {caution}" for caution in self.cautions]
        lines.append("limits     numbers in brackets are log-odds, learned from small networks")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, without the networks."""
        return {
            "alarm": self.alarm,
            "probability": self.probability,
            "cannot_tell": self.cannot_tell,
            "reachable_by_most_labels": self.reachable_by_most_labels,
            "cautions": list(self.cautions),
            "target": self.target,
            "classes": self.classes,
            "images": self.images,
            "seed": self.seed,
            "suspicions": [item.to_dict() for item in self.suspicions],
            "triggers": [
                {
                    "target": t.target,
                    "norm": t.norm,
                    "pixels": t.mask.numel(),
                    "success": t.success,
                    "tested": t.tested,
                }
                for t in self.triggers
            ],
            "perturbations": [
                {"target": p.target, "rms": p.rms, "success": p.success, "tested": p.tested}
                for p in self.perturbations
            ],
            "restoration": None if self.restored is None else list(self.restored.curve),
            "seconds": dict(self.seconds),
        }


def verdict(probability: float | None, label: int) -> str:
    """Whether there is evidence, in words.

    Args:
        probability: of a backdoor; None: it cannot be told.
        label: its most probable target.
    """
    if probability is None:
        return "cannot tell whether there is a backdoor"
    if probability >= ALARM:
        return f"evidence of a backdoor with target {label} (probability {probability:.2f})"
    if probability <= QUIET:
        kinds = ", ".join(KINDS)
        return f"no evidence of the kinds tested, {kinds} (probability {probability:.2f})"
    return f"undecided: probability {probability:.2f}, for label {label}"


def _confidence(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Probability (N,) that the model gives to these labels, on the CPU."""
    probabilities = predict_logits(model, images).float().softmax(1)
    return probabilities.gather(1, labels[:, None])[:, 0]
