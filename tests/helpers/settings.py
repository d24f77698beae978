"""Settings with which criteria and scans are quick."""

from __future__ import annotations

from typing import Any

from nnprune_backdoor import (
    list_criteria,
)
from nnprune_backdoor.criteria.parts.unlearning import Unlearning
from nnprune_backdoor.evidence import Scan
from nnprune_backdoor.selectors import TriggerGone
from nnprune_backdoor.triggers import Inversion, UniversalPerturbation

# settings that make a criterion quick, each of its branches once; one that is not named here is
# tested with its defaults
_RNP = {"unlearn_epochs": 2, "unlearn_missed": "flag", "batch_size": 32}
_MNP = {**_RNP, "steps": 3}
_ANP = {"rounds": 1, "batch_size": 32}
_TAC = {"target": 3, "steps": 5, "min_success": 0.0, "stages": 3}
_CNP = {**_TAC, "steps": 2, "mask_batch": 16, "rounds": 1}
FAST: dict[str, dict[str, dict[str, Any]]] = {
    "rnp": {"response": _RNP, "masks": {**_RNP, "recovery": "masks", "recover_epochs": 2}},
    "anp": {"response": _ANP, "masks": {**_ANP, "optimise": "masks", "steps": 3}},
    "cnp": {
        "response": _CNP,
        "authors": {
            **_CNP,
            "target": None,
            "candidates": 1,
            "noise_passes": 1,
            "inversion": "authors",
            "ranking": "masks",
            "mask_steps": 2,
            "mask_look": 1,
        },
    },
    "fp": {"last": {}, "all": {"layers": "all"}},
    "mnp": {
        "response": {**_MNP, "ranking": "response"},
        "masks": {**_MNP, "ranking": "masks"},
    },
    "tac": {
        "unlearn": _TAC,
        "change": {**_TAC, "ranking": "change"},
        "search": {**_TAC, "target": None, "search_steps": 5},
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
    "unlearning": Unlearning(unlearn_lr=0.05, unlearn_epochs=5, unlearn_missed="flag"),
}
SCAN = Scan(search=QUICK, **FEW)


SELECTOR = TriggerGone(search=QUICK, inversion=QUICK)
