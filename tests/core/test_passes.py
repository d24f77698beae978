"""What is counted beforehand is what runs, and what is timed is scaled by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.criteria import Arbitrary
from helpers.images import noise_images
from helpers.states import assert_same_state, state_of
from nnprune_backdoor import CleanData
from nnprune_backdoor.core.passes import Expected, Passes, Task, expected
from nnprune_backdoor.core.plan import announce, in_words
from nnprune_backdoor.core.sites import find_sites
from nnprune_backdoor.criteria import ANP, CNP, FP, MNP, RNP, TAC, Criterion, MaskTraining, Response
from nnprune_backdoor.criteria.parts.unlearning import Unlearning
from nnprune_backdoor.training import Distillation, distil
from nnprune_backdoor.triggers import (
    Inversion,
    SuspectLabels,
    UniversalBlend,
    UniversalPerturbation,
)
from nnprune_backdoor.utils import progress


class Counting(nn.Module):
    """A small classifier that counts the images that it and its copies are given."""

    seen = 0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3, stride=4)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        Counting.seen += len(images)
        return self.head(self.norm(self.first(images)).relu().mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def model() -> nn.Module:
    """One that gives each of its labels to some of the images."""
    made = Counting().eval().requires_grad_(False)
    logits = made(CLEAN.images)
    made.head.bias.sub_(logits.mean(0)).div_(logits.std(0))
    made.head.weight.div_(logits.std(0)[:, None])
    return made


CLEAN = CleanData(noise_images(60), torch.arange(60) % 4)
SHORT = {"search_steps": 7, "steps": 9, "min_success": 0.0, "target": 1}
UNLEARN = Unlearning(epochs=3, batch_size=20, stop=-1.0, missed="flag")


def counted(work: Iterable[Passes]) -> float:
    return sum(passes.images for passes in work)


def ran(work: Callable[[], object]) -> int:
    Counting.seen = 0
    work()
    return Counting.seen


def task(model: nn.Module) -> Task:
    return Task.of(model, CLEAN.images, 4, neurons=6)


@pytest.mark.parametrize(
    "criterion",
    [
        RNP(unlearning=UNLEARN, ranking=Response(stages=3, batch_size=20)),
        RNP(unlearning=UNLEARN, ranking=MaskTraining(epochs=5, batch_size=20)),
        ANP(ranking=Response(rounds=4, batch_size=20)),
        ANP(ranking=MaskTraining(steps=11, batch_size=20), alpha=0.2),
        MNP(unlearning=UNLEARN, ranking=Response(batch_size=20)),
        CNP(ranking=Response(stages=4, batch_size=20), **SHORT),
        TAC(ranking=Response(stages=4, batch_size=20), **SHORT),
        TAC(**SHORT | {"target": None}),
        FP(),
    ],
    ids=lambda criterion: repr(criterion)[:40],
)
def test_criteria_count_what_they_run(criterion: Criterion, model: nn.Module) -> None:
    work = criterion.passes(task(model))
    assert work is not None
    checks = ran(lambda: Arbitrary()(model, CLEAN))
    real = ran(lambda: criterion(model, CLEAN)) - checks
    assert counted(work) == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize("labels", [1, 3])
def test_searches_count_what_they_run(labels: int, model: nn.Module) -> None:
    searches = (
        Inversion(steps=30, batch_size=8),
        UniversalPerturbation(steps=20),
        UniversalBlend(),
    )
    for search in searches:
        work = search.passes(task(model), labels)
        real = ran(lambda search=search: search.recover(model, CLEAN, range(labels)))  # type: ignore[misc]
        assert counted(work) == pytest.approx(real, rel=0.1)


def test_looking_again_counts_what_it_runs(model: nn.Module) -> None:
    """Of one suspect label to which no trigger works any more, and no image gets."""
    search = SuspectLabels(working=1.0, suspicious=1.0).scaled(1e-6)

    def looks() -> None:
        assert search.still_working(model, CLEAN, [0]) == ()
        search.standing_out(model, CLEAN, [0])

    assert counted(search.passes_again(task(model))) == pytest.approx(ran(looks), rel=0.1)


def test_distilling_counts_both_networks(model: nn.Module) -> None:
    settings = Distillation(epochs=6, batch_size=20, stamped=0)
    work = settings.passes(task(model))
    real = ran(lambda: distil(model, model, CLEAN, settings, progress=False))
    assert counted(work) == pytest.approx(real, rel=0.1)


def test_what_is_not_known_is_not_guessed(model: nn.Module) -> None:
    class Mine(Criterion):
        def score(self, *_: Any) -> Any: ...

    assert Mine().passes(task(model)) is None


class Slow(Counting):
    """Takes a second an image, and two more if gradients are wanted, on a clock of its own."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        NOW[0] += len(images) * (3 if logits.requires_grad else 1)
        return logits


