"""Is there evidence of a backdoor, and for which label? Clean images alone, labels not needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.data import CleanData
from ..core.masks import Silencing
from ..core.passes import Task
from ..core.plan import announce
from ..core.predictions import check_labels
from ..core.prepared import Prepared
from ..core.recovered import PixelRange, RecoveredTrigger
from ..core.unscored import unscored
from ..triggers.inversion import TargetEvidence, relative_sizes
from ..triggers.perturbation import RecoveredPerturbation
from ..utils.progress import Clock, progress_bar
from ..utils.randomness import checked_seed, private_randomness
from .diagnosis import Diagnosis
from .exposure import expose
from .null import KINDS, Evidence, evidence_of
from .restoration import Restoration, Restored
from .settings import ScanSettings

_LABELS = 10  # of the benign networks of the reference distribution

ByLabel = dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Scan(ScanSettings):
    """A scan with these settings; `scan` is one with the defaults."""

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
        seed = checked_seed(seed)
        with private_randomness(seed), torch.enable_grad():
            prepared = Prepared.of(model, clean, labels="ignored").moved()
            prepared.check_runs()
            frozen, data, classes = prepared.model, prepared.clean, prepared.classes
            unseen = unscored(frozen, prepared.probe, prepared.sites)
            if labels is not None:
                labels = check_labels(labels, classes)
            clock = self._clock(prepared, labels, seed, progress)
            found: dict[str, ByLabel] = {}
            how: dict[str, Any] = {"pixels": pixels, "seed": seed, "progress": progress}
            with clock.stage("exposure"):  # first, since it is quick and refuses where it diverges
                exposed = expose(frozen, data, self.unlearning, seed=seed, progress=progress)
                found["exposure"] = dict(enumerate(exposed.predicted))
            likely = labels
            if labels is None and classes > self.screened:
                with clock.stage("screening"):
                    likely = self._screened(frozen, data, **how)
            with clock.stage("universal"):
                perturbations, found["universal"] = self._universal(frozen, data, likely, **how)
            wanted = [perturbation.target for perturbation in perturbations]
            if labels is None and classes > self.many:
                wanted = sorted(wanted, key=lambda label: -found["universal"][label])
                wanted = sorted(wanted[: self.candidates])
            with clock.stage("triggers"):
                triggers = self.search.recover(frozen, data, wanted, **how)
            with clock.stage("restoration"):
                found |= self._sizes(triggers)
                weighed, best = self._weigh(prepared, triggers, silencing, seed, progress)
                found |= weighed
        return Diagnosis(
            self._judged(found, triggers, data, classes),
            classes,
            len(data),
            seed,
            triggers,
            perturbations,
            best,
            exposed,
            frozen,
            data.images[0].float().cpu().clone(),  # not the storage of all images
            pixels or PixelRange.seen_in(data.images),
            silencing,
            clock.laps,
            unseen,
        )

    def _clock(
        self, prepared: Prepared, labels: Sequence[int] | None, seed: int, progress: bool
    ) -> Clock:
        """The clock of a scan, which has said what will be done and how long it should take."""
        model, images, sites = prepared.model, prepared.clean.images, prepared.sites
        asked = len(labels) if labels is not None else prepared.classes
        what = f"scanning: {len(images):,} images, {asked:,} of {prepared.classes:,} labels"
        task = Task.of(model, images, prepared.classes)
        work = self.passes(task, None if labels is None else len(labels))
        seconds = announce(what, work, model, images, sites, seed=seed, progress=progress)
        return Clock(seconds, progress)

    def _works(self, trigger: RecoveredTrigger) -> bool:
        return trigger.success >= self.min_success

    def _sizes(self, triggers: Sequence[RecoveredTrigger]) -> dict[str, ByLabel]:
        """Relative size and anomaly of the triggers, if there are three and one works."""
        if len(triggers) <= 2 or not any(map(self._works, triggers)):
            return {}
        labels = [trigger.target for trigger in triggers]
        weighed = TargetEvidence.of(triggers, self.min_success)
        relative = relative_sizes(torch.tensor(weighed.sizes)).tolist()
        return {
            "relative size": dict(zip(labels, relative, strict=True)),
            "anomaly": dict(zip(labels, weighed.anomaly, strict=True)),
        }

    def _judged(
        self,
        found: dict[str, ByLabel],
        triggers: Sequence[RecoveredTrigger],
        data: CleanData,
        classes: int,
    ) -> tuple[Evidence, ...]:
        """Each kind of evidence beside the reference distribution."""
        working = sum(map(self._works, triggers))
        sizes_count = comparable(working, len(triggers), classes)
        evidence = (
            evidence_of(
                kind,
                found.get(kind, {}),
                data.images[0, 0].numel(),
                judged=kind != "relative size" or sizes_count,
            )
            for kind in KINDS
        )
        return tuple(item for item in evidence if item is not None)

    def _universal(
        self,
        model: nn.Module,
        data: CleanData,
        labels: Sequence[int] | None,
        *,
        seed: int,
        **how: Any,
    ) -> tuple[tuple[RecoveredPerturbation, ...], ByLabel]:
        """The best perturbation of each label, and label -> mean success over the starts.

        One start says little: its success is of a few dozen images, and on a benign network it
        can be .73 from one beginning and .94 from another.
        """
        first = self.universal.recover(model, data, labels, seed=seed, **how)
        tried = {perturbation.target: [perturbation] for perturbation in first}
        mean = {label: found[0].success for label, found in tried.items()}
        works = [label for label, success in mean.items() if success >= self.again_from]
        waiting = sorted(works, key=lambda label: -mean[label])
        best = 0.0  # of the means; a label whose first success is less will not lead
        while waiting and mean[waiting[0]] > best:
            again, waiting = waiting[: self.candidates], waiting[self.candidates :]
            for start in range(1, self.starts):
                more = self.universal.recover(model, data, sorted(again), seed=seed + start, **how)
                for perturbation in more:
                    tried[perturbation.target].append(perturbation)
            for label in again:
                mean[label] = sum(p.success for p in tried[label]) / len(tried[label])
                best = max(best, mean[label])
        return tuple(max(some, key=lambda p: p.success) for some in tried.values()), mean

    def _screened(self, model: nn.Module, data: CleanData, *, seed: int, **how: Any) -> list[int]:
        """The labels that lead in a quick search on few images; ties are all kept.

        So is a label that all images drawn have already, of which nothing can be said.
        """
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        drawn = data.take(order[: self.screen_images])
        quick = self.screen.recover(model, drawn, seed=seed, **how)
        shares = sorted((found.success for found in quick), reverse=True)
        least = max(shares[self.screened - 1], 1e-9)  # labels that never succeed are many
        likely = [f.target for f in quick if f.success >= least or not f.tested]
        return likely or [f.target for f in quick][: self.screened]  # any is as good

    def _weigh(
        self,
        prepared: Prepared,
        triggers: Sequence[RecoveredTrigger],
        silencing: Silencing,
        seed: int,
        progress: bool,
    ) -> tuple[dict[str, ByLabel], Restored | None]:
        """Trigger size and restoration of the triggers that work, and the best restoration."""
        # of two alike the smaller one counts
        working = sorted(filter(self._works, triggers), key=lambda trigger: trigger.norm)
        sizes = {trigger.target: trigger.norm / trigger.mask.numel() for trigger in working}
        if not working:
            return {}, None
        tried = []
        with progress_bar(len(working), "restoring labels", progress) as bar:
            restore = Restoration(
                prepared.model, prepared.clean, prepared.sites, silencing=silencing, seed=seed
            )
            for trigger in working:
                tried.append(restore(trigger.target, trigger))
                bar.update()
        restored = [item for item in tried if item is not None]
        shares = {item.label: item.share for item in restored}
        best = max(restored, key=lambda item: item.share, default=None)
        return {"trigger size": sizes, "restoration": shares}, best

    def remaining(
        self,
        model: nn.Module,
        clean: CleanData,
        label: int,
        *,
        given: Sequence[Mapping[str, Any]] = (),
        silencing: Silencing = "zero",
        seed: int = 0,
        progress: bool = False,
    ) -> tuple[Evidence, ...]:
        """Restoration, trigger size and universal perturbation for one label, sought anew.

        Meant for a network in which neurons have been silenced: is the backdoor still there?
        The first two are missing where no trigger works.

        Args:
            given: the triggers of all labels in the network as it was, as in
                `Diagnosis.to_dict()`; the relative size is that of the label's new one among them.
        """
        seed = checked_seed(seed)
        with private_randomness(seed), torch.enable_grad():
            prepared = Prepared.of(model, clean, labels="ignored").moved()
            frozen, data = prepared.model, prepared.clean
            triggers = self.search.recover(frozen, data, [label], seed=seed, progress=progress)
            found, _ = self._weigh(prepared, triggers, silencing, seed, progress)
            how: dict[str, Any] = {"pixels": None, "seed": seed, "progress": progress}
            found["universal"] = self._universal(frozen, data, [label], **how)[1]
        relative, judged = self._relative_size_again(triggers[0], given, prepared.classes)
        found["relative size"] = relative
        area = data.images[0, 0].numel()
        evidence = [
            evidence_of(kind, by_label, area, judged=kind != "relative size" or judged)
            for kind, by_label in found.items()
        ]
        return tuple(item for item in evidence if item is not None)

    def _relative_size_again(
        self, trigger: RecoveredTrigger, given: Sequence[Mapping[str, Any]], classes: int
    ) -> tuple[ByLabel, bool]:
        """The relative size of a trigger in its label's place, and whether it is comparable."""
        whole, label = float(trigger.mask.numel()), trigger.target
        triggers = {t["target"]: t["norm"] for t in given if t["success"] >= self.min_success}
        sizes = {t["target"]: triggers.get(t["target"], whole) for t in given}
        if len(sizes) < 3 or label not in sizes:
            return {}, False
        sizes[label] = trigger.norm if self._works(trigger) else whole
        found = relative_sizes(torch.tensor(list(sizes.values())))[list(sizes).index(label)].item()
        return {label: found}, comparable(len(triggers), len(sizes), classes)


def comparable(working: int, labels: int, classes: int) -> bool:
    """Whether a relative size can be held against the reference: among all of ten labels or more.

    And more than half of them have a trigger that works: else the median is the whole image, and
    any one that works is small beside it.
    """
    return labels == classes >= _LABELS and 2 * working > labels


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
            used: the model's own predictions serve.
        labels: candidate target labels; by default every label. Beyond 20 classes triggers are
            sought for the ten labels whose universal perturbations succeed most, and beyond 40
            those only for the labels that lead in a quick search on forty images.
        pixels: the valid range; by default that seen in the images.
        silencing: what silencing a neuron means (see `core.masks`).
        seed: same seed, same machine, same number of threads, same result.
        progress: say what will be done and how long it should take, by a few passes that are timed
            first; then show progress bars on a terminal, elsewhere a line every 30 seconds.

    Raises:
        DataError: the images or labels do not fit the model.
        UnsupportedModelError: the model cannot be copied, run repeatably or differentiated.
        ScoringError: a search diverged.
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
