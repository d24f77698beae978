"""What every criterion promises, and the registry through which it is found by name."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self, TypeVar, final

import torch
from torch import nn

from ..core.compute import Compute
from ..core.data import CleanData
from ..core.masks import Silencing
from ..core.norms import keeps_statistics
from ..core.passes import Task, Work
from ..core.prepared import Labels, Prepared
from ..core.scores import ChannelScores
from ..core.sites import Site
from ..core.stand_in import stand_in_images
from ..errors import DataError, ScoringError, UnsupportedModelError
from ..utils.fingerprint import fingerprint
from ..utils.randomness import checked_seed, private_randomness
from ..utils.registry import Registry
from ..utils.settings import check_settings
from ..utils.tensors import placement

_C = TypeVar("_C", bound=type)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Criterion(ABC):
    """Scores every neuron of a model by how suspicious it is: low = prune first.

    Concrete criteria are frozen dataclasses: their fields are the hyper-parameters.
    """

    reference: ClassVar[str] = "not published"  # authors, title, venue
    needs_labels: ClassVar[bool] = True
    needs_images: ClassVar[bool] = True  # False: two show how the network runs, no more
    needs_gradients: ClassVar[bool] = True  # False: forward passes alone
    needs_batchnorm: ClassVar[bool] = False  # True: models without running statistics are refused
    cost: ClassVar[str] = "not known"  # of the default settings, roughly, for people

    @property
    def silencing(self) -> Silencing:
        """What silencing a neuron means to this criterion; `purify` takes it unless told otherwise.

        Of masks that are trained: what they meant while they were.
        """
        return "zero"

    @property
    def recovers_triggers(self) -> bool:
        """Whether the scores carry triggers that inversion found."""
        return False

    def __post_init__(self) -> None:
        check_settings(self)

    @classmethod
    def paper(cls) -> Self:
        """The published settings (the authors' code where the paper is silent).

        Of a criterion of one's own: its defaults, unless it says otherwise.
        """
        return cls()

    @abstractmethod
    def score(
        self,
        model: nn.Module,
        clean: CleanData,
        sites: tuple[Site, ...],
        generator: torch.Generator,
        progress: bool,
    ) -> ChannelScores:
        """The method itself. `model` is a private copy in eval mode, without gradients.

        On a GPU the images may lie there as well (`CleanData.near`); labels are on the CPU.
        """

    def passes(self, task: Task) -> Work | None:
        """What scoring sends through the network; None where that is not known beforehand."""
        return None if self.needs_images else ()

    @final
    def __call__(
        self,
        model: nn.Module,
        clean: CleanData | Iterable[Any] | None = None,
        *,
        sites: tuple[Site, ...] | None = None,
        seed: int = 0,
        progress: bool = False,
        compute: Compute = Compute(),
    ) -> ChannelScores:
        """Score the neurons of `model`, which is left as it was, also when something raises.

        Args:
            model: a classifier, (N, C, H, W) -> (N, classes).
            clean: a loader of clean images, normalised as the model expects (see `CleanData`). A
                criterion that needs no images takes one without a label, or None.
            sites: the neurons to score; by default all that `find_sites` finds.
            seed: same seed, same machine, same number of threads, same scores.
            compute: how passes are run: precision, memory layout, images at a time.

        Raises:
            DataError, UnsupportedModelError, ScoringError: see there.
        """
        seed = checked_seed(seed)
        with private_randomness(seed), torch.enable_grad():
            labels: Labels = "needed" if self.needs_labels else "used"
            if not self.needs_images:
                labels = "ignored"
            prepared = Prepared.of(model, self.images_for(model, clean), labels=labels)
            frozen = prepared.model
            sites = prepared.sites if sites is None else sites
            if self.needs_batchnorm:
                self._check_batchnorm(frozen, sites)
            if self.needs_images:
                prepared.check_runs(gradients=self.needs_gradients)
            compute.lay_out_(frozen, prepared.clean.images[:2])
            data = prepared.clean.moved_to(frozen)
            generator = torch.Generator().manual_seed(seed)
            with compute.applied(placement(frozen)["device"]):
                scores = self.score(frozen, data, sites, generator, progress)
        if scores.sites != sites:
            raise ScoringError(f"{type(self).__name__} did not score the sites it was given")
        made_from = self.made_from(model, prepared.clean, seed=seed, compute=compute)
        return dataclasses.replace(scores, made_from=made_from)

    @final
    def made_from(
        self, model: nn.Module, clean: CleanData, *, seed: int, compute: Compute = Compute()
    ) -> dict[str, str]:
        """What scores of this model would depend on, in words (`ChannelScores.made_from`)."""
        images = {"images": clean.images, "labels": clean.labels} if self.needs_images else {}
        return {
            "weights": fingerprint(model.state_dict()),
            "criterion": repr(self),
            "images": fingerprint(images),
            "seed": str(seed),
            "compute": repr(compute),
        }

    @final
    def images_for(self, model: nn.Module, clean: CleanData | Iterable[Any] | None) -> CleanData:
        """The images that are read from a loader; noise for a criterion that needs none of them.

        Raises:
            DataError: it needs images and there are none; see `CleanData.collect`.
        """
        if clean is not None:
            return CleanData.collect(clean)
        if self.needs_images:
            raise DataError(
                f"{type(self).__name__} needs clean images; give a loader of a few hundred"
            )
        return CleanData(stand_in_images(model))

    def _check_batchnorm(self, model: nn.Module, sites: tuple[Site, ...]) -> None:
        layers = [model.get_submodule(site.name) for site in sites]
        if not any(keeps_statistics(layer) for layer in layers):
            seen = ", ".join(sorted({type(layer).__name__ for layer in layers}))
            raise UnsupportedModelError(
                f"{type(self).__name__} needs the running statistics that BatchNorm keeps from "
                f"training, and no layer with neurons to score has any (these are: {seen}); "
                "choose a criterion that does without, for example 'tac'"
            )


_CRITERIA: Registry[Criterion] = Registry("criterion")


def register_criterion(name: str) -> Callable[[_C], _C]:
    """Class decorator: make a criterion available by name everywhere, command line included."""
    return _CRITERIA.register(name)


def create_criterion(name: str, **hyperparameters: Any) -> Criterion:
    """The registered criterion `name`, for example `create_criterion("cnp", temperature=0.2)`.

    Raises:
        UnknownNameError: no such criterion or hyper-parameter; the message names close ones.
    """
    return _CRITERIA.create(name, hyperparameters)


def criterion_class(name: str) -> type[Criterion]:
    """The class registered as `name`; raises UnknownNameError."""
    return _CRITERIA.get(name)


def list_criteria() -> list[str]:
    """Names for `create_criterion`, sorted."""
    return _CRITERIA.names()
