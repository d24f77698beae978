"""`scan`: is there evidence of a backdoor in a network, from clean images alone, unlabelled."""

from __future__ import annotations

import math
import statistics
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
from ..triggers.perturbation import RecoveredPerturbation
from ..utils.fingerprint import fingerprint, now
from ..utils.progress import Clock, progress_bar
from ..utils.randomness import checked_seed, private_randomness
from .diagnosis import Diagnosis
from .limits import why_not_told
from .probability import Suspicion
from .restoration import Restoration, Restored
from .settings import ScanSettings


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
            wanted = list(range(classes)) if labels is None else check_labels(labels, classes)
            clock = self._clock(prepared, len(wanted), seed, progress)
            how: dict[str, Any] = {"pixels": pixels, "seed": seed, "progress": progress}
            ordered = wanted
            if len(wanted) > self.screened:
                with clock.stage("screening"):
                    ordered = self._screened(frozen, data, wanted, **how)
            with clock.stage("universal"):
                found, success = self._universal(frozen, data, ordered[: self.screened], **how)
            ranked = sorted(success, key=lambda label: -success[label])
            candidates, others = ranked[: self.candidates], ranked[self.candidates :]
            others += ordered[self.screened :]
            others += [label for label in range(classes) if label not in wanted]
            with clock.stage("triggers"):
                chosen = sorted({*candidates, *_spread(others, self.compared)})
                triggers = self.search.recover(frozen, data, chosen, **how)
            with clock.stage("restoration"):
                restored = self._restored(
                    prepared,
                    triggers,
                    candidates,
                    silencing=silencing,
                    seed=seed,
                    progress=progress,
                )
        suspicions = self._suspicions(candidates, success, triggers, restored)
        return Diagnosis(
            suspicions=suspicions,
            cannot_tell=why_not_told(frozen, data, classes),
            classes=classes,
            images=len(data),
            seed=seed,
            triggers=triggers,
            perturbations=found,
            restored=restored.get(suspicions[0].label),
            model=frozen,
            example=data.images[0].float().cpu().clone(),  # not the storage of all images
            pixels=pixels or PixelRange.seen_in(data.images),
            silencing=silencing,
            seconds=clock.laps,
            unscored=unseen,
            settings=self,
            sha256={
                "weights": fingerprint(frozen.state_dict()),
                "images": fingerprint({"images": data.images}),
            },
            date=now(),
        )

    def _clock(self, prepared: Prepared, labels: int, seed: int, progress: bool) -> Clock:
        """The clock of a scan, which has said what will be done and how long it should take."""
        model, images, sites = prepared.model, prepared.clean.images, prepared.sites
        what = f"scanning: {len(images):,} images, {labels:,} of {prepared.classes:,} labels"
        work = self.passes(Task.of(model, images, prepared.classes), labels)
        seconds = announce(what, work, model, images, sites, seed=seed, progress=progress)
        return Clock(seconds, progress)

    def sizes(self, triggers: Iterable[RecoveredTrigger]) -> dict[int, float]:
        """Label -> size of its trigger as a share of the image; 1 where it does not work."""
        return {
            t.target: t.norm / t.mask.numel() if t.success >= self.min_success else 1.0
            for t in triggers
        }

    def _suspicions(
        self,
        candidates: Sequence[int],
        success: Mapping[int, float],
        triggers: Sequence[RecoveredTrigger],
        restored: Mapping[int, Restored | None],
    ) -> tuple[Suspicion, ...]:
        """The evidence for each candidate, the most probable first."""
        sizes = self.sizes(triggers)
        compared = [size for label, size in sizes.items() if label not in candidates]
        found = [
            Suspicion.of(
                label,
                universal=success[label],
                size=_relative(sizes[label], compared),
                restored=_share(restored.get(label)),
            )
            for label in candidates
        ]
        return tuple(sorted(found, key=lambda item: -item.probability))

    def _universal(
        self,
        model: nn.Module,
        data: CleanData,
        labels: Sequence[int],
        *,
        seed: int,
        **how: Any,
    ) -> tuple[tuple[RecoveredPerturbation, ...], dict[int, float]]:
        """The best perturbation of each label, and label -> success.

        One search says little: its success is of a few dozen images, and on a benign network it
        can be .73 from one beginning and .94 from another. So the labels that lead are searched
        again, and the mean counts.
        """
        first = self.universal.recover(model, data, sorted(labels), seed=seed, **how)
        tried = {perturbation.target: [perturbation] for perturbation in first}
        leading = sorted(tried, key=lambda label: -tried[label][0].success)[: self.candidates]
        for start in range(1, self.starts):
            more = self.universal.recover(model, data, sorted(leading), seed=seed + start, **how)
            for perturbation in more:
                tried[perturbation.target].append(perturbation)
        success = {label: statistics.mean(p.success for p in some) for label, some in tried.items()}
        return tuple(max(some, key=lambda p: p.success) for some in tried.values()), success

    def _screened(
        self, model: nn.Module, data: CleanData, labels: list[int], *, seed: int, **how: Any
    ) -> list[int]:
        """The labels, the easiest in a quick search on few images first.

        A label that all images drawn have already, of which nothing can be said, comes first too.
        """
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        drawn = data.take(order[: self.screen_images])
        quick = self.screen.recover(model, drawn, labels, seed=seed, **how)
        success = {found.target: found.success if found.tested else 1.0 for found in quick}
        return sorted(labels, key=lambda label: -success[label])

    def _restored(
        self,
        prepared: Prepared,
        triggers: Sequence[RecoveredTrigger],
        labels: Sequence[int],
        *,
        silencing: Silencing,
        seed: int,
        progress: bool,
    ) -> dict[int, Restored | None]:
        """Restoration for those of these labels whose trigger works."""
        working = [t for t in triggers if t.target in labels and t.success >= self.min_success]
        if not working:
            return {}
        restore = Restoration(
            prepared.model, prepared.clean, prepared.sites, silencing=silencing, seed=seed
        )
        tried = {}
        with progress_bar(len(working), "restoring labels", progress) as bar:
            for trigger in working:
                tried[trigger.target] = restore(trigger.target, trigger)
                bar.update()
        return tried

    def remaining(
        self,
        model: nn.Module,
        clean: CleanData,
        label: int,
        *,
        compared: Mapping[int, float],
        silencing: Silencing = "zero",
        seed: int = 0,
        progress: bool = False,
    ) -> Suspicion:
        """The evidence for one label, sought anew.

        Meant for a network in which neurons have been silenced: is the backdoor still there?

        Args:
            compared: other labels and the sizes of their triggers in the network as it was, as
                `Scan.sizes` gives them.
        """
        seed = checked_seed(seed)
        with private_randomness(seed), torch.enable_grad():
            prepared = Prepared.of(model, clean, labels="ignored").moved()
            frozen, data = prepared.model, prepared.clean
            triggers = self.search.recover(frozen, data, [label], seed=seed, progress=progress)
            restored = self._restored(
                prepared, triggers, [label], silencing=silencing, seed=seed, progress=progress
            )
            how: dict[str, Any] = {"pixels": None, "seed": seed, "progress": progress}
            success = self._universal(frozen, data, [label], **how)[1]
        return Suspicion.of(
            label,
            universal=success[label],
            size=_relative(self.sizes(triggers)[label], list(compared.values())),
            restored=_share(restored.get(label)),
        )


def _share(restored: Restored | None) -> float:
    return 0.0 if restored is None else restored.share


def _relative(size: float, compared: Sequence[float]) -> float:
    """A size as a share of the median (of the logarithms) of others; 1 where there are none."""
    if not compared:
        return 1.0
    middle = statistics.median(math.log(max(other, 1e-6)) for other in compared)
    return max(size, 1e-6) / math.exp(middle)


def _spread(labels: Sequence[int], count: int) -> list[int]:
    """At most so many of these, from the first to the last."""
    if len(labels) <= count:
        return list(labels)
    return [labels[round(i * (len(labels) - 1) / max(1, count - 1))] for i in range(count)]


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
        labels: candidate target labels; by default every label. Others serve to compare with.
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
