"""The whole job: on networks with a backdoor written in by hand, and end to end on photographs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.criteria import Arbitrary
from helpers.networks import planted
from nnprune_backdoor import (
    CleanData,
    Compute,
    Purified,
    Selector,
    create_criterion,
    demo,
    list_criteria,
    purify,
    scan,
)
from nnprune_backdoor.attacks import create_attack
from nnprune_backdoor.attacks.evaluation import accuracy
from nnprune_backdoor.core.held_out import HeldOut
from nnprune_backdoor.core.masks import MaskedModel
from nnprune_backdoor.core.measures import Removal
from nnprune_backdoor.core.scores import ChannelScores, Selection, lowest
from nnprune_backdoor.criteria import (
    ANP,
    RNP,
    TAC,
    MaskTraining,
    Response,
    Unlearning,
    criterion_class,
)
from nnprune_backdoor.criteria.parts.trigger import TriggerCriterion
from nnprune_backdoor.demo import Demo, run_demo
from nnprune_backdoor.errors import DataError, UnknownNameError, UnsupportedModelError
from nnprune_backdoor.removal import Recipe
from nnprune_backdoor.removal.compaction import COUPLED
from nnprune_backdoor.selectors import (
    AccuracyBudget,
    BelowThreshold,
    LowestCount,
    LowestFraction,
    Outlier,
    TriggerGone,
)
from nnprune_backdoor.triggers import Inversion


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=4).eval()


@pytest.fixture(scope="module")
def clean(model: nn.Module) -> CleanData:
    """Noise images, labelled by the model itself, so that there is an accuracy to lose."""
    images = torch.randn(120, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    centred = images + torch.arange(120)[:, None, None, None] % 4
    return CleanData(centred, torch.arange(120) % 4)


QUICK = ANP(ranking=Response(statistics="batch"))


def test_the_product_is_a_silenced_copy(model: nn.Module, clean: CleanData) -> None:
    before = copy.deepcopy(model.state_dict())
    chooser = LowestCount(7)
    result = purify(model, clean, QUICK, selector=chooser, removal="none", progress=False)
    assert result.removal is None
    assert len(result.selection) == 7
    assert result.accuracy is not None
    assert result.accuracy.before.count == 18  # 15 % of 120, seen by nothing else
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    after = result.model.state_dict()
    for site, channels in result.selection.by_site().items():
        assert after[f"{site}.weight"][channels].abs().sum() == 0
        assert after[f"{site}.bias"][channels].abs().sum() == 0
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    touched = result.selection.by_site()
    assert all(name.rsplit(".", 1)[0] in touched for name in changed)


def test_removal_changes_the_shape_and_not_the_function(model: nn.Module, clean: CleanData) -> None:
    def run(removal: Removal) -> Purified:
        tenth = LowestFraction(0.1)
        return purify(model, clean, Arbitrary(), selector=tenth, removal=removal, progress=False)

    whole, exact, group = run("none"), run("exact"), run("group")
    sizes = [sum(p.numel() for p in result.model.parameters()) for result in (whole, exact, group)]
    assert sizes[0] > sizes[1] > sizes[2]
    assert exact.removal is not None
    assert group.removal is not None
    assert len(exact.removal.removed) < len(group.removal.removed) == len(group.selection)
    assert not exact.removal.filled  # other tools take the product as any network
    with torch.no_grad():
        wanted, got, other = (r.model(clean.images) for r in (whole, exact, group))
    scale = wanted.abs().max()
    assert (got - wanted).abs().max() <= 1e-4 * scale
    assert (other - wanted).abs().max() > 1e-4 * scale  # and says so:
    assert group.removal.drift > 1e-4
    assert whole.recipe == Recipe()
    rebuilt = exact.recipe.apply_(copy.deepcopy(model))
    rebuilt.load_state_dict(exact.model.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(clean.images), got)
    assert "neurons removed" in exact.summary()
    assert COUPLED in exact.summary()


def test_it_is_repeatable_and_says_what_it_did(model: nn.Module, clean: CleanData) -> None:
    first, second = (
        purify(model, clean, QUICK, selector=LowestCount(5), progress=False) for _ in range(2)
    )
    assert torch.equal(first.scores.flat, second.scores.flat)
    assert first.selection.neurons == second.selection.neurons
    text = first.summary()
    assert "5 of 1040 silenced" in text
    assert "no proof" in text
    assert not any(word in text for word in ("is clean", "is safe", "certified"))


def test_modes_and_flags_come_back(clean: CleanData) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4).train()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    model.set_grad_checkpointing(True)
    result = purify(model, clean, QUICK, selector=LowestCount(1), progress=False)
    assert model.training
    assert result.model.training
    assert model.grad_checkpointing is result.model.grad_checkpointing is True
    assert [p.requires_grad for p in result.model.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]


def test_refusals_come_before_any_work(model: nn.Module, clean: CleanData) -> None:
    class Untouchable:
        def __iter__(self) -> Iterator[object]:
            raise AssertionError("the loader was read")

    with pytest.raises(UnknownNameError, match="did you mean 'rnp'"):
        purify(model, Untouchable(), "rpn")
    with pytest.raises(UnknownNameError, match="unlearning"):
        purify(model, Untouchable(), "rnp", unlearn_rate=1.0)
    with pytest.raises(UnknownNameError, match="accuracy"):
        purify(model, Untouchable(), "rnp", selector="acuracy")
    with pytest.raises(DataError, match="silencing"):
        purify(model, Untouchable(), "rnp", silencing="none")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="removal"):
        purify(model, Untouchable(), "rnp", removal="all")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="labelled"):
        purify(model, [clean.images], "rnp", selector="accuracy", progress=False)


def test_wrapped_and_tied_models_are_refused(model: nn.Module, clean: CleanData) -> None:
    with pytest.raises(UnsupportedModelError, match=r"model\.module"):
        purify(nn.DataParallel(model), clean, QUICK, progress=False)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 3, 3, padding=1)
            self.second = nn.Conv2d(3, 3, 3, padding=1)
            self.second.weight = self.first.weight
            self.head = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))

    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError, match="shared between layers"):
        purify(Tied(), clean, QUICK, selector=LowestCount(2), progress=False)
    with torch.device("meta"):
        empty = timm.create_model("test_resnet", num_classes=4)
    with pytest.raises(UnsupportedModelError, match="has no weights"):
        purify(empty, clean, QUICK, progress=False)
    with pytest.raises(UnsupportedModelError, match="give the eager one"):
        purify(torch.jit.ScriptModule(), clean, QUICK, progress=False)


class Noisy(nn.Module):
    """Says something else each time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits + 0.3 * logits.std() * torch.randn_like(logits)


