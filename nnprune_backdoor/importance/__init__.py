"""Scores as Torch-Pruning importances, for any of its pruners.

    from nnprune_backdoor.importance import RNPImportance

    pruner = tp.pruner.BasePruner(model, example, importance=RNPImportance(model, clean_loader))

Each registered criterion has a class named after its own: `RNPImportance` for `RNP`, and likewise
for criteria that you register.
"""

from ..criteria.base import criterion_class, list_criteria
from .by_criterion import CriterionImportance, importance_class, importance_name
from .groups import GroupImportance

__all__ = ["CriterionImportance", "GroupImportance", "importance_class"]


def _by_class_name() -> dict[str, str]:
    return {importance_name(criterion_class(name)): name for name in list_criteria()}


def __getattr__(attribute: str) -> type[CriterionImportance]:
    name = _by_class_name().get(attribute)
    if name is None:
        known = ", ".join(sorted(_by_class_name()))
        raise AttributeError(
            f"module {__name__!r} has no attribute {attribute!r}; importances by name: {known}"
        )
    return importance_class(name)


def __dir__() -> list[str]:
    return [*globals(), *_by_class_name()]
