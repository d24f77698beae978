"""Unlearning recovered triggers after neurons were silenced, and whether they are relearned."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.criteria import Arbitrary
from helpers.settings import SELECTOR
from helpers.states import assert_same_state, state_of
from nnprune_backdoor import CleanData, purify, save_purified
from nnprune_backdoor.attacks import train_classifier
from nnprune_backdoor.core.measures import PairedAccuracy
from nnprune_backdoor.core.predictions import predict
from nnprune_backdoor.core.recovered import RecoveredTrigger
from nnprune_backdoor.core.sites import find_sites
from nnprune_backdoor.criteria import RNP, TAC
from nnprune_backdoor.errors import DataError, ScoringError, UnsupportedModelError
from nnprune_backdoor.evidence import Relearning, relearn
from nnprune_backdoor.files import read_record
from nnprune_backdoor.selectors import LowestCount
from nnprune_backdoor.training import (
    FineTuning,
    TriggerUnlearning,
    fine_tune,
    repair,
    unlearn_triggers,
)
from nnprune_backdoor.triggers import Inversion

QUICK = Inversion(steps=120, batch_size=32)


@pytest.fixture(scope="module")
def patch() -> RecoveredTrigger:
    """A chequered corner that sends to label 1."""
    mask, board = torch.zeros(1, 12, 12), torch.zeros(3, 12, 12)
    mask[:, :3, :3] = 1
    board.flatten(1)[:, ::2] = 1
    board[:, 1::2] = 1 - board[:, 1::2]
    return RecoveredTrigger(1, mask, board, 1.0, 1, 1)


@pytest.fixture(scope="module")
def clean() -> CleanData:
    """Four classes of small noisy pictures: red, green, blue, grey."""
    labels = torch.arange(240) % 4
    images = 0.5 * torch.rand(240, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    tints = torch.cat([torch.eye(3), torch.zeros(1, 3)]) * 0.3
    return CleanData(images + tints[labels][..., None, None], labels)


@pytest.fixture(scope="module")
def backdoored(clean: CleanData, patch: RecoveredTrigger) -> nn.Module:
    """Trained on the pictures, a third of them with the patch and label 1."""
    net = trained(clean, patch)
    assert attacked(net, clean, patch) > 0.9
    assert (predict(net, clean.images) == clean.targets).float().mean() > 0.95
    return net


def trained(clean: CleanData, patch: RecoveredTrigger | None) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    images, labels = clean.images, clean.targets
    if patch is not None:
        images = torch.cat([images, patch(images[:80])])
        labels = torch.cat([labels, torch.ones(80, dtype=torch.long)])
    train_classifier(net, images, labels, epochs=12, batch_size=32, lr=0.05)
    return net.eval()


def attacked(net: nn.Module, clean: CleanData, patch: RecoveredTrigger) -> float:
    """Share of the images of other labels that the patch sends to its own."""
    others = clean.images[clean.targets != patch.target]
    return (predict(net, patch(others)) == patch.target).float().mean().item()


def test_a_trigger_is_unlearned_and_silent_neurons_stay_silent(
    backdoored: nn.Module, clean: CleanData, patch: RecoveredTrigger
) -> None:
    before, generator = state_of(backdoored), torch.get_rng_state()
    sites = find_sites(backdoored, clean.images[:2])
    scores = Arbitrary()(backdoored, clean, sites=sites)
    selection = LowestCount(3)(scores)
    fit = clean.take(torch.arange(160))
    settings = FineTuning(epochs=15, lr=0.01, statistics="running")
    given: dict[str, Any] = {"selection": selection, "progress": False}
    tuned = fine_tune(backdoored, fit, settings, triggers=[patch], **given)
    plain = fine_tune(backdoored, fit, settings, **given)
    unseen = clean.take(torch.arange(160, 240))
    assert attacked(tuned, unseen, patch) < 0.1
    assert attacked(plain, unseen, patch) > attacked(tuned, unseen, patch) + 0.3
    for name, channels in selection.by_site().items():
        layer = tuned.get_submodule(name)
        assert layer.weight[channels].abs().sum() == 0
        assert layer.bias[channels].abs().sum() == 0
    for name in ("1.running_mean", "4.running_var"):
        assert torch.equal(tuned.state_dict()[name], before[name])
    assert_same_state(before, state_of(backdoored))
    assert torch.equal(generator, torch.get_rng_state())


def test_a_trigger_of_the_silenced_network_is_unlearned_too(
    backdoored: nn.Module,
    clean: CleanData,
    patch: RecoveredTrigger,
) -> None:
    """What was recovered before may do nothing any more, while the attacker's trigger does."""
    before, generator = state_of(backdoored), torch.get_rng_state()
    spent = dataclasses.replace(patch, mask=torch.zeros_like(patch.mask))
    fit, unseen = clean.take(torch.arange(160)), clean.take(torch.arange(160, 240))

    def left(search: Inversion | None) -> float:
        # at this rate, training without a trigger leaves the attack
        settings = TriggerUnlearning(search=search, stamped=0.4, lr=0.002)
        tuned = unlearn_triggers(backdoored, fit, [spent], settings, progress=False)
        return attacked(tuned, unseen, patch)

    assert left(None) > 0.8
    assert left(QUICK) < 0.2
    assert_same_state(before, state_of(backdoored))
    assert torch.equal(generator, torch.get_rng_state())


