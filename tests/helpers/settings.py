"""Settings with which criteria and scans are quick."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from nnprune_backdoor import (
    list_criteria,
)
from nnprune_backdoor.criteria import (
    ActivationChange,
    MaskTraining,
    PlateauTraining,
    Response,
    Unlearning,
)
from nnprune_backdoor.evidence import Scan, scanning
from nnprune_backdoor.pipeline import job
from nnprune_backdoor.selectors import TriggerGone
from nnprune_backdoor.training import Distillation, TriggerUnlearning, repair
from nnprune_backdoor.triggers import Inversion, SuspectLabels, UniversalPerturbation

# settings that make a criterion quick, each of its branches once; one that is not named here is
# tested with its defaults
_UNLEARNING = Unlearning(epochs=2, missed="flag", batch_size=32)
_RESPONSE = Response(batch_size=32)
_STAGES = Response(stages=3, batch_size=16)
_TAC = {"target": 3, "steps": 5, "min_success": 0.0}
FAST: dict[str, dict[str, dict[str, Any]]] = {
    "rnp": {
        "response": {"unlearning": _UNLEARNING, "ranking": _RESPONSE},
        "masks": {"unlearning": _UNLEARNING, "ranking": MaskTraining(epochs=2, batch_size=32)},
    },
    "anp": {
        "response": {"ranking": Response(batch_size=32, statistics="batch")},
        "masks": {"ranking": MaskTraining(steps=3, batch_size=32), "alpha": 0.2},
    },
    "cnp": {
        "response": {**_TAC, "ranking": _STAGES, "steps": 2, "noise_passes": 2},
        "authors": {
            **_TAC,
            "steps": 2,
            "target": None,
            "candidates": 1,
            "noise_passes": 1,
            "inversion": "authors",
            "ranking": PlateauTraining(steps=2, batch_size=16, check_every=1, statistics="running"),
        },
    },
    "fp": {"last": {}, "all": {"layers": "all"}},
    "mnp": {
        "response": {"unlearning": replace(_UNLEARNING, stop=None), "ranking": _RESPONSE},
        "masks": {
            "unlearning": replace(_UNLEARNING, stop=None),
            "ranking": MaskTraining(steps=3, batch_size=32, closed_share=0.1),
        },
    },
    "tac": {
        "unlearn": {**_TAC, "ranking": Response(stages=3)},
        "change": {**_TAC, "ranking": ActivationChange()},
        "search": {**_TAC, "ranking": Response(stages=3), "target": None, "search_steps": 5},
    },
}
ALL = {
    f"{name}-{branch}": (name, settings)
    for name in list_criteria()
    for branch, settings in FAST.get(name, {"default": {}}).items()
}


QUICK = Inversion(steps=120, batch_size=32)
FEW: dict[str, Any] = {
    "universal": UniversalPerturbation(steps=5, batch_size=4),
    "starts": 1,
}
SCAN = Scan(search=QUICK, **FEW)


SELECTOR = TriggerGone(search=QUICK, inversion=QUICK)


def shorten_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `purify` repair for one or two epochs and look for triggers in a few steps.

    For tests of what it says and writes, not of what its training does.
    """
    few = UniversalPerturbation(steps=2)
    patches = Inversion(steps=2, batch_size=8)
    search = SuspectLabels(glance=few, perturbations=few, larger=few, patches=patches)
    monkeypatch.setattr(job, "Distillation", partial(Distillation, epochs=2, search=search))
    monkeypatch.setattr(repair, "REPAIR", TriggerUnlearning(epochs=1, search=patches))


def shorten_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `scan` search in five steps, for tests of what it says and writes."""
    monkeypatch.setattr(scanning, "scan", Scan(search=Inversion(steps=5), **FEW))
