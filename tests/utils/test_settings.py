"""Settings of dataclasses: words that are among the known ones, numbers that make sense."""

from __future__ import annotations

from typing import Any

import pytest

from nnprune_backdoor import create_criterion, list_criteria
from nnprune_backdoor.criteria import ANP, CNP, RNP, TAC, MaskTraining, Response, Unlearning
from nnprune_backdoor.errors import DataError


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (ANP, {"ranking": "masks"}, "expected ranking to be Response or MaskTraining, got 'masks'"),
        (ANP, {"noise_budget": -1}, "expected noise_budget of at least 0, got -1"),
        (CNP, {"ranking": MaskTraining(steps=1)}, "expected ranking to be Response or PlateauT"),
        (TAC, {"ranking": "foo"}, "expected ranking to be Response or ActivationChange"),
        (TAC, {"batch_size": 0}, "expected batch_size of more than 0, got 0"),
        (RNP, {"unlearning": {"lr": 0.1}}, "expected unlearning to be Unlearning"),
        (RNP, {"mask_silencing": "none"}, "expected mask_silencing 'zero' or 'constant'"),
        (Response, {"statistics": "x"}, "expected statistics 'batch' or 'running'"),
        (Response, {"rounds": 0}, "expected rounds of more than 0, got 0"),
        (Response, {"stages": 0}, "expected stages of more than 0, got 0"),
        (Response, {"stage_share": 1.5}, r"expected a stage_share in \(0, 1\], got 1\.5"),
        (MaskTraining, {"steps": 1, "lr": float("nan")}, "expected lr of at least 0, got nan"),
        (MaskTraining, {}, "expected either steps or epochs"),
        (MaskTraining, {"steps": 1, "epochs": 1}, "expected either steps or epochs"),
        (Unlearning, {"epochs": 0}, "expected epochs of more than 0"),
        (Unlearning, {"lr": -1.0}, "expected lr of at least 0"),
        (Unlearning, {"missed": "ignore"}, "expected missed 'error' or 'flag'"),
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
    assert ANP(noise_budget=0.0, ranking=MaskTraining(steps=0)).noise_budget == 0
    assert Unlearning(stop=-1.0).stop == -1
    assert TAC(target=None).target is None