def test_models_that_cannot_be_measured_are_refused(model: nn.Module, clean: CleanData) -> None:
    """By chance, or by BatchNorm that keeps no statistics, whatever is asked of them."""
    batchwise = copy.deepcopy(model)
    for layer in batchwise.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean = layer.running_var = None
    for bad in (batchwise, Noisy(model)):
        for work in (
            lambda some: purify(some, clean, QUICK, progress=False),
            lambda some: QUICK(some, clean),
            lambda some: scan(some, clean),
        ):
            with pytest.raises(UnsupportedModelError, match="images beside it"):
                work(bad)


def test_a_caller_in_inference_mode_gets_a_model_that_can_be_trained(
    model: nn.Module, clean: CleanData
) -> None:
    with torch.inference_mode():
        result = purify(model, clean, QUICK, selector=LowestCount(2), progress=False)
    result.model.requires_grad_(True)(clean.images[:4]).sum().backward()


# chance, and what does no better here: with nothing silenced the margin below is 9.3, the luckiest
# of ten random draws leaves 0.6, these leave 7.7, 9.3 and 3.6
BASELINES = {"random", "magnitude", "clp"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(list_criteria()) - BASELINES))
def test_a_score_beats_chance_on_a_tiny_backdoor(name: str) -> None:
    """Silencing the lowest scores hurts the backdoor more than silencing random neurons does."""
    model, clean, triggered, target = planted()
    others = clean.targets != target
    given: dict[str, Any] = {}
    if issubclass(criterion_class(name), TriggerCriterion):
        ranking = Response(stages=4, stage_share=0.0125)  # as far, in fewer steps
        given = {"ranking": ranking, "search_steps": 60, "steps": 60}
    scores = create_criterion(name, **given)(model, clean)
    masked = MaskedModel(model.requires_grad_(False), scores.sites, silencing="zero")
    masked.masks.requires_grad_(False)

    def margin(keep: Tensor) -> float:
        masked.masks.copy_(keep)
        logits = masked(triggered[others])
        return float((logits[:, target] - logits[:, 1:].max(1).values).mean())

    count = round(0.05 * len(scores.flat))
    generator = torch.Generator().manual_seed(0)
    chance = []
    for _ in range(10):
        keep = torch.ones(len(scores.flat))
        keep[torch.randperm(len(keep), generator=generator)[:count]] = 0
        chance.append(margin(keep))
    chosen = lowest(scores, count).keep()
    assert margin(torch.ones(len(scores.flat))) > 0, "the backdoor is there to begin with"
    assert margin(chosen) < min(chance)