NOW = [0.0]


def test_seconds_are_those_of_the_network_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "timer", lambda: NOW[0])
    model = Slow().eval().requires_grad_(False)
    before, drawn = state_of(model), torch.get_rng_state()
    sites = find_sites(model, CLEAN.images[:2])
    stages = {
        "one": (Passes("weights", 20, 6000.0), Passes("forward", 20, 3000.0)),
        "two": (Passes("masks", 10, 500.0), Passes("images", 70, 700.0), Passes("forward", 5, 7.0)),
        "none": (),
        "unknown": None,
    }
    found = expected(stages, model, CLEAN.images, sites).seconds
    assert found["one"] == pytest.approx(3 * 6000 + 3000)
    assert found["two"] == pytest.approx(3 * 1200 + 7, rel=0.2)  # not all of it is worth timing
    assert found["none"] == 0
    assert found["unknown"] is None
    assert_same_state(before, state_of(model))
    assert not any(weight.requires_grad for weight in model.parameters())
    assert torch.equal(drawn, torch.get_rng_state())


@pytest.mark.parametrize(("images", "passes"), [(40.0, 1), (800.0, 3), (1e6, 8)])
def test_a_short_job_is_not_made_much_longer_by_timing_it(
    images: float, passes: int, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "timer", lambda: 0.0)  # so fast that the time is never enough
    stages = {"one": (Passes("forward", 20, images),)}
    assert ran(lambda: expected(stages, model, CLEAN.images, ())) == 20 * passes


def test_a_plan_says_what_it_knows(
    model: nn.Module, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "timer", lambda: NOW[0])
    slow = Slow().eval().requires_grad_(False)
    stages = {"first": (Passes("forward", 10, 100.0),), "second": None}
    how: dict[str, Any] = {"seed": 0, "progress": True}
    found = announce("doing this", stages, slow, CLEAN.images, (), **how)
    assert found == {"first": 100.0, "second": None}
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "doing this",
        "about 1 min 40 s in all: first 1 min 40 s; without second, of which it is not known",
    ]
    assert announce("this", stages, slow, CLEAN.images, (), seed=0, progress=False) == {}
    assert capsys.readouterr().err == ""


def test_training_that_may_not_end_by_itself_is_told_apart(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "timer", lambda: NOW[0])
    slow = Slow().eval().requires_grad_(False)
    work = Unlearning(epochs=400).passes(task(model))  # 60 images: a step an epoch
    found = expected({"scoring": work}, slow, CLEAN.images, ())
    assert found.total == pytest.approx(50 * 60 * 3)
    assert found.longest == pytest.approx(400 * 60 * 3)
    assert in_words(found).endswith("; up to 20 h 0 min if unlearning does not end by itself")
    assert "up to" not in in_words(Expected({"scoring": 60.0}, 70.0))
    few = Unlearning(epochs=20).passes(task(model))
    assert few[0].images == few[0].most == 20 * 60


def test_a_network_that_cannot_be_timed_is_still_worked_on(
    model: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(Counting):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("no more memory")

    stages = {"first": (Passes("forward", 10, 100.0),)}
    found = announce("this", stages, Broken().eval(), CLEAN.images, (), seed=0, progress=True)
    assert found == {}
    assert "cannot be estimated (no more memory)" in capsys.readouterr().err
