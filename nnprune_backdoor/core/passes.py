"""What a piece of work sends through a network, and how long that takes on this machine.

Each step of a purification or a scan counts its passes from its settings. Those that make up most
of the work are timed on a copy of the network at hand, a few each; nothing is assumed of it.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils import progress
from ..utils.tensors import at_least_float32, placement
from .compute import Compute
from .copies import clone
from .masks import MaskedModel
from .predictions import images_per_pass
from .sites import Site

Kind = Literal["forward", "images", "masks", "weights"]

_WORK: dict[Kind, int] = {"forward": 1, "images": 2, "masks": 2, "weights": 3}  # a rough guess
_TIMED = 0.97  # share of the work, by that guess, that is timed; the rest is in proportion
_SPENT = 0.05  # share of the work that is done beforehand to time it, beside one pass of each kind
_ENOUGH = 0.3  # seconds after which a kind of pass has been timed for long enough
_MOST = 8  # passes of a kind that are timed
_LEAST = 4  # that are timed even so, since other work may hold one of them up
_LONG = 5.0  # seconds after which those are enough, too


@dataclass(frozen=True)
class Passes:
    """Passes of one kind.

    Attributes:
        kind: "forward", for the logits alone, or also backward to the images, the masks, or the
            weights, which are then changed.
        batch: Images a pass.
        images: Images of all these passes together; what is to be expected where data decide.
        most: Of training that ends by itself: images if it does not; None for all other.
    """

    kind: Kind
    batch: int
    images: float
    most: float | None = None


Work = tuple[Passes, ...]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What passes are counted by.

    Attributes:
        images: Number of images that the step is given.
        classes: Of the network.
        at_once: Images of one forward pass at most (`images_per_pass`).
        neurons: Number of neurons that are scored.
        scored: Number of images that the criterion has had, for a selector.
        target_known: A selector is told the label of the attack.
    """

    images: int
    classes: int
    at_once: int
    neurons: int = 0
    scored: int = 0
    target_known: bool = False

    @classmethod
    def of(cls, model: nn.Module, images: Tensor, classes: int, neurons: int = 0) -> Task:
        """Of all images (N, C, H, W)."""
        at_once = images_per_pass(images, model)
        return cls(images=len(images), classes=classes, at_once=at_once, neurons=neurons)

    def part(self, images: float) -> Task:
        """The same with so many images."""
        return replace(self, images=round(images))

    def told(self, scored: int, target_known: bool) -> Task:
        """The same with what a selector is told."""
        return replace(self, scored=scored, target_known=target_known)

    def forward(self, images: float) -> Passes:
        """So many images forward, as they are predicted (`predict_logits`)."""
        return Passes("forward", max(1, min(max(16, self.at_once), round(images))), images)

    def epochs(self, kind: Kind, batch: int, count: float) -> Passes:
        """So many passes over the images, in batches of this size."""
        return Passes(kind, max(1, min(batch, self.images)), self.images * count)


@dataclass(frozen=True)
class Expected:
    """How long work should take.

    Attributes:
        seconds: Stage -> seconds, in order; None of one whose work is not known.
        longest: Seconds of all stages if training that ends by itself does not.
    """

    seconds: dict[str, float | None] = field(default_factory=dict)
    longest: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of all stages of which this is known."""
        return sum(seconds for seconds in self.seconds.values() if seconds is not None)


def expected(
    stages: Mapping[str, Work | None],
    model: nn.Module,
    images: Tensor,
    sites: tuple[Site, ...],
    *,
    compute: Compute = Compute(),
) -> Expected:
    """How long these stages should take here.

    Args:
        stages: name -> its passes.
        model: in eval mode, frozen; a copy is run.
        images: some (N, C, H, W), to make batches of.
        sites: whose masks are differentiated.
        compute: how passes to the masks are run.
    """
    counted = [passes for work in stages.values() for passes in work or ()]
    watch = _Stopwatch(model, images, sites, compute)
    for (kind, batch), images_of_it in _most_of(counted).items():
        watch.time(kind, batch, 1 + round(_SPENT * images_of_it / batch))
    return Expected(
        {
            name: None if work is None else sum(map(watch.seconds, work))
            for name, work in stages.items()
        },
        sum(watch.seconds(replace(each, images=each.most or each.images)) for each in counted),
    )


def _most_of(counted: Iterable[Passes]) -> dict[tuple[Kind, int], float]:
    """The kinds and sizes of passes that make up most of the work -> their images."""
    shares: defaultdict[tuple[Kind, int], float] = defaultdict(float)
    for passes in counted:
        shares[passes.kind, passes.batch] += passes.images * _WORK[passes.kind]
    most, covered = dict[tuple[Kind, int], float](), 0.0
    for key in sorted(shares, key=lambda key: -shares[key]):
        if covered < _TIMED * sum(shares.values()):
            most[key] = shares[key] / _WORK[key[0]]
            covered += shares[key]
    return most


class _Stopwatch:
    """Times passes of a kind and a size, each with batches of the same images."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        sites: tuple[Site, ...],
        compute: Compute,
    ) -> None:
        self._model = clone(model)
        self._images, self._compute = images, compute
        self._masked = MaskedModel(self._model, sites)
        self._weights = [p for p in self._model.parameters() if p.is_floating_point()]
        # a rate of zero: the work of a step, and weights as they were
        self._optimiser = torch.optim.AdamW(self._weights, lr=0.0, weight_decay=0.0)
        self._took: dict[tuple[Kind, int], float] = {}

    def time(self, kind: Kind, batch: int, most: int) -> None:
        """Time passes of this kind, so many images each, and at most so many passes."""
        place = placement(self._model)
        images = self._images[torch.arange(batch) % len(self._images)].to(**place)
        took: list[float] = []
        while len(took) < min(most, _MOST) and (
            sum(took) < _ENOUGH or (len(took) < _LEAST and sum(took) < _LONG)
        ):
            start = progress.timer()
            self._run(kind, images).flatten()[:1].tolist()  # waits for an accelerator
            took.append(progress.timer() - start)
        # the first is slower, since memory and kernels are set up in it
        self._took[kind, batch] = statistics.median(took[1:] or took)

    def seconds(self, passes: Passes) -> float:
        """What these passes should take, by those that were timed."""
        size = (passes.kind, passes.batch)
        if size in self._took:
            return self._took[size] * passes.images / passes.batch
        alike = [key for key in self._took if key[0] == passes.kind] or [*self._took]
        kind, batch = min(alike, key=lambda key: abs(key[1] - passes.batch))
        of_an_image = self._took[kind, batch] / batch / _WORK[kind] * _WORK[passes.kind]
        return of_an_image * passes.images

    def _run(self, kind: Kind, images: Tensor) -> Tensor:
        if kind == "forward":
            with torch.no_grad():
                return self._model(images)  # type: ignore[no-any-return]
        if kind == "images":
            images = images.clone().requires_grad_(True)
            return torch.autograd.grad(_loss(self._model(images)), images)[0]
        if kind == "masks":
            with self._compute.applied(images.device):
                return torch.autograd.grad(_loss(self._masked(images)), self._masked.masks)[0]
        return self._step(images)

    def _step(self, images: Tensor) -> Tensor:
        """One step of training all weights."""
        for weight in self._weights:
            weight.requires_grad_(True)
        self._optimiser.zero_grad(set_to_none=True)
        _loss(self._model(images)).backward()
        norm = nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimiser.step()
        for weight in self._weights:
            weight.requires_grad_(False)
        return norm


def _loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(at_least_float32(logits), logits.argmax(1))
