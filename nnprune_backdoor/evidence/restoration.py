"""Restoration: silence what a trigger works through, and see whether images get their labels back.

Ours. A backdoor is a function of its own beside the clean task: without the few neurons that the
trigger needs, stamped images are again called what they are. A benign network has triggers too
(any network can be sent anywhere by some patch), but those work through the neurons that tell its
classes apart: without these the trigger fails as well, and the images become something else. So
the share of stamped images that get their own label back, while the clean ones keep theirs, tells
the two apart, where the trigger's size and its failing do not (docs/results/diagnosis.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.data import CleanData
from ..core.held_out import HeldOut
from ..core.masks import MaskedModel, Silencing
from ..core.passes import Task, Work
from ..core.predictions import images_per_pass, predict_labels
from ..core.scores import ChannelScores, Selection, lowest
from ..core.sites import Site
from ..core.splits import equal_images, with_equal_images
from ..criteria.parts.response import Response, response_scores
from ..errors import DataError
from ..utils.short_repr import ShortRepr

_HELD_OUT = 0.4  # share of the images that only measure
SHARES = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05)  # of all neurons, silenced in turn


@dataclass(frozen=True, eq=False, repr=False)
class Restored(ShortRepr):
    """What silencing did to a trigger for `label`, at the amount that restored most.

    Attributes:
        label: The trigger's label.
        share: Of the held-out images that the trigger sends to the label, the share that got their
            own label back.
        tested: Number of images behind that share.
        selection: The neurons that were silent.
        curve: For each amount: neurons, restored, success, kept.
    """

    label: int
    share: float
    tested: int
    selection: Selection
    curve: tuple[dict[str, Any], ...]


class Restoration:
    """Measures it for one network and one set of clean images, whatever the trigger.

    Args:
        model: in eval mode, frozen; it is not changed.
        clean: images; the labels they should get back are the model's own.
        ranking: as of `TAC`, whose ranking of neurons this uses, in one stage.
        min_kept: share of the held-out clean images that must keep their label; amounts at which
            fewer do are on the curve and do not count.
    """

    def __init__(
        self,
        model: nn.Module,
        clean: CleanData,
        sites: tuple[Site, ...],
        *,
        silencing: Silencing = "zero",
        ranking: Response = Response(),
        min_kept: float = 0.9,
        seed: int = 0,
    ) -> None:
        named = CleanData(clean.images, predict_labels(model, clean.images))
        # cut without regard to classes: some may have a single image
        first = equal_images(named.images)  # none is held out of which an equal one is fitted to
        different = first.unique()
        generator = torch.Generator().manual_seed(seed)
        order = different[torch.randperm(len(different), generator=generator)]
        cut = round((1 - _HELD_OUT) * len(order))
        if not 0 < cut < len(order):
            raise DataError(
                f"{len(order)} different clean images are too few to hold {_HELD_OUT:.0%} out"
            )
        self._fit, held = (
            named.take(with_equal_images(part, first)) for part in (order[:cut], order[cut:])
        )
        self._held_out = HeldOut(model, sites, held, silencing=silencing)
        self._sites, self._ranking, self._seed = sites, ranking, seed
        self._min_kept = min_kept
        self._stiffness = ranking.stiffness(model, self._fit, sites, self._generator())

    @staticmethod
    def passes(task: Task, labels: int, ranking: Response = Response()) -> Work:
        """What it sends through the network for so many labels, preparation included."""
        held = _HELD_OUT * task.images
        fit = task.part(task.images - held)
        ranked = min(ranking.batch_size, max(16, task.at_once))
        return (
            task.forward(task.images),
            fit.epochs("masks", ranking.probe_size, 1),
            fit.epochs("masks", ranked, labels),
            task.forward(labels * held * (1 + 2 * len(SHARES))),
        )

    def __call__(self, label: int, trigger: Callable[[Tensor], Tensor]) -> Restored | None:
        """What it does to this trigger; None where it sends no held-out image to the label."""
        held = self._held_out.clean
        scores = self._rank(label, trigger)
        if scores is None:
            return None
        nothing = lowest(scores, 0)
        stamped = trigger(held.images.clone())  # which it may write into
        sent = (held.targets != label) & (self._held_out.predict(nothing, stamped) == label)
        if not sent.any():
            return None
        stamped, labels = stamped[sent], held.targets[sent]
        best, curve = (0.0, nothing), list[dict[str, Any]]()
        for amount in sorted({max(1, round(share * len(scores.flat))) for share in SHARES}):
            chosen = lowest(scores, amount)
            now = self._held_out.predict(chosen, stamped)
            restored = (now == labels).float().mean().item()
            kept = self._held_out.correct(chosen).float().mean().item()
            success = (now == label).float().mean().item()
            curve.append(
                {"neurons": amount, "restored": restored, "success": success, "kept": kept}
            )
            if kept >= self._min_kept:
                best = max(best, (restored, chosen), key=lambda pair: pair[0])
        return Restored(label, best[0], int(sent.sum()), best[1], tuple(curve))

    def _rank(self, label: int, trigger: Callable[[Tensor], Tensor]) -> ChannelScores | None:
        """Which neurons must be silent for stamped images to get their labels back."""
        others = self._fit.take((self._fit.targets != label).nonzero().flatten())
        if not len(others.targets):
            return None
        masked = MaskedModel(self._held_out.model, self._sites)
        stamped = CleanData(trigger(others.images.clone()), others.labels)
        largest = max(16, images_per_pass(stamped.images, masked.model))
        ranking = replace(self._ranking, batch_size=min(self._ranking.batch_size, largest))
        pull = ranking.mean(masked, stamped, self._generator())
        flat = response_scores(pull, self._stiffness, ranking.damping)
        return ChannelScores(self._sites, flat, "restoration")

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed)
