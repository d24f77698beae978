"""Settings of dataclasses: words that are among the known ones, numbers that make sense."""

from __future__ import annotations

from typing import Any

import pytest

from nnprune_backdoor import create_criterion, list_criteria
from nnprune_backdoor.criteria import ANP, RNP, TAC
from nnprune_backdoor.criteria.parts.unlearning import Unlearning
from nnprune_backdoor.errors import DataError


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (ANP, {"optimise": "mask"}, "expected optimise 'response' or 'masks', got 'mask'"),
        (ANP, {"statistics": "x"}, "expected statistics 'batch' or 'running'"),
        (ANP, {"noise_budget": -1}, "expected noise_budget of at least 0, got -1"),
        (ANP, {"mask_lr": float("nan")}, "expected mask_lr of at least 0, got nan"),
        (TAC, {"ranking": "foo"}, "expected ranking"),
        (TAC, {"batch_size": 0}, "expected batch_size of more than 0, got 0"),
        (RNP, {"recovery": "mask"}, "expected recovery"),
        (RNP, {"mask_means": "none"}, "expected mask_means 'zero' or 'constant'"),
        (RNP, {"unlearn_epochs": 0}, "expected unlearn_epochs of more than 0"),
        (RNP, {"unlearn_lr": -1.0}, "expected unlearn_lr of at least 0"),
        (Unlearning, {"unlearn_missed": "ignore"}, "expected unlearn_missed 'error' or 'flag'"),
    ],
)
def test_what_means_nothing_is_refused_when_it_is_said(
    kind: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        kind(**settings)


@pytest.mark.parametrize("name", list_criteria())
def test_defaults_and_published_settings_mean_something(name: str) -> None:
    created = create_criterion(name)
    assert type(created).paper().silencing in ("zero", "constant")
    assert created.silencing == "zero"


def test_none_and_nothing_can_be_asked_for() -> None:
    assert ANP(noise_budget=0.0, steps=0).steps == 0
    assert TAC(target=None).target is None
