"""Is there evidence of a backdoor, and for which label? Clean images alone, labels not needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..core.copies import frozen_copy, refuse_recomputing
from ..core.data import CleanData
from ..core.masks import Silencing
from ..core.predictions import check_labels
from ..core.recovered import PixelRange, RecoveredTrigger
from ..core.sites import Site, find_sites
from ..criteria.parts.unlearning import Unlearning
from ..triggers.inversion import Inversion, TargetEvidence, relative_sizes
from ..triggers.perturbation import RecoveredPerturbation, UniversalPerturbation
from ..utils.progress import Clock, progress_bar
from ..utils.randomness import checked_seed, private_randomness
from ..utils.tensors import placement
from .diagnosis import Diagnosis
from .exposure import expose
from .null import KINDS, Evidence, evidence_of
from .restoration import Restoration, Restored

_LABELS = 10  # of the networks of the null


@dataclass(frozen=True, kw_only=True)
class Scan:
    """How evidence is gathered. The null holds for the defaults and 300 images of 32 pixels.

    On images of more than 64 x 64 pixels universal perturbations and relative sizes are reported
    and raise no alarm; relative sizes need a trigger of every label as well, and ten labels.
    """

    search: Inversion = field(default=Inversion(steps=150, batch_size=16))  # a trigger a label
    universal: UniversalPerturbation = field(default=UniversalPerturbation())
    starts: int = 3  # independent searches for them, whose mean success counts ...
    again_from: float = 0.5  # ... for labels where the first one succeeds so often
    min_success: float = 0.75  # of a trigger on held-out images, below which it is not believed
    many: int = 20  # classes beyond which triggers are sought for few labels only ...
    candidates: int = 10  # ... those with the best universal perturbations
    screened: int = 40  # labels, if there are more, for which these are sought at all: the best ...
    screen: UniversalPerturbation = field(  # ... by a quick search on few images
        default=UniversalPerturbation(steps=20, batch_size=4, held_out=0.5)
    )
    screen_images: int = 40
    unlearning: Unlearning | None = None  # how the model is exposed; None: as `expose` does

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
            data = CleanData(CleanData.collect(clean).images)
            own = frozen_copy(model)
            classes = data.check_against(own)
            data.check_repeatable(own)
            refuse_recomputing(own, data.images[:2].to(**placement(own)))
            sites = find_sites(own, data.images[:2].to(**placement(own)))
            data = data.near(own)
            if labels is not None:
                labels = check_labels(labels, classes)
            found: dict[str, dict[int, float]] = {}
            clock = Clock()
            given: dict[str, Any] = {"pixels": pixels, "seed": seed, "progress": progress}
            # first, since it is quick and refuses where it diverges
            exposed = expose(own, data, self.unlearning, seed=seed, progress=progress)
            found["exposure"] = dict(enumerate(exposed.predicted))
            clock.lap("exposure")
            likely = labels
            if labels is None and classes > self.screened:
                likely = self._screened(own, data, **given)
                clock.lap("screening")
            perturbations, found["universal"] = self._universal(own, data, likely, **given)
            wanted = [p.target for p in perturbations]
            if labels is None and classes > self.many:
                wanted = sorted(wanted, key=lambda label: -found["universal"][label])
                wanted = sorted(wanted[: self.candidates])
            clock.lap("universal")
            triggers = self.search.recover(own, data, wanted, **given)
            clock.lap("triggers")
            working = sum(trigger.success >= self.min_success for trigger in triggers)
            if len(triggers) > 2 and working:
                weighed = TargetEvidence.of(triggers, self.min_success)
                relative = relative_sizes(torch.tensor(weighed.sizes)).tolist()
                found["relative size"] = dict(zip(wanted, relative, strict=True))
                found["anomaly"] = dict(zip(wanted, weighed.anomaly, strict=True))
            kinds, best = self._weigh(
                own, data, sites, triggers, silencing=silencing, seed=seed, progress=progress
            )
            found |= kinds
            clock.lap("restoration")
        area = data.images[0, 0].numel()
        evidence = tuple(
            evidence_of(
                kind,
                found.get(kind, {}),
                area,
                judged=kind != "relative size" or comparable(working, len(triggers), classes),
            )
            for kind in KINDS
        )
        return Diagnosis(
            tuple(item for item in evidence if item is not None),
            classes,
            len(data),
            seed,
            triggers,
            perturbations,
            best,
            exposed,
            own,
            data.images[0].float().cpu().clone(),  # not the storage of all images
            pixels or PixelRange.seen_in(data.images),
            silencing,
            clock.laps,
        )

    def _universal(
        self,
        model: nn.Module,
        data: CleanData,
        labels: Sequence[int] | None,
        *,
        seed: int,
        **given: Any,
    ) -> tuple[tuple[RecoveredPerturbation, ...], dict[int, float]]:
        """The best perturbation of each label, and label -> mean success over the starts.

        One start says little: its success is of a few dozen images, and on a benign network it
        can be .73 from one beginning and .94 from another.
        """
        first = self.universal.recover(model, data, labels, seed=seed, **given)
        tried = {perturbation.target: [perturbation] for perturbation in first}
        mean = {label: found[0].success for label, found in tried.items()}
        works = [label for label, success in mean.items() if success >= self.again_from]
        waiting = sorted(works, key=lambda label: -mean[label])
        best = 0.0  # of the means; a label whose first success is less will not lead
        while waiting and mean[waiting[0]] > best:
            again, waiting = waiting[: self.candidates], waiting[self.candidates :]
            for start in range(1, self.starts):
                more = self.universal.recover(
                    model, data, sorted(again), seed=seed + start, **given
                )
                for perturbation in more:
                    tried[perturbation.target].append(perturbation)
            for label in again:
                mean[label] = sum(p.success for p in tried[label]) / len(tried[label])
                best = max(best, mean[label])
        return tuple(max(some, key=lambda p: p.success) for some in tried.values()), mean

    def _screened(self, model: nn.Module, data: CleanData, *, seed: int, **given: Any) -> list[int]:
        """The labels that lead in a quick search on few images; ties are all kept.

        So is a label that all images drawn have already, of which nothing can be said.
        """
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        few = data.take(order[: self.screen_images])
        quick = self.screen.recover(model, few, seed=seed, **given)
        shares = sorted((found.success for found in quick), reverse=True)
        least = max(shares[self.screened - 1], 1e-9)  # labels that never succeed are many
        likely = [f.target for f in quick if f.success >= least or not f.tested]
        return likely or [f.target for f in quick][: self.screened]  # any is as good

    def _weigh(
        self,
        model: nn.Module,
        data: CleanData,
        sites: tuple[Site, ...],
        triggers: Sequence[RecoveredTrigger],
        *,
        silencing: Silencing,
        seed: int,
        progress: bool,
    ) -> tuple[dict[str, dict[int, float]], Restored | None]:
        """Trigger size and restoration of the triggers that work, and the best restoration."""
        working = [trigger for trigger in triggers if trigger.success >= self.min_success]
        working.sort(key=lambda trigger: trigger.norm)  # of two alike the smaller one counts
        sizes = {trigger.target: trigger.norm / trigger.mask.numel() for trigger in working}
        if not working:
            return {}, None
        tried = []
        with progress_bar(len(working), "restoring labels", progress) as bar:
            restore = Restoration(model, data, sites, silencing=silencing, seed=seed)
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
        own = frozen_copy(model)
        seed = checked_seed(seed)
        with private_randomness(seed), torch.enable_grad():
            data = CleanData(clean.images).near(own)
            classes = data.check_against(own)
            sites = find_sites(own, data.images[:2].to(**placement(own)))
            triggers = self.search.recover(own, data, [label], seed=seed, progress=progress)
            found = self._weigh(
                own, data, sites, triggers, silencing=silencing, seed=seed, progress=progress
            )[0]
            settings: dict[str, Any] = {"pixels": None, "seed": seed, "progress": progress}
            found["universal"] = self._universal(own, data, [label], **settings)[1]
        area = data.images[0, 0].numel()
        found["relative size"], judged = self._relative_again(triggers[0], given, classes)
        evidence = [
            evidence_of(kind, by_label, area, judged=kind != "relative size" or judged)
            for kind, by_label in found.items()
        ]
        return tuple(item for item in evidence if item is not None)

    def _relative_again(
        self, trigger: RecoveredTrigger, given: Sequence[Mapping[str, Any]], classes: int
    ) -> tuple[dict[int, float], bool]:
        """The relative size of a trigger in its label's place, and whether it is comparable."""
        whole, label = float(trigger.mask.numel()), trigger.target
        triggers = {t["target"]: t["norm"] for t in given if t["success"] >= self.min_success}
        sizes = {t["target"]: triggers.get(t["target"], whole) for t in given}
        if len(sizes) < 3 or label not in sizes:
            return {}, False
        sizes[label] = trigger.norm if trigger.success >= self.min_success else whole
        found = relative_sizes(torch.tensor(list(sizes.values())))[list(sizes).index(label)].item()
        return {label: found}, comparable(len(triggers), len(sizes), classes)


def comparable(working: int, labels: int, classes: int) -> bool:
    """Whether a relative size can be held against the null: among all of ten labels or more.

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
            looked at: the model's own predictions serve.
        labels: that may be a target; by default every one. Beyond 20 classes triggers are sought
            for the ten whose universal perturbations succeed most, and beyond 40 those only for
            the labels that lead in a quick search on forty images.
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