# --- the main job ----------------------------------------------------------------------------


# Smaller than the demo, with half of the photographs, more of them poisoned, and shorter searches.
# On the five networks of docs/results/demo_seeds.md ASR was below 2 %, RA above 95 %; here 4, 90 %.
# Another number of threads adds in another order and trains another network.
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("photographs_cut_once")
def test_end_to_end_on_real_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timm ResNet with a planted trigger: the attack goes, the clean accuracy stays."""
    monkeypatch.setattr(demo, "create_attack", partial(create_attack, size=4))
    outcome = run_demo(
        Demo(width=0.25, images=6000, rate=0.1),
        method=TAC(search_steps=80, steps=150, ranking=Response(stages=10, stage_share=0.005)),
        selector=TriggerGone(
            search=Inversion(steps=80, batch_size=16), inversion=Inversion(steps=100), points=20
        ),
        repair="unlearn",
        clean_images=300,
    )
    before, after = outcome.before, outcome.after
    assert before.attack.asr.value >= 0.95
    assert before.acc.value >= 0.9
    assert after.attack.asr.value <= 0.15
    assert after.attack.ra.value >= 0.7
    assert after.acc.value >= before.acc.value - 0.03
    removal = outcome.purified.removal
    assert removal is not None
    smaller = removal.after.parameters < removal.before.parameters
    assert smaller == (len(removal.removed) > 0)  # few may all be ones that blocks share
    table = outcome.table()
    assert f"{after.attack.asr}" in table
    assert f"{removal.after.parameters:,}" in table


def test_unlabelled_images_do_for_a_selector_that_needs_no_labels(
    model: nn.Module, clean: CleanData
) -> None:
    loader = DataLoader(TensorDataset(clean.images), batch_size=50)
    result = purify(model, loader, Arbitrary(), selector=LowestCount(2), progress=False)
    assert result.accuracy is None
    assert "no labels" in result.summary()
    with pytest.raises(DataError, match="labelled"):
        purify(model, loader, Arbitrary(), selector=AccuracyBudget(), progress=False)


def test_a_model_on_another_device_than_the_data_is_handled(clean: CleanData) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no second device on this machine")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4).cuda()
    result = purify(
        model, clean, RNP(unlearning=Unlearning(missed="flag", epochs=1)), progress=False
    )
    assert next(result.model.parameters()).is_cuda


def test_accuracy_is_what_evaluation_says(model: nn.Module, clean: CleanData) -> None:
    result = purify(model, clean, QUICK, selector=LowestCount(0), progress=False)
    assert result.accuracy is not None
    assert result.accuracy.drop == 0
    assert accuracy(model, clean.images, clean.targets) == accuracy(
        result.model, clean.images, clean.targets
    )


# ---- what is on record, and what is refused ------------------------------------------------------


def test_a_run_can_be_repeated_from_its_record(model: nn.Module, clean: CleanData) -> None:
    how = Compute(precision="bfloat16", micro_batch=16)
    result = purify(
        model, clean, "magnitude", selector=LowestCount(3), shares=(0.5, 0.3, 0.2), compute=how,
        progress=False,
    )  # fmt: skip
    given = result.to_dict()["given"]
    assert given["shares"] == [0.5, 0.3, 0.2]
    assert Compute(**given["compute"]) == how
    assert "precision bfloat16, micro" in result.to_markdown()


def test_trained_masks_are_silenced_as_they_were_trained(
    model: nn.Module, clean: CleanData
) -> None:
    """gamma alone, as published, unless something else is asked for."""
    masks = ANP(ranking=MaskTraining(steps=2, batch_size=32), alpha=0.2)
    given = {"selector": LowestCount(3), "progress": False}
    assert purify(model, clean, masks, **given).silencing == "constant"
    assert purify(model, clean, masks, silencing="zero", **given).silencing == "zero"
    assert purify(model, clean, QUICK, **given).silencing == "zero"


@pytest.mark.parametrize("selector", [Outlier(), BelowThreshold(0.2)])
def test_thresholds_on_scores_that_only_rank_are_refused(
    model: nn.Module, clean: CleanData, selector: Selector
) -> None:
    with pytest.raises(DataError, match="in which order neurons should go"):
        purify(model, clean, QUICK, selector=selector, progress=False)


@pytest.mark.parametrize("given", [{"method": ANP}, {"selector": LowestCount}])
def test_a_class_where_one_of_it_is_expected(
    model: nn.Module, clean: CleanData, given: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match=r"got a class; make it: (ANP\(\)|LowestCount\(\.\.\.\))"):
        purify(model, clean, progress=False, **given)


def test_shares_are_three(model: nn.Module, clean: CleanData) -> None:
    with pytest.raises(DataError, match="shares for scoring, selecting and measuring"):
        purify(model, clean, QUICK, shares=(0.5, 0.5), progress=False)  # type: ignore[arg-type]


def brightness() -> nn.Module:
    """Says of an image to which of 0, 1, 2, 3 its mean is nearest."""
    model = nn.Sequential(
        nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 4)
    )
    classes = torch.arange(4.0)
    with torch.no_grad():
        model[0].weight.fill_(1 / 3)  # type: ignore[union-attr,operator]
        model[0].bias.zero_()  # type: ignore[union-attr,operator]
        model[3].weight.copy_(classes[:, None].expand(4, 2))  # type: ignore[union-attr,operator]
        model[3].bias.copy_(-classes.square())  # type: ignore[union-attr,operator]
    return model.eval()


def test_labels_in_another_order_are_refused_before_any_work(clean: CleanData) -> None:
    right = purify(brightness(), clean, "magnitude", selector=LowestCount(0), progress=False)
    assert right.accuracy is not None and right.accuracy.before.value == 1
    wrong = CleanData(clean.images, (clean.targets + 1) % 4)
    with pytest.raises(DataError, match="not in the order of the model's classes"):
        purify(brightness(), wrong, QUICK, progress=False)


@pytest.mark.parametrize(("flipped", "said"), [(0.0, False), (0.3, False), (1.0, True)])
def test_a_model_that_may_have_guessed_is_said_to(
    clean: CleanData, flipped: float, said: bool
) -> None:
    draw = torch.Generator().manual_seed(3)
    random = torch.randint(4, (120,), generator=draw)
    labels = torch.where(torch.rand(120, generator=draw) < flipped, random, clean.targets)
    result = purify(
        brightness(),
        CleanData(clean.images, labels),
        "magnitude",
        selector=LowestCount(1),
        progress=False,
    )
    assert ("may be that of guessing" in result.summary()) is said
    assert ("may be that of guessing" in result.to_dict()["limits"][0]) is said


def test_a_selector_without_labels_can_look_at_images(model: nn.Module, clean: CleanData) -> None:
    class Agreeing(Selector):
        def __call__(self, scores: ChannelScores, held_out: HeldOut | None = None) -> Selection:
            assert held_out is not None
            same = held_out.predict(lowest(scores, 0), held_out.clean.images)
            assert len(same) == len(held_out.clean) > 0
            return lowest(scores, 2, "two of them")

    result = purify(
        model, CleanData(clean.images), "magnitude", selector=Agreeing(), progress=False
    )
    assert len(result.selection) == 2
