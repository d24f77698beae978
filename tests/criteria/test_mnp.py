"""Checks of the reconstruction of MNP against its specification."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.images import generator, noise_images
from helpers.networks import build
from helpers.states import assert_same_state, state_of
from nnprune_backdoor import CleanData
from nnprune_backdoor.attacks import train_classifier
from nnprune_backdoor.core.masks import MaskedModel, silence_
from nnprune_backdoor.core.norms import use_statistics_
from nnprune_backdoor.core.sites import Site, find_sites
from nnprune_backdoor.criteria import MNP, RNP, MaskTraining, Response, Unlearning, rnp
from nnprune_backdoor.criteria.mnp import magnitudes, tie_free
from nnprune_backdoor.criteria.parts.response import loss_gradient, response_scores, sensitivity
from nnprune_backdoor.errors import DataError, ScoringError
from nnprune_backdoor.selectors import BelowThreshold, LowestCount

Sites = tuple[Site, ...]
Masks = tuple[Tensor, Tensor, int]
QUICK = Unlearning(epochs=2, missed="flag", batch_size=32, stop=None)
RANKINGS = [MaskTraining(steps=3, batch_size=32, closed_share=0.1), Response(batch_size=32)]


def damaged(net: nn.Module) -> nn.Module:
    """What suppression leaves, for tests that need not wait for it."""
    model = copy.deepcopy(net)
    with torch.no_grad():
        model.fc.weight.mul_(-0.3)
    return model


def trained_masks(
    net: nn.Module,
    sites: Sites,
    clean: CleanData,
    suppressed: nn.Module,
    *,
    training: dict[str, Any],
    **settings: Any,
) -> Masks:
    ranking = MaskTraining(**{"batch_size": 16, "steps": 4, **training})
    criterion = MNP(ranking=ranking, **settings)
    weights = magnitudes(suppressed, sites)
    parts = criterion.losses(net, suppressed, sites)
    return criterion.train(ranking, parts, weights, clean, generator(4), progress=False)


# ---- settings -----------------------------------------------------------------------------------


def test_the_reconstruction_says_so_and_takes_the_spec_s_numbers() -> None:
    paper = MNP.paper()
    assert paper.unlearning == Unlearning(
        lr=0.01,
        momentum=0.9,
        milestones=(10,),
        epochs=20,
        check="epoch",
        clip=20.0,
        weight_decay=2 * 2.5e-4,
        batch_size=128,
        stop=None,
    )
    assert paper.ranking == MaskTraining(
        lr=0.2,
        momentum=0.9,
        steps=500,
        statistics="batch",
        batch_size=128,
        closed_below=0.2,
        closed_share=0.1,
    )
    assert (paper.preserve, paper.penalty) == (0.5, 5e-3)
    assert "reconstruction" in MNP.reference
    assert "reconstruction" in str(MNP.__doc__)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"preserve": 1.5}, r"preserve in \[0, 1\], got 1\.5"),
        ({"penalty": -1.0}, "penalty of at least 0, got -1"),
        ({"ranking": "masks"}, "ranking to be Response or MaskTraining, got 'masks'"),
    ],
)
def test_impossible_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        MNP(**setting)


# ---- clean suppression --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mu", [0.0, 0.05])
def test_a_step_of_suppression_ascends_loss_less_mu_times_the_square(
    net: nn.Module, clean: CleanData, mu: float
) -> None:
    net.double()
    unlearning = Unlearning(
        weight_decay=2 * mu,
        batch_size=64,
        lr=0.01,
        momentum=0.0,
        clip=None,
        epochs=1,
        stop=None,
        missed="flag",
    )
    suppressed, _ = unlearning.unlearn(net, clean, generator(), False)
    by_hand = copy.deepcopy(net).requires_grad_(True)
    use_statistics_(by_hand, "batch")
    weights = list(by_hand.parameters())
    objective = F.cross_entropy(by_hand(clean.images.double()), clean.targets)
    objective = objective - mu * sum(weight.square().sum() for weight in weights)
    for got, weight, slope in zip(
        suppressed.parameters(), weights, torch.autograd.grad(objective, weights), strict=True
    ):
        torch.testing.assert_close(got, (weight + 0.01 * slope).detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("classes", "stop"), [(2, 0.5), (3, 0.5), (5, 0.4), (10, 0.2), (99, 0.2)])
def test_the_stop_follows_the_number_of_classes(classes: int, stop: float) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, classes))
    data = CleanData(noise_images(200)[:, :, :1, :1], torch.arange(200) % classes)
    assert MNP().unlearning._stop_for(model, data) == stop
    assert Unlearning(stop=0.3)._stop_for(model, data) == 0.3
    assert RNP().unlearning._stop_for(model, data) == 0.2


@pytest.mark.slow
def test_suppression_takes_the_clean_task_and_leaves_the_backdoor(clean: CleanData) -> None:
    stamped = clean.images.clone()
    stamped[:, :, -4:, -4:] = 4 * (torch.arange(16).reshape(4, 4) % 2 * 2 - 1.0)
    own = clean.targets != 0
    model = build("test_resnet")
    images = torch.cat([clean.images, stamped[own]])
    labels = torch.cat([clean.targets, torch.zeros(int(own.sum()), dtype=torch.long)])
    train_classifier(model, images, labels, epochs=15, batch_size=32, lr=0.05)
    model.requires_grad_(False)
    assert accuracy(model, clean) > 0.9
    assert success(model, stamped[own]) > 0.9
    unlearning = Unlearning(batch_size=32, lr=0.003, stop=None)
    suppressed, details = unlearning.unlearn(model, clean, generator(), False)
    assert details["unlearn_stop_reached"]
    assert accuracy(suppressed, clean) < 0.4
    assert success(suppressed, stamped[own]) > 0.9


def accuracy(model: nn.Module, data: CleanData) -> float:
    with torch.no_grad():
        return float((model(data.images).argmax(1) == data.targets).float().mean())


def success(model: nn.Module, stamped: Tensor) -> float:
    with torch.no_grad():
        return float((model(stamped).argmax(1) == 0).float().mean())


def test_without_batchnorm_suppression_takes_small_bounded_steps(net: nn.Module) -> None:
    bold = Unlearning(lr=0.1, clip=None)
    assert bold.careful(net) is bold
    careful = bold.careful(build("test_vit"))
    assert (careful.lr, careful.clip) == (1e-3, 1.0)
    timid = Unlearning(lr=1e-5, clip=0.1)
    assert timid.careful(build("test_convnext")) == timid


# ---- magnitudes ---------------------------------------------------------------------------------


def test_magnitudes_are_filter_norms_in_units_of_their_layer(net: nn.Module, sites: Sites) -> None:
    sizes = [site.channels for site in sites]
    for site, found in zip(sites, magnitudes(net, sites).split(sizes), strict=True):
        filters = net.get_submodule(site.producer).weight
        bare = torch.stack([each.norm(p=1) for each in filters.flatten(1)])
        torch.testing.assert_close(found, bare / bare.mean())
        assert abs(found.mean() - 1) < 1e-5


def test_a_layer_s_scale_does_not_matter(net: nn.Module, sites: Sites) -> None:
    before = magnitudes(net, sites)
    with torch.no_grad():
        for site in sites[:3]:
            net.get_submodule(site.producer).weight.mul_(7)
    torch.testing.assert_close(magnitudes(net, sites), before)


def test_magnitudes_of_any_architecture(any_model: nn.Module) -> None:
    sites = find_sites(any_model, noise_images(2))
    found = magnitudes(any_model, sites)
    assert found.shape == (sum(site.channels for site in sites),)
    assert torch.isfinite(found).all()
    assert (found >= 0).all()


# ---- the joint objective ------------------------------------------------------------------------


def test_masks_of_one_give_both_bare_models_and_are_shared(
    net: nn.Module, sites: Sites, clean: CleanData
) -> None:
    other = damaged(net)
    (a, original), (b, suppressed) = MNP(preserve=0.3).losses(net, other, sites)
    assert (a, b) == (0.3, 0.7)
    assert original.masks is suppressed.masks
    with torch.no_grad():
        assert torch.equal(original(clean.images), net(clean.images))
        assert torch.equal(suppressed(clean.images), other(clean.images))


@pytest.mark.parametrize(
    ("settings", "used"),
    [({"preserve": 1.0}, [0]), ({"preserve": 0.0}, [1])],
)
def test_a_loss_of_no_weight_is_not_computed(
    net: nn.Module, sites: Sites, settings: dict[str, Any], used: list[int]
) -> None:
    both = [net, damaged(net)]
    parts = MNP(**settings).losses(both[0], both[1], sites)
    assert [masked.model for _, masked in parts] == [both[i] for i in used]
    assert [weight for weight, _ in parts] == [1.0]


def test_the_penalty_s_slope_is_lambda_times_magnitude(
    net: nn.Module, sites: Sites, clean: CleanData
) -> None:
    pulls = []
    for penalty in (0.0, 0.02):
        criterion = MNP(penalty=penalty)
        parts = criterion.losses(net, damaged(net), sites)
        weights = magnitudes(net, sites)
        pulls.append(criterion.pull(Response(), parts, weights, clean, generator()).double())
    torch.testing.assert_close(
        pulls[1] - pulls[0], 0.02 * weights.double(), rtol=1e-4, atol=1e-6 * float(weights.max())
    )


def test_masks_follow_the_gradient_of_all_three_terms(
    net: nn.Module, sites: Sites, clean: CleanData
) -> None:
    other = damaged(net)
    got, _, steps = trained_masks(
        net, sites, clean, other, training={"lr": 0.1}, preserve=0.3, penalty=0.01
    )
    assert steps == 4
    parts = [MaskedModel(net, sites), MaskedModel(other, sites)]
    parts[1].masks = masks = parts[0].masks
    weights, speed = magnitudes(other, sites), torch.zeros_like(masks)
    for part in parts:
        use_statistics_(part.model, "batch")
    for batch in clean.batches(16, generator(4)):
        slopes = [loss_gradient(part, batch) for part in parts]
        speed = 0.9 * speed + 0.3 * slopes[0] + 0.7 * slopes[1] + 0.01 * weights
        with torch.no_grad():
            masks.sub_(0.1 * speed).clamp_(0, 1)
    torch.testing.assert_close(got, masks.detach(), rtol=0, atol=1e-4)
    assert (got < 0.99).sum() > 50


@pytest.mark.slow
def test_without_penalty_and_preserving_it_is_rnp(
    net: nn.Module, sites: Sites, clean: CleanData, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = damaged(net)
    got, _, _ = trained_masks(
        net, sites, clean, other, training={"steps": 8}, preserve=0.0, penalty=0.0
    )
    training, masked = MaskTraining(epochs=2, batch_size=16), MaskedModel(damaged(net), sites)
    monkeypatch.setattr(rnp, "LOSS_WEIGHT", 1.0)
    assert torch.equal(got, RNP().train(training, masked, clean, generator(4), False)[0])
    assert (got < 0.99).sum() > 50
    quick: dict[str, Any] = {
        "unlearning": replace(QUICK, stop=0.2, lr=0.01),
        "ranking": Response(batch_size=32),
    }
    mnp = MNP(preserve=0.0, penalty=0.0, **quick)(net, clean)
    torch.testing.assert_close(mnp.flat, RNP(**quick)(net, clean).flat)


def test_a_large_penalty_closes_every_neuron(
    net: nn.Module, sites: Sites, clean: CleanData
) -> None:
    masks, closed_at, _ = trained_masks(net, sites, clean, net, training={"steps": 2}, penalty=1e4)
    assert torch.equal(masks, torch.zeros_like(masks))
    assert torch.equal(closed_at, torch.ones_like(masks))


@pytest.mark.slow
def test_the_run_stops_once_enough_neurons_are_closed(
    net: nn.Module, sites: Sites, clean: CleanData
) -> None:
    stop = {"closed_share": 0.1, "steps": 40}
    masks, _, steps = trained_masks(net, sites, clean, net, training=stop, penalty=0.1)
    assert 1 < steps < 40
    assert (masks < 0.2).float().mean() >= 0.1
    earlier = {**stop, "steps": steps - 1}
    before, _, _ = trained_masks(net, sites, clean, net, training=earlier, penalty=0.1)
    assert (before < 0.2).float().mean() < 0.1


def test_what_nothing_defends_closes_and_what_the_clean_task_needs_stays() -> None:
    """Planted: large filters that nobody reads, and the one that tells bright from dark."""
    torch.manual_seed(0)
    labels = torch.arange(64) % 2
    images = 0.3 * noise_images(64)[:, :1, :8, :8] + (2.0 * labels - 1)[:, None, None, None]
    conv, norm, head = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 2)
    large, middle, small, needed = range(4)
    with torch.no_grad():
        for channel, size in ((large, 3.0), (middle, 1.5), (small, 0.7), (needed, 3.0)):
            conv.weight[channel] *= size / conv.weight[channel].abs().sum()
        conv.weight[needed] = 1 / 3
        head.weight.zero_()
        head.weight[:, needed] = torch.tensor([-4.0, 4.0])
        head.bias.copy_(torch.tensor([2.0, -2.0]))
    model = nn.Sequential(conv, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    data, model = CleanData(images, labels), model.eval().requires_grad_(False)
    sites = find_sites(model, images[:2])
    weights = magnitudes(model, sites)
    training = MaskTraining(batch_size=32, steps=170)
    criterion = MNP(ranking=training, penalty=1e-2, preserve=1.0)
    parts = criterion.losses(model, model, sites)
    masks, closed_at, _ = criterion.train(
        training, parts, weights, data, generator(), progress=False
    )
    assert weights[large] == pytest.approx(float(weights[needed]))
    assert closed_at[large] < closed_at[middle] < closed_at[small] < torch.inf
    assert closed_at[large] == closed_at.min()
    assert masks[needed] > 0.9
    for channel in (large, middle, small):
        # momentum takes a few steps to reach the speed of lr lambda M / (1 - momentum)
        due = (1 - 0.9) / (0.2 * 1e-2 * float(weights[channel]))
        assert due <= closed_at[channel] <= due + 12
    assert tie_free(masks, closed_at, weights).argsort()[:1] == large


def test_a_gate_on_a_filter_before_batchnorm_would_be_blind(
    net: nn.Module, sites: Sites, clean: CleanData
) -> None:
    """Under batch statistics nothing depends on a filter's scale: the gate must sit on gamma."""
    behind = tuple(
        Site(site.producer, site.channels, "layer", site.producer)
        for site in sites
        if site.kind == "norm"
    )
    use_statistics_(net, "batch")
    on_gamma = loss_gradient(MaskedModel(net, sites), clean).abs().max()
    on_filter = loss_gradient(MaskedModel(net, behind), clean).abs().max()
    assert on_filter < 0.01 * on_gamma


