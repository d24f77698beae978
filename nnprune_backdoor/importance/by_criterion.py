"""One importance class for each registered criterion."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import nn

from ..core.data import CleanData
from ..criteria.base import Criterion, create_criterion, criterion_class
from ..utils.randomness import private_randomness
from ..utils.tensors import placement
from .groups import GroupImportance, Reduction
from .trial import Mend


class CriterionImportance(GroupImportance):
    """Importance by a registered criterion, which scores the model when the importance is made.

    Args:
        model: the model that will be pruned, not a copy of it; scoring works on a copy. Where that
            one does not return its logits, a module that does and holds it.
        clean_loader: clean images, as for `purify`. Criteria that read the weights alone (CLP,
            Magnitude, Random) take one image without a label, or none.
        reduction: see `GroupImportance`.
        seed: same seed, same machine, same number of threads, same scores.
        progress: show progress bars on a terminal, elsewhere a line every 30 seconds.
        trial: see `GroupImportance`.
        **hyperparameters: of the criterion.

    Attributes:
        criterion: Name under which the criterion is registered.

    Raises:
        UnknownNameError: the criterion has no such hyper-parameter.
        DataError: the images or labels cannot be used.
        UnsupportedModelError: the model cannot be scored.
        ScoringError: the criterion did not reach a usable result.
    """

    criterion: ClassVar[str]

    def __init__(
        self,
        model: nn.Module,
        clean_loader: CleanData | Iterable[Any] | None = None,
        *,
        reduction: Reduction = "max",
        seed: int = 0,
        progress: bool = False,
        trial: bool | Mend = True,
        **hyperparameters: Any,
    ) -> None:
        criterion = create_criterion(self.criterion, **hyperparameters)
        with private_randomness(seed):
            data = criterion.images_for(model, clean_loader)
        scores = criterion(model, data, seed=seed, progress=progress)
        example = data.images[:1].to(**placement(model), copy=True)  # not the storage of all
        super().__init__(model, scores, reduction, example=example, trial=trial)


def importance_class(name: str) -> type[CriterionImportance]:
    """The importance class of a registered criterion; for "rnp" it is `RNPImportance`.

    Raises:
        UnknownNameError: no criterion has that name; the message lists similar ones.
    """
    cls = criterion_class(name)
    if cls not in _CLASSES:
        body = {
            "criterion": name,
            "__doc__": f"{cls.reference}.\n\n{CriterionImportance.__doc__}",
            "__module__": __name__,
        }
        # another thread may have made it by now
        _CLASSES.setdefault(cls, type(importance_name(cls), (CriterionImportance,), body))
    return _CLASSES[cls]


_CLASSES: dict[type[Criterion], type[CriterionImportance]] = {}


def importance_name(cls: type[Criterion]) -> str:
    """`RNP` -> "RNPImportance"."""
    return f"{cls.__name__}Importance"
