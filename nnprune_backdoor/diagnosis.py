"""Is there evidence of a backdoor, and for which label? Clean images alone, labels not needed.

Each kind of evidence is a number that backdoored networks tend to have higher (or lower) than
benign ones, and is held against what benign networks gave (`null.json`, made by
benchmarks/diagnosis.py). Kinds that did not separate the two are reported, and raise no alarm;
docs/diagnosis.md has the numbers. No alarm means no evidence of these kinds, and nothing else.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .criteria.noise import adversarial_noise
from .data import CleanData, like
from .errors import ScoringError
from .exposure import Exposed, Unlearning, expose
from .guard import private_copy, private_randomness
from .inversion import Inversion, PixelRange, RecoveredTrigger, TargetEvidence, predict_labels
from .masking import MaskedModel, Silencing, silence_
from .restoration import Restoration, Restored
from .scores import Site
from .sites import find_sites
from .universal import UniversalPerturbation

# kind -> whether high or low values are suspicious, and what it is
KINDS: dict[str, tuple[Literal["high", "low"], str]] = {
    "restoration": (
        "high",
        "share of stamped images that get their own label back once few neurons are silent",
    ),
    "trigger size": ("low", "smallest recovered trigger that works, as a share of the image"),
    "anomaly": ("high", "how far the smallest trigger lies below the others (Neural Cleanse)"),
    "universal": ("high", "success of the best small picture that is added to any image"),
    "exposure": ("high", "most frequent label once the clean task is unlearned, as a share"),
    "noise": ("high", "most frequent label under adversarial noise on neurons, as a share"),
}


@dataclass(frozen=True)
class Evidence:
    """One kind of evidence, and where it lies among benign networks."""

    kind: str
    value: float
    label: int | None  # that the evidence points to
    by_label: dict[int, float]  # for the labels that were looked at
    null: dict[str, float]  # benign network -> what it gave
    threshold: float | None  # at which it raises the alarm; None: it never does

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


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What `scan` gives back."""

    evidence: tuple[Evidence, ...]
    classes: int
    images: int
    seed: int
    triggers: tuple[RecoveredTrigger, ...]  # one a label that was looked at
    restored: Restored | None  # of the label where most was restored
    exposed: Exposed
    model: nn.Module  # a private copy of the network that was scanned
    silencing: Silencing = "zero"
    seconds: dict[str, float] = field(default_factory=dict)

    def __getitem__(self, kind: str) -> Evidence:
        """The evidence of one kind; KeyError where there is none."""
        return {item.kind: item for item in self.evidence}[kind]

    @property
    def alarm(self) -> bool:
        """Whether any evidence is beyond what it may be."""
        return any(item.alarm for item in self.evidence)

    @property
    def target(self) -> int | None:
        """The suspected label; None where there is no alarm."""
        return next((item.label for item in self.evidence if item.alarm), None)

    @property
    def trigger(self) -> RecoveredTrigger | None:
        """The trigger recovered for the suspected label."""
        return next((t for t in self.triggers if t.target == self.target), None)

    def suspicious(
        self, images: Tensor, by: Literal["silencing", "exposure"] = "silencing"
    ) -> Tensor:
        """How suspicious each image (N, C, H, W) is: (N,) in [0, 1], high = suspicious.

        By silencing: by how much the probability of the label that the network gives falls once
        the neurons are silent that the most suspicious trigger needs. By exposure: the probability
        of that label in the exposed model, which knows little else any more. docs/diagnosis.md has
        how well each finds triggered images; without a backdoor the scores say nothing.

        Raises:
            DataError: not a batch of finite images.
            ScoringError: by silencing, where no label has a trigger that works.
        """
        images = CleanData(images).images
        labels = predict_labels(self.model, images)
        if by == "exposure":
            return _confidence(self.exposed.model, images, labels)
        if self.restored is None:
            raise ScoringError('no label has a trigger that works; use by="exposure"')
        silent = private_copy(self.model)
        silence_(silent, self.restored.selection, silencing=self.silencing)
        fall = _confidence(self.model, images, labels) - _confidence(silent, images, labels)
        return fall.clamp_min(0)

    def summary(self) -> str:
        """A few lines for people: what was tested, what came out, what it does not say."""
        found = [item for item in self.evidence if item.alarm]
        tested = ", ".join(item.kind for item in self.evidence if item.threshold is not None)
        if found:
            kinds = ", ".join(item.kind for item in found)
            first = f"evidence of a backdoor with target {self.target} ({kinds})"
        else:
            first = f"no evidence of the kinds tested ({tested})"
        lines = [
            f"diagnosis  {first}",
            f"tested on  {self.images} clean images, {len(self.triggers)} of {self.classes} "
            f"labels, seed {self.seed}",
        ]
        for item in self.evidence:
            line = f"{item.kind:<13}{item.value:.3g}"
            if item.label is not None:
                line += f", label {item.label}"
            if item.null:
                low, high = min(item.null.values()), max(item.null.values())
                line += f"; {len(item.null)} benign networks gave {low:.3g} to {high:.3g}"
            line += f"; {'high' if KINDS[item.kind][0] == 'high' else 'low'} is suspicious"
            if item.threshold is not None:
                line += f", alarm from {item.threshold:.3g}"
            lines.append(line)
        lines.append(
            "limits     other triggers than these searches can find leave no evidence here, and "
            "the benign networks are few and small"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, without the networks."""
        return {
            "alarm": self.alarm,
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
            "restoration": None if self.restored is None else list(self.restored.curve),
            "seconds": dict(self.seconds),
        }


@dataclass(frozen=True, kw_only=True)
class Scan:
    """How evidence is gathered. The null holds for the defaults and 300 images of 32 pixels."""

    search: Inversion = field(default=Inversion(steps=150, batch_size=16))  # a trigger a label
    universal: UniversalPerturbation = field(default=UniversalPerturbation())
    min_success: float = 0.75  # of a trigger on held-out images, below which it is not believed
    many: int = 20  # classes beyond which triggers are sought for few labels only ...
    candidates: int = 10  # ... those with the best universal perturbations
    unlearning: Unlearning | None = None  # how the model is exposed; None: as `expose` does
    noise_budget: float = 0.4  # largest relative change of a weight or bias
    noise_steps: int = 3

    def __call__(
        self,
        model: nn.Module,
        clean: CleanData | Iterable[Any],
        *,
        labels: Sequence[int] | None = None,
        pixels: PixelRange | None = None,
        silencing: Silencing = "zero",
        seed: int = 0,
        progress: bool = False,
    ) -> Diagnosis:
        """As `scan`."""
        with private_randomness(seed), torch.enable_grad():
            data = CleanData(CleanData.collect(clean).images)
            own = private_copy(model)
            classes = data.check_against(own)
            sites = find_sites(own, data.images[:2].to(**like(own)))
            found: dict[str, dict[int, float]] = {}
            clock = _Clock()
            given: dict[str, Any] = {"pixels": pixels, "seed": seed, "progress": progress}
            perturbations = self.universal.recover(own, data, labels, **given)
            found["universal"] = {p.target: p.success for p in perturbations}
            wanted = [p.target for p in perturbations]
            if labels is None and classes > self.many:
                wanted = sorted(wanted, key=lambda label: -found["universal"][label])
                wanted = sorted(wanted[: self.candidates])
            clock.lap("universal")
            triggers = self.search.recover(own, data, wanted, **given)
            clock.lap("triggers")
            if len(triggers) > 2 and any(t.success >= self.min_success for t in triggers):
                anomaly = TargetEvidence.of(triggers, self.min_success).anomaly
                found["anomaly"] = dict(zip(wanted, anomaly, strict=True))
            weighed, best = self._weigh(own, data, sites, triggers, silencing=silencing, seed=seed)
            found |= weighed
            clock.lap("restoration")
            exposed = expose(own, data, self.unlearning, seed=seed, progress=progress)
            found["exposure"] = dict(enumerate(exposed.predicted))
            clock.lap("exposure")
            found["noise"] = self._noise(own, data, sites, classes, seed)
            clock.lap("noise")
        evidence = tuple(_evidence(kind, found.get(kind, {})) for kind in KINDS)
        return Diagnosis(
            tuple(item for item in evidence if item is not None),
            classes,
            len(data),
            seed,
            triggers,
            best,
            exposed,
            own,
            silencing,
            clock.laps,
        )

    def _weigh(
        self,
        model: nn.Module,
        data: CleanData,
        sites: tuple[Site, ...],
        triggers: Sequence[RecoveredTrigger],
        *,
        silencing: Silencing,
        seed: int,
    ) -> tuple[dict[str, dict[int, float]], Restored | None]:
        """Trigger size and restoration of the triggers that work, and the best restoration."""
        working = [trigger for trigger in triggers if trigger.success >= self.min_success]
        working.sort(key=lambda trigger: trigger.norm)  # of two alike the smaller one counts
        sizes = {trigger.target: trigger.norm / trigger.mask.numel() for trigger in working}
        if not working:
            return {}, None
        restore = Restoration(model, data, sites, silencing=silencing, seed=seed)
        tried = [restore(trigger.target, trigger) for trigger in working]
        restored = [item for item in tried if item is not None]
        shares = {item.label: item.share for item in restored}
        best = max(restored, key=lambda item: item.share, default=None)
        return {"trigger size": sizes, "restoration": shares}, best

    def _noise(
        self, model: nn.Module, data: CleanData, sites: tuple[Site, ...], classes: int, seed: int
    ) -> dict[int, float]:
        """How often each label is predicted under adversarial noise on all neurons at once.

        Wu and Wang, NeurIPS 2021, saw that backdoored networks then say the target.
        """
        masked, where = MaskedModel(model, sites), like(model)
        generator = torch.Generator().manual_seed(seed)
        counts = torch.zeros(classes)
        for batch in data.batches(_BATCH, generator):
            images = batch.images.to(**where)
            own = predict_labels(model, images).to(where["device"])
            noise = adversarial_noise(
                masked,
                images,
                own,
                generator,
                budget=self.noise_budget,
                steps=self.noise_steps,
            )
            with torch.no_grad():
                logits = masked(images, **noise)
            counts += torch.bincount(logits.argmax(1).cpu(), minlength=classes)
        return dict(enumerate((counts / counts.sum()).tolist()))

    def remaining(
        self,
        model: nn.Module,
        clean: CleanData,
        label: int,
        *,
        silencing: Silencing = "zero",
        seed: int = 0,
    ) -> tuple[Evidence, ...]:
        """Restoration, trigger size and universal perturbation for one label, sought anew.

        Meant for a network in which neurons have been silenced: is the backdoor still there?
        The first two are missing where no trigger works.
        """
        own = private_copy(model)
        with private_randomness(seed), torch.enable_grad():
            data = CleanData(clean.images)
            sites = find_sites(own, data.images[:2].to(**like(own)))
            triggers = self.search.recover(own, data, [label], seed=seed)
            found = self._weigh(own, data, sites, triggers, silencing=silencing, seed=seed)[0]
            (perturbation,) = self.universal.recover(own, data, [label], seed=seed)
            found["universal"] = {label: perturbation.success}
        evidence = [_evidence(kind, by_label) for kind, by_label in found.items()]
        return tuple(item for item in evidence if item is not None)


def scan(
    model: nn.Module,
    clean_loader: CleanData | Iterable[Any],
    *,
    labels: Sequence[int] | None = None,
    pixels: PixelRange | None = None,
    silencing: Silencing = "zero",
    seed: int = 0,
    progress: bool = True,
) -> Diagnosis:
    """Look for evidence of a backdoor in an image classifier, with clean images alone.

    Args:
        model: (N, C, H, W) -> (N, classes); left exactly as it was.
        clean_loader: a few hundred clean images, normalised as the model expects. Labels are not
            looked at: the model's own predictions serve.
        labels: that may be a target; by default every one, and beyond 20 classes the ten whose
            universal perturbations succeed most.
        pixels: the valid range; by default that seen in the images.
        silencing: what it means that a neuron is silent (see `masking`).
        seed: same seed, same machine, same result.

    Raises:
        DataError, UnsupportedModelError, ScoringError: see there.
    """
    return Scan()(
        model,
        clean_loader,
        labels=labels,
        pixels=pixels,
        silencing=silencing,
        seed=seed,
        progress=progress,
    )


def _evidence(kind: str, by_label: dict[int, float]) -> Evidence | None:
    """The most suspicious label's, beside what benign networks gave; None without a label."""
    if not by_label:
        return None
    worst = max if KINDS[kind][0] == "high" else min
    label = worst(by_label, key=by_label.__getitem__)
    stored = null()
    benign = {name: values[kind] for name, values in stored["benign"].items() if kind in values}
    return Evidence(kind, by_label[label], label, by_label, benign, stored["alarm"].get(kind))


@cache
def null() -> dict[str, Any]:
    """What benign networks gave, name -> kind -> value, and the values that raise the alarm."""
    stored: dict[str, Any] = json.loads(
        files("nnprune_backdoor").joinpath("null.json").read_text(encoding="utf-8")
    )
    return stored


@torch.no_grad()
def _confidence(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Probability (N,) that the model gives to these labels, on the CPU."""
    where = like(model)
    parts = []
    for some, wanted in zip(images.split(_BATCH), labels.split(_BATCH), strict=True):
        probabilities = model(some.to(**where)).float().softmax(1).cpu()
        parts.append(probabilities.gather(1, wanted[:, None])[:, 0])
    return torch.cat(parts)


class _Clock:
    """Wall seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage] = now - self._last
        self._last = now


_BATCH = 128  # images a pass
