"""What `purify` was asked for, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from ..core.compute import Compute
from ..core.masks import Silencing
from ..core.measures import Removal, Repair
from ..criteria.base import Criterion, create_criterion
from ..errors import DataError
from ..selectors.agreement import Agreeing
from ..selectors.base import Selector, create_selector
from .kept import KeptIn


@dataclass(frozen=True)
class Options:
    """What `purify` was asked for."""

    criterion: Criterion
    selector: Selector
    silencing: Silencing
    removal: Removal
    repair: Repair
    shares: tuple[float, float, float]
    compute: Compute
    progress: bool
    kept_in: KeptIn

    @classmethod
    def of(
        cls,
        method: str | Criterion,
        hyperparameters: dict[str, Any],
        selector: str | Selector | None,
        silencing: Silencing | None,
        repair: Repair | None,
        **others: Any,
    ) -> Self:
        """From the arguments of `purify`, of which None means that the others decide."""
        criterion = _criterion(method, hyperparameters)
        if repair is None:
            repair = "distil" if selector is None else "none"
        if selector is None:
            selector = Agreeing() if repair == "distil" else "accuracy"
        if silencing is None:
            silencing = criterion.silencing
        return cls(criterion, _selector(selector), silencing, repair=repair, **others)

    def __post_init__(self) -> None:
        if self.silencing not in ("zero", "constant"):
            raise DataError(f"expected silencing 'zero' or 'constant', got {self.silencing!r}")
        if self.removal not in ("exact", "group", "none"):
            raise DataError(f"expected removal 'exact', 'group' or 'none', got {self.removal!r}")
        if len(self.shares) != 3:
            raise DataError(
                f"expected shares for scoring, selecting and measuring, got {self.shares}"
            )

        self._check_repair()

    def _check_repair(self) -> None:
        if self.repair not in ("none", "unlearn", "distil"):
            raise DataError(f"expected repair 'none', 'unlearn' or 'distil', got {self.repair!r}")
        recovers = self.criterion.recovers_triggers or self.selector.recovers_triggers
        if self.repair == "unlearn" and not recovers:
            raise DataError(
                "repair='unlearn' needs a recovered trigger; take a criterion that recovers one "
                "('tac', 'cnp') or a selector that does ('trigger', 'auto')"
            )

    @property
    def needs_labels(self) -> bool:
        """Whether the images must have some; a criterion can do with the model's own answers."""
        return self.selector.needs_labels or self.repair == "unlearn"


def _criterion(method: str | Criterion, hyperparameters: dict[str, Any]) -> Criterion:
    if isinstance(method, type):
        raise DataError(f"expected a criterion, got a class; make it: {method.__name__}()")
    if isinstance(method, Criterion):
        if hyperparameters:
            names = ", ".join(hyperparameters)
            raise DataError(f"{names}: give hyper-parameters to the criterion you made, or a name")
        return method
    return create_criterion(method, **hyperparameters)


def _selector(selector: str | Selector) -> Selector:
    if isinstance(selector, type):
        raise DataError(
            f"expected a selector or its name, got a class; make it: {selector.__name__}(...)"
        )
    return selector if isinstance(selector, Selector) else create_selector(selector)
