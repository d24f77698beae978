"""What a scan found: evidence, suspected label, recovered triggers, and suspicious images."""

from __future__ import annotations

import html
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from ..core.copies import frozen_copy
from ..core.data import CleanData
from ..core.masks import Silencing, silence_
from ..core.predictions import predict_labels, predict_logits
from ..core.recovered import PixelRange, RecoveredTrigger
from ..errors import ScoringError
from ..triggers.perturbation import RecoveredPerturbation
from .exposure import Exposed
from .null import KINDS, LARGEST, Evidence, suspected, verdict
from .restoration import Restored

REACHABLE = (
    "small pictures send images to most labels of this network, as they do in benign ones of some "
    "kinds; an alarm by universal perturbations alone says little here"
)

_WORKS = 0.75  # success from which a label's perturbation is one that works


@dataclass(frozen=True, eq=False, repr=False)
class Diagnosis:
    """What `scan` gives back.

    Attributes:
        evidence: One item for each kind of evidence.
        classes: Number of classes of the model.
        images: Number of clean images.
        seed: Seed of the scan.
        triggers: The trigger recovered for each label that was searched.
        perturbations: The universal perturbation of each label that was searched; more labels than
            for triggers where classes are many.
        restored: Restoration for the label where most images were restored; None where no trigger
            works.
        exposed: The model after its clean task was unlearned.
        model: A frozen copy of the network that was scanned.
        example: The first clean image, (C, H, W).
        pixels: The valid range of pixels, given or seen in the clean images.
        silencing: What silencing a neuron meant.
        seconds: Wall time of each stage.
        unscored: What restoration cannot silence, a phrase for each kind (see `core.unscored`).
    """

    evidence: tuple[Evidence, ...]
    classes: int
    images: int
    seed: int
    triggers: tuple[RecoveredTrigger, ...]
    perturbations: tuple[RecoveredPerturbation, ...]
    restored: Restored | None
    exposed: Exposed
    model: nn.Module
    example: Tensor
    pixels: PixelRange
    silencing: Silencing = "zero"
    seconds: dict[str, float] = field(default_factory=dict)
    unscored: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return "\n".join(self.summary().splitlines()[:2])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.summary())}</pre>"

    def __getitem__(self, kind: str) -> Evidence:
        """The evidence of one kind; KeyError where there is none."""
        return {item.kind: item for item in self.evidence}[kind]

    @property
    def alarm(self) -> bool:
        """Whether any evidence is beyond what it may be."""
        return any(item.alarm for item in self.evidence)

    @property
    def verdict(self) -> str:
        """Whether there is evidence, for which label, and of which kinds, in words."""
        found = [item.kind for item in self.evidence if item.alarm]
        tested = [item.kind for item in self.evidence if item.threshold is not None]
        return verdict(found, tested, self.target)

    @property
    def target(self) -> int | None:
        """The suspected label; None where there is no alarm."""
        return suspected(self.evidence)

    @property
    def trigger(self) -> RecoveredTrigger | None:
        """The trigger recovered for the suspected label."""
        return next((t for t in self.triggers if t.target == self.target), None)

    @property
    def perturbation(self) -> RecoveredPerturbation | None:
        """The universal perturbation for the suspected label."""
        return next((p for p in self.perturbations if p.target == self.target), None)

    @property
    def smallest(self) -> RecoveredTrigger | None:
        """Of the recovered triggers that work on most images, the one of the smallest mask."""
        sizes = next((item for item in self.evidence if item.kind == "trigger size"), None)
        label = None if sizes is None else sizes.label
        return next((t for t in self.triggers if t.target == label), None)

    def suspicious(
        self, images: Tensor, by: Literal["silencing", "exposure"] | None = None
    ) -> Tensor:
        """How suspicious each image (N, C, H, W) is: (N,) in [0, 1], high = suspicious.

        By silencing: by how much the probability of the label that the network gives falls once
        the neurons are silent that the most suspicious trigger needs. By exposure: the probability
        of that label in the exposed model, which knows little else any more. By default silencing
        where restoration raises the alarm for the suspected label, else exposure.
        How well each finds triggered images: docs/results/diagnosis.md. Without a backdoor the
        scores mean nothing.

        Raises:
            DataError: not a batch of finite images.
            ScoringError: by silencing, where no label has a trigger that works.
        """
        images = CleanData(images).images
        labels = predict_labels(self.model, images)
        if by is None:
            named = {
                item.label for item in self.evidence if item.kind == "restoration" and item.alarm
            }
            by = "silencing" if self.target in named else "exposure"
        if by == "exposure":
            return _confidence(self.exposed.model, images, labels)
        if self.restored is None:
            raise ScoringError('no label has a trigger that works; use by="exposure"')
        silent = frozen_copy(self.model)
        silence_(silent, self.restored.selection, silencing=self.silencing)
        fall = _confidence(self.model, images, labels) - _confidence(silent, images, labels)
        return fall.clamp_min(0)

    @property
    def reachable_by_most_labels(self) -> bool:
        """Whether universal perturbations alone raise the alarm, and work for most labels.

        The benign RegNets that were looked at are so, and some backdoored networks: there this
        alarm says little (docs/results/diagnosis.md).
        """
        alarms = {item.kind: item for item in self.evidence if item.alarm}
        if alarms.keys() != {"universal"}:
            return False
        return statistics.median(alarms["universal"].by_label.values()) >= _WORKS

    @property
    def cautions(self) -> tuple[str, ...]:
        """What weakens the evidence, in sentences without a full stop."""
        return (
            *([REACHABLE] if self.reachable_by_most_labels else []),
            *(
                f"restoration does not silence {what}, which are not scored; a backdoor there is "
                "left to the other kinds of evidence"
                for what in self.unscored
                if any(item.kind == "restoration" for item in self.evidence)
            ),
        )

    def summary(self) -> str:
        """A few lines for people: what was tested, what came out, what it does not say."""
        lines = [
            f"diagnosis  {self.verdict}",
            f"tested on  {self.images} clean images, {len(self.triggers)} of {self.classes} "
            f"labels, seed {self.seed}",
        ]
        for item in self.evidence:
            line = f"{item.kind:<14}{item.value:.3g}"
            if item.label is not None:
                line += f", label {item.label}"
            if item.null:
                low, high = min(item.null.values()), max(item.null.values())
                line += f"; {len(item.null)} benign networks gave {low:.3g} to {high:.3g}"
            line += f"; {'high' if KINDS[item.kind][0] == 'high' else 'low'} is suspicious"
            if item.threshold is not None:
                line += f", alarm from {item.threshold:.3g}"
            lines.append(line)
        if self.example[0].numel() > LARGEST:
            lines.append(
                "size       images this large are easily sent anywhere by a small picture, and the "
                "benign networks are of smaller ones: universal and relative size raise no alarm "
                "here"
            )
        lines += [f"caution    {caution}" for caution in self.cautions]
        lines.append(
            "limits     other triggers than these searches can find leave no evidence here, and "
            "the benign networks are few and small"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, without the networks."""
        return {
            "alarm": self.alarm,
            "reachable_by_most_labels": self.reachable_by_most_labels,
            "cautions": list(self.cautions),
            "target": self.target,
            "classes": self.classes,
            "images": self.images,
            "seed": self.seed,
            "evidence": [
                {**asdict(item), "percentile": item.percentile, "alarm": item.alarm}
                for item in self.evidence
            ],
            "triggers": [
                {"target": t.target, "norm": t.norm, "success": t.success, "tested": t.tested}
                for t in self.triggers
            ],
            "perturbations": [
                {"target": p.target, "rms": p.rms, "success": p.success, "tested": p.tested}
                for p in self.perturbations
            ],
            "restoration": None if self.restored is None else list(self.restored.curve),
            "seconds": dict(self.seconds),
        }


def _confidence(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Probability (N,) that the model gives to these labels, on the CPU."""
    probabilities = predict_logits(model, images).float().softmax(1)
    return probabilities.gather(1, labels[:, None])[:, 0]
