"""What an interactive session prints of a result stays short, however large the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nnprune_backdoor import CleanData, Diagnosis, Purified
from nnprune_backdoor.core.compute import Compute
from nnprune_backdoor.core.measures import PairedAccuracy, ProxySuccess
from nnprune_backdoor.core.prepared import Prepared
from nnprune_backdoor.core.recovered import PixelRange, RecoveredTrigger
from nnprune_backdoor.core.scores import ChannelScores, Point, Selection, neurons_of
from nnprune_backdoor.core.sites import Site
from nnprune_backdoor.criteria import CLP
from nnprune_backdoor.criteria.parts.unlearning import Look
from nnprune_backdoor.evidence import Evidence, Exposed, Relearned, Restored, Suspicion
from nnprune_backdoor.files import FolderImages
from nnprune_backdoor.removal import Cut, Recipe, RemovalReport
from nnprune_backdoor.removal.report import Size
from nnprune_backdoor.reports import Given, Report
from nnprune_backdoor.selectors import LowestCount
from nnprune_backdoor.triggers import RecoveredPerturbation, TargetEvidence
from nnprune_backdoor.utils.statistics import Rate

LONGEST = 500
SITES = tuple(Site(f"stages.{i}.<b>conv</b>", 1000, "layer", f"{i}") for i in range(100))
CLASSES = 1000


def scores() -> ChannelScores:
    details = {"losses": [0.5] * 10_000}
    return ChannelScores(SITES, torch.rand(100_000), "TAC(" + "x" * 900, details, (trigger(),) * 9)


def selection() -> Selection:
    curve = tuple(Point(i, 0.0) for i in range(500))
    neurons = tuple(neurons_of(SITES)[:50_000])
    return Selection(SITES, neurons, "why " * 500, {"a": [0] * 9999}, curve, (trigger(),))


def trigger() -> RecoveredTrigger:
    return RecoveredTrigger(1, torch.ones(1, 224, 224), torch.ones(3, 224, 224), 0.9, 60, 400)


def perturbation() -> RecoveredPerturbation:
    return RecoveredPerturbation(1, torch.ones(3, 224, 224), pixels(), 0.9, 60)


def pixels() -> PixelRange:
    return PixelRange(-torch.ones(64, 1, 1), torch.ones(64, 1, 1))


def network() -> nn.Module:
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(200)))


def exposed() -> Exposed:
    looks = tuple(Look(i, 0.5, shares()) for i in range(40))
    return Exposed(network(), looks, shares(), True)


def shares() -> tuple[float, ...]:
    return (1 / CLASSES,) * CLASSES


def evidence() -> Evidence:
    return Evidence("universal", 0.9)


def suspicion() -> Suspicion:
    return Suspicion.of(1, universal=0.99, size=0.01, restored=0.9)


def restored() -> Restored:
    return Restored(1, 0.9, 60, selection(), ({"neurons": 1},) * 200)


def diagnosis() -> Diagnosis:
    return Diagnosis(
        suspicions=(suspicion(),) * 2, cannot_tell=None, classes=CLASSES, images=300, seed=0,
        triggers=(trigger(),) * CLASSES, perturbations=(perturbation(),) * CLASSES,
        restored=restored(), model=network(), example=torch.ones(3, 224, 224), pixels=pixels(),
    )  # fmt: skip


def cut() -> Cut:
    return Cut({"weight": {0: tuple(range(10_000))}}, {"out_channels": 10_000})


def recipe() -> Recipe:
    return Recipe({site.name: cut() for site in SITES})


def removal() -> RemovalReport:
    reasons = dict.fromkeys(neurons_of(SITES)[25_000:50_000], "read together")
    size = Size(10**8, 10**10, 0.5)
    removed = tuple(neurons_of(SITES)[:25_000])
    return RemovalReport(removed, removed, reasons, 25_000, recipe(), 1e-7, size, size, 1.0)


def given() -> Given:
    return Given(
        architecture="resnet50.a1_in1k (ResNet)" * 9, classes=CLASSES, parameters=10**8,
        where="cpu, float32", images=500, labelled=True, parts=(300, 125, 75), probe=16,
        example=torch.ones(3, 224, 224), pixels=pixels(), criterion=CLP(),
        selector=LowestCount(50_000), removal="exact", repair="none", shares=(0.6, 0.25, 0.15),
        compute=Compute(), sha256={"weights": "0" * 64, "clean": "0" * 64},
    )  # fmt: skip


def purified() -> Purified:
    accuracy = PairedAccuracy(Rate(70, 75), Rate(60, 75), 10 / 75, (0.05, 0.2))
    stages = dict.fromkeys(("scoring", "selecting", "certifying"), 1.5)
    proxies = (proxy(),) * 9
    return Purified(
        network(), scores(), selection(), accuracy, "zero", removal(), 0, given(), proxies, stages
    )


def proxy() -> ProxySuccess:
    return ProxySuccess(trigger(), "selector", Rate(70, 75), Rate(1, 75))


def folder() -> FolderImages:
    names = tuple(f"{i}.png" for i in range(9999))
    return FolderImages(clean(), names, names, 9999, names, "notice " * 200)


def clean() -> CleanData:
    return CleanData(torch.zeros(500, 3, 32, 32), torch.zeros(500, dtype=torch.long))


RESULTS: tuple[Callable[[], Any], ...] = (
    purified, lambda: Report.of(purified()), given, diagnosis, scores, selection, recipe, cut,
    removal, clean, lambda: Prepared(network(), clean(), 10), exposed, restored, evidence, trigger,
    suspicion, perturbation, pixels, proxy, folder, lambda: Look(3, 0.5, shares()),
    lambda: Relearned(1, 60, shares(), shares()),
    lambda: TargetEvidence((trigger(),) * CLASSES, shares(), shares(), trigger()),
)  # fmt: skip


@pytest.mark.parametrize("make", RESULTS)
def test_the_repr_of_a_result_is_short(make: Callable[[], Any]) -> None:
    result = make()
    assert len(repr(result)) < LONGEST
    assert repr(result).count("\n") < 5


def test_a_repr_names_what_matters() -> None:
    assert repr(trigger()) == (
        "RecoveredTrigger(target=1, mask=Tensor(1, 224, 224), pattern=Tensor(3, 224, 224), "
        "success=0.9, tested=60, steps=400)"
    )
    assert "images=Tensor(500, 3, 32, 32)" in repr(clean())
    assert "neurons=<tuple of 50,000>" in repr(selection())
    assert repr(Prepared(network(), clean(), 10)) == (
        "Prepared(model=Sequential, clean=<CleanData of 500>, classes=10)"
    )
    assert "100000 neurons silenced" in repr(purified())
    assert "target 1 (probability 1.00)" in repr(diagnosis())


def test_notebooks_show_escaped_text() -> None:
    for result in (purified(), diagnosis()):
        html = result._repr_html_()
        assert html.startswith("<pre>") and html.endswith("</pre>")
        assert "<" not in html[5:-6]