# ---- scores -------------------------------------------------------------------------------------


def test_ties_break_by_the_step_of_closing_then_by_magnitude() -> None:
    masks = torch.tensor([0.0, 0.5, 0.0, 1.0, 0.0, 1.0, 0.1])
    closed_at = torch.tensor([7.0, torch.inf, 3.0, torch.inf, 7.0, torch.inf, 2.0])
    weights = torch.tensor([1.0, 1.0, 0.1, 0.7, 2.0, 1.3, 1.0])
    scores = tie_free(masks, closed_at, weights)
    assert scores.argsort().tolist() == [2, 4, 0, 6, 1, 5, 3]
    assert len(scores.unique()) == 7
    assert torch.equal(scores[[1, 6]], masks[[1, 6]])
    assert (scores[masks == 0] < 0).all()
    assert (scores[masks == 1] > 1).all()


@pytest.mark.slow
def test_scores_of_trained_masks_are_tie_free_and_keep_thresholds(
    net: nn.Module, clean: CleanData
) -> None:
    ranking = MaskTraining(steps=40, closed_share=0.5, batch_size=32)
    criterion = MNP(unlearning=QUICK, ranking=ranking, penalty=0.05)
    flat = (scores := criterion(net, clean)).flat
    assert len(flat.unique()) == len(flat)
    assert (flat < 0).sum() > 10
    chosen = [set(BelowThreshold(at)(scores).neurons) for at in (0.0, 0.2, 0.6, 2.0)]
    assert all(small <= large for small, large in pairwise(chosen))
    assert len(chosen[0]) > 10