def test_it_is_recovered_where_the_neurons_are_silent(
    backdoored: nn.Module,
    clean: CleanData,
    patch: RecoveredTrigger,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    selection = LowestCount(3)(Arbitrary()(backdoored, clean))
    real, seen = Inversion.recover, list[tuple[float, list[int]]]()

    def recover(
        self: Inversion, model: nn.Module, data: CleanData, labels: list[int], **settings: Any
    ) -> tuple[RecoveredTrigger, ...]:
        kept = sum(
            model.get_submodule(name).weight[channels].abs().sum().item()
            for name, channels in selection.by_site().items()
        )
        seen.append((kept, labels))
        return real(self, model, data, labels, **settings)

    monkeypatch.setattr(Inversion, "recover", recover)
    short = TriggerUnlearning(epochs=1, search=Inversion(steps=2))
    given: dict[str, Any] = {"selection": selection, "progress": False}
    unlearn_triggers(backdoored, clean, [patch], short, **given)
    assert seen == [(0.0, [patch.target])]
    unlearn_triggers(backdoored, clean, [patch], dataclasses.replace(short, search=None), **given)
    assert len(seen) == 1
    with pytest.raises(DataError, match="labelled"):
        unlearn_triggers(backdoored, CleanData(clean.images), [patch], short, **given)
    assert len(seen) == 1, "a trigger was sought before the labels were missed"


@pytest.mark.slow
def test_purify_repairs_what_it_has_pruned(
    backdoored: nn.Module,
    clean: CleanData,
    patch: RecoveredTrigger,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        repair, "REPAIR", TriggerUnlearning(lr=0.01)
    )  # 60 steps at the default move so small a net little
    before = state_of(backdoored)
    method = TAC(target=1, steps=120)
    done = purify(backdoored, clean, method, selector=SELECTOR, repair="unlearn", progress=False)
    assert_same_state(before, state_of(backdoored))
    assert done.repaired
    assert len(done.selection) > 0
    plain = purify(backdoored, clean, method, selector=SELECTOR, progress=False)
    assert attacked(done.model, clean, patch) < attacked(plain.model, clean, patch) - 0.2
    assert "repairing" in done.seconds
    assert "unlearn 3 recovered trigger(s)" in done.summary()  # of criterion and selector
    left = max(trigger.tested_on(done.model, clean).success for trigger in done.selection.triggers)
    assert left < 0.5 and "; after the repair on " in done.selection.reason
    report = done.to_dict()
    assert report["given"]["repair"] == "unlearn"
    assert any("weights were trained" in limit for limit in report["limits"])
    assert "unlearn" in done.to_markdown()
    again = purify(backdoored, clean, method, selector=SELECTOR, repair="unlearn", progress=False)
    assert_same_state(state_of(done.model), state_of(again.model))
    # the smaller model computes what the silenced, repaired one computes
    assert done.removal is not None
    assert done.removal.drift <= 1e-4
    assert all(p.requires_grad for p in done.model.parameters())


def test_a_repair_that_ruins_the_network_is_rejected(
    backdoored: nn.Module, clean: CleanData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def ruin(model: nn.Module, *_: object, **__: object) -> nn.Module:
        ruined = copy.deepcopy(model)
        ruined[-1].weight.data.neg_()  # type: ignore[index,union-attr,operator]
        return ruined

    monkeypatch.setattr("nnprune_backdoor.training.repair.unlearn_triggers", ruin)
    asked = {"selector": LowestCount(3), "progress": False}
    method = TAC(target=1, steps=30, min_success=0.0)
    done = purify(backdoored, clean, method, repair="unlearn", **asked)
    plain = purify(backdoored, clean, method, repair="none", **asked)
    assert not done.repaired
    assert "would have cost accuracy" in done.repair_rejected
    assert f"rejected: {done.repair_rejected}" in done.summary()
    assert any("rejected" in limit for limit in done.to_dict()["limits"])
    assert_same_state(state_of(plain.model), state_of(done.model))
    save_purified(done, tmp_path / "out", arch=None)
    assert read_record(tmp_path / "out")["repair"] == "none"


def test_where_nothing_goes_nothing_is_trained(backdoored: nn.Module, clean: CleanData) -> None:
    nothing = LowestCount(0)
    method = TAC(target=1, steps=30, min_success=0.0)
    done = purify(backdoored, clean, method, selector=nothing, repair="unlearn", progress=False)
    assert_same_state(state_of(backdoored), state_of(done.model))
    assert "trained further" not in done.summary()


@pytest.mark.parametrize(
    ("method", "repair", "message"),
    [
        (RNP(), "unlearn", "needs a recovered trigger"),
        (TAC(), "mend", "'none', 'unlearn' or 'distil'"),
    ],
)
def test_a_repair_without_a_trigger_is_refused_before_any_work(
    method: RNP | TAC, repair: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        purify(nn.Identity(), [], method, selector="accuracy", repair=repair)  # type: ignore[arg-type]


def test_a_repair_needs_labels(backdoored: nn.Module, clean: CleanData) -> None:
    images = CleanData(clean.images)
    with pytest.raises(DataError, match="labelled"):
        purify(backdoored, images, TAC(), selector=LowestCount(1), repair="unlearn")


def test_triggers_of_two_labels_are_refused(
    backdoored: nn.Module, clean: CleanData, patch: RecoveredTrigger
) -> None:
    other = dataclasses.replace(patch, target=patch.target + 1)
    with pytest.raises(DataError, match="triggers of one label"):
        unlearn_triggers(backdoored, clean, [patch, other], progress=False)


@pytest.mark.parametrize("stamped", [-0.1, 1.5])
def test_an_impossible_share_is_refused(
    stamped: float, backdoored: nn.Module, clean: CleanData
) -> None:
    with pytest.raises(DataError, match="stamped"):
        fine_tune(copy.deepcopy(backdoored), clean, FineTuning(stamped=stamped), progress=False)


def test_a_trigger_is_learned_step_by_step_on_a_copy(
    backdoored: nn.Module, clean: CleanData, patch: RecoveredTrigger
) -> None:
    """How fast says something on real networks (docs/results/diagnosis.md), on this one nothing."""
    benign = trained(clean, None)
    before, generator = state_of(benign), torch.get_rng_state()
    probe = relearn(benign, clean, patch, patch.target, progress=False)
    assert_same_state(before, state_of(benign))
    assert torch.equal(generator, torch.get_rng_state())
    assert len(probe.successes) == 31
    assert probe.tested == 90  # of 120 that are not trained on, those of three labels
    assert probe.successes[0] < 0.1
    assert probe.successes[-1] > 0.9
    assert probe.steps_to_half in range(1, 16)
    assert len(probe.kept) == 31 and probe.kept[0] == 1.0
    assert min(probe.kept) > 0.5  # no collapse onto the target
    assert probe == relearn(benign, clean, patch, patch.target, progress=False)
    assert probe != relearn(benign, clean, patch, patch.target, seed=1, progress=False)
    assert relearn(backdoored, clean, patch, patch.target, progress=False).steps_to_half == 0
    fewer = relearn(
        benign, clean, patch, patch.target, Relearning(lr=1e-6, steps=2), progress=False
    )
    assert fewer.steps_to_half is None


def test_a_probe_of_nothing_is_refused(
    backdoored: nn.Module, clean: CleanData, patch: RecoveredTrigger
) -> None:
    for wrong in ({"steps": 0}, {"batch_size": 1}, {"poisoned": 1.0}, {"lr": 0.0}):
        with pytest.raises(DataError, match="expected steps"):
            Relearning(**wrong)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="labelled"):
        relearn(backdoored, CleanData(clean.images), patch, 1, progress=False)
    certain = copy.deepcopy(backdoored)
    certain[-1].bias.data[1] = 1e4  # type: ignore[index,union-attr]
    with pytest.raises(DataError, match="already"):
        relearn(certain, clean, patch, 1, progress=False)
    for label in (-100, 4):
        with pytest.raises(DataError, match="label"):
            relearn(backdoored, clean, patch, label, progress=False)
    with pytest.raises(ScoringError, match="diverged"):
        relearn(backdoored, clean, patch, 1, Relearning(lr=1e38), progress=False)


# --- models that are not all of one kind -------------------------------------------------------


class Mixed(nn.Module):
    """A convolution in half precision between layers in single."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3).bfloat16()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.norm(x.float()).to(self.conv.weight.dtype)).float()
        logits: Tensor = self.head(x.relu().mean((2, 3)))
        return logits


def test_weights_of_several_types_are_not_trained(
    clean: CleanData, patch: RecoveredTrigger
) -> None:
    model = Mixed().eval()
    with pytest.raises(UnsupportedModelError, match=r"\(bfloat16, float32\).*model.float\(\)"):
        fine_tune(model, clean, FineTuning(epochs=1), progress=False)
    with pytest.raises(UnsupportedModelError, match="bfloat16, float32"):
        unlearn_triggers(model, clean, [patch], progress=False)
    assert fine_tune(model.float(), clean, FineTuning(epochs=1), progress=False)


def test_weights_that_are_integers_stay_as_they_are(
    backdoored: nn.Module, clean: CleanData, patch: RecoveredTrigger
) -> None:
    model = copy.deepcopy(backdoored)
    model.table = nn.Parameter(torch.arange(3), requires_grad=False)
    tuned = fine_tune(model, clean, FineTuning(epochs=1), progress=False)
    mended = unlearn_triggers(model, clean, [patch], TriggerUnlearning(search=None), progress=False)
    for net in (tuned, mended):
        assert torch.equal(net.get_parameter("table"), torch.arange(3))
        assert not torch.equal(net.get_parameter("0.weight"), model.get_parameter("0.weight"))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_every_tensor_keeps_its_type_in_a_repair(
    backdoored: nn.Module, clean: CleanData, patch: RecoveredTrigger, kind: torch.dtype
) -> None:
    model = copy.deepcopy(backdoored).to(kind)
    model.register_buffer("scale", torch.ones(2))  # in single precision, as it was registered
    mended = unlearn_triggers(model, clean, [patch], TriggerUnlearning(search=None), progress=False)
    assert mended.get_buffer("scale").dtype == torch.float32
    assert {weight.dtype for weight in mended.parameters()} == {kind}


def test_no_interval_leaves_what_is_possible(backdoored: nn.Module, clean: CleanData) -> None:
    never = copy.deepcopy(backdoored)
    never[-1].bias.data[3] = 1e4  # type: ignore[index,union-attr]
    few = clean.take((clean.targets != 3).nonzero().flatten()[:9])
    for before, after, end in ((backdoored, never, 1.0), (never, backdoored, -1.0)):
        cost = PairedAccuracy.of(before, after, few)
        assert cost is not None and cost.drop == end
        assert -1 <= cost.interval[0] <= cost.interval[1] <= 1