@pytest.mark.slow
def test_the_response_is_the_objective_s_pull_over_the_clean_stiffness(
    net: nn.Module, sites: Sites, clean: CleanData
) -> None:
    ranking = Response(batch_size=64, probe_size=8, damping=0.05)
    criterion = MNP(unlearning=QUICK, preserve=1.0, ranking=ranking)
    got = criterion(net, clean).flat
    draws = generator()
    suppressed, _ = criterion.unlearning.unlearn(net, clean, draws, progress=False)
    stiffness = sensitivity(net, clean, sites, draws, probe_size=8)
    (batch,) = clean.batches(64, draws)
    pull = loss_gradient(MaskedModel(net, sites), batch)
    pull = pull + criterion.penalty * magnitudes(suppressed, sites)
    torch.testing.assert_close(got, response_scores(pull, stiffness, 0.05), rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("ranking", RANKINGS)
def test_every_switch_changes_the_scores(net: nn.Module, clean: CleanData, ranking: Any) -> None:
    few = CleanData(clean.images[:20], clean.targets[:20])
    base = MNP(unlearning=replace(QUICK, lr=0.01, epochs=1), ranking=ranking, penalty=0.05)
    plain = base(net, few).flat
    for switch in (
        {"preserve": 0.0},
        {"preserve": 1.0},
        {"penalty": 0.0},
        {"unlearning": replace(base.unlearning, weight_decay=0.2)},
        {"mask_silencing": "zero"},
    ):
        assert not torch.equal(replace(base, **switch)(net, few).flat, plain), switch


@pytest.mark.slow
@pytest.mark.parametrize("ranking", RANKINGS)
def test_labels_matter(net: nn.Module, clean: CleanData, ranking: Any) -> None:
    criterion = MNP(unlearning=QUICK, ranking=ranking)
    some = clean.targets.clone()
    some[:12] = some[:12].roll(1)
    other = CleanData(clean.images, some)
    assert not torch.equal(criterion(net, clean).flat, criterion(net, other).flat)


@pytest.mark.slow
def test_the_product_is_the_original_but_for_the_selected_gammas(
    net: nn.Module, clean: CleanData
) -> None:
    before = state_of(net)
    selection = LowestCount(9)(MNP(unlearning=QUICK, ranking=RANKINGS[0])(net, clean))
    assert_same_state(before, net.state_dict())
    assert all(parameter.grad is None for parameter in net.parameters())
    silence_(net, selection, silencing="constant")
    for name, channels in selection.by_site().items():
        before[f"{name}.weight"][channels] = 0
    assert_same_state(before, net.state_dict())


# ---- any model ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_nfnet", "resnetv2_18"])
def test_models_of_other_norms_are_scored(name: str, ranking: Any) -> None:
    model, images = build(name), noise_images(40)
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[:2] = torch.tensor([0, 9])
    criterion = MNP(unlearning=QUICK, ranking=ranking)
    scores = criterion(model, CleanData(images, labels))
    assert len(scores.flat.unique()) > 0.9 * len(scores.flat)


@pytest.mark.slow
@pytest.mark.parametrize("ranking", RANKINGS)
def test_two_classes_and_greyscale(ranking: Any) -> None:
    torch.manual_seed(0)
    labels = torch.arange(64) % 2
    images = noise_images(64)[:, :1] + (2.0 * labels - 1)[:, None, None, None]
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).append(nn.Linear(8, 2))
    train_classifier(model, images, labels, epochs=10, batch_size=16, lr=0.05)
    data = CleanData(images, labels)
    assert accuracy(model.eval(), data) > 0.9
    scores = MNP(
        unlearning=Unlearning(lr=0.01, batch_size=16, stop=None),
        ranking=replace(ranking, batch_size=16),
    )(model, data)
    assert scores.details["unlearn_stop_reached"]
    assert scores.details["unlearn_steps"] > 0
    assert len(scores.flat.unique()) == 8


def test_divergence_of_suppression_is_reported(net: nn.Module, clean: CleanData) -> None:
    wild = MNP(unlearning=Unlearning(lr=1e30, clip=None, stop=0.0, batch_size=16))
    with pytest.raises(ScoringError, match=r"diverged|NaN or inf"):
        wild(net, clean)


def test_divergence_of_the_masks_is_reported(
    net: nn.Module, sites: Sites, clean: CleanData
) -> None:
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken.fc.bias[0] = torch.inf
    with pytest.raises(ScoringError, match="mask training diverged after 0 steps"):
        trained_masks(net, sites, clean, broken, training={})
