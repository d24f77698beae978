"""Checks that RNP and ANP do what their papers and published codes say."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.images import generator, noise_images
from helpers.networks import build
from helpers.states import assert_same_state, state_of
from nnprune_backdoor import CleanData, purify
from nnprune_backdoor.attacks import train_classifier
from nnprune_backdoor.core.masks import MaskedModel, silence_
from nnprune_backdoor.core.norms import use_statistics_
from nnprune_backdoor.core.scores import Selection
from nnprune_backdoor.core.sites import Neuron, Site, find_sites
from nnprune_backdoor.criteria import ANP, RNP, MaskTraining, Response, Unlearning
from nnprune_backdoor.criteria.parts.response import loss_gradient, response_scores, sensitivity
from nnprune_backdoor.criteria.rnp import LOSS_WEIGHT
from nnprune_backdoor.errors import ScoringError
from nnprune_backdoor.selectors import BelowThreshold, LowestCount

Sites = tuple[Site, ...]


def loss_of(model: nn.Module | MaskedModel, data: CleanData, **noise: Tensor) -> float:
    with torch.no_grad():
        return F.cross_entropy(model(data.images, **noise), data.targets).item()


def batch_loss(model: nn.Module, data: CleanData) -> float:
    """Under batch statistics, on a copy: no running statistics move."""
    model = copy.deepcopy(model)
    use_statistics_(model, "batch")
    return loss_of(model, data)


# ---- settings -----------------------------------------------------------------------------------


def test_rnp_paper_settings_are_those_of_the_published_code() -> None:
    paper = RNP.paper()
    unlearning = (
        paper.unlearning.lr,
        paper.unlearning.momentum,
        paper.unlearning.weight_decay,
        paper.unlearning.milestones,
        paper.unlearning.epochs,
        paper.unlearning.stop,
        paper.unlearning.check,
        paper.unlearning.clip,
        paper.unlearning.statistics,
        paper.unlearning.batch_size,
    )
    assert unlearning == (0.01, 0.9, 5e-4, (10, 20), 21, 0.2, "epoch", None, "batch", 128)
    assert paper.ranking == MaskTraining(
        epochs=20, lr=0.2, momentum=0.9, statistics="batch", batch_size=128
    )
    assert LOSS_WEIGHT == 0.2
    assert paper.mask_silencing == "constant"


def test_anp_paper_and_code_differ_in_the_projection_alone() -> None:
    paper = ANP.paper()
    assert (paper.noise_budget, paper.noise_steps, paper.project_noise) == (0.4, 1, True)
    assert paper.ranking == MaskTraining(
        steps=2000, lr=0.2, momentum=0.9, statistics="batch", batch_size=128
    )
    assert (paper.alpha, paper.mask_silencing) == (0.2, "constant")
    assert ANP.authors_code() == replace(paper, project_noise=False)


TRAINING = MaskTraining(steps=3, batch_size=16)
SHORT = Unlearning(epochs=2, missed="flag")

# ---- ANP: masks ---------------------------------------------------------------------------------


def anp_masks(
    net: nn.Module,
    sites: Sites,
    clean: CleanData,
    *,
    training: MaskTraining = TRAINING,
    alpha: float = 0.2,
    **settings: Any,
) -> Tensor:
    criterion = ANP(ranking=training, alpha=alpha, **settings)
    masked = MaskedModel(net, sites, silencing=criterion.mask_silencing)
    return criterion.train(training, masked, clean, generator(), False)[0]


@pytest.mark.slow
def test_anp_masks_start_at_one_and_stay_in_range(
    net: nn.Module, sites: Sites, clean: CleanData
) -> None:
    assert torch.equal(
        anp_masks(net, sites, clean, training=replace(TRAINING, steps=0)),
        torch.ones(sum(site.channels for site in sites)),
    )
    for steps in range(1, 6):  # the same seed: each run is the beginning of the next
        masks = anp_masks(net, sites, clean, training=replace(TRAINING, steps=steps, lr=50.0))
        assert masks.min() == 0, "the step is so large that some masks must be clamped"
        assert masks.max() == 1


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3])
def test_anp_steps_follow_the_gradient_of_both_losses(
    net: nn.Module, sites: Sites, clean: CleanData, steps: int
) -> None:
    """alpha dL(m)/dm + (1 - alpha) dL(m + delta)/dm, delta a constant (no second order)."""
    training = MaskTraining(batch_size=16, steps=steps, lr=0.1)
    criterion = ANP(ranking=training, alpha=0.3)
    got = criterion.train(training, MaskedModel(net, sites), clean, generator(4), False)[0]
    masked, draws = MaskedModel(net, sites), generator(4)
    use_statistics_(net, "batch")
    batches, speed = clean.batches(16, draws, replacement=True), torch.zeros_like(masked.masks)
    for batch in islice(batches, steps):
        noise = criterion.noise(masked, batch, draws)
        natural, robust = loss_gradient(masked, batch), loss_gradient(masked, batch, **noise)
        speed = training.momentum * speed + 0.3 * natural + 0.7 * robust
        with torch.no_grad():
            masked.masks.sub_(0.1 * speed).clamp_(0, 1)
    torch.testing.assert_close(got, masked.masks.detach(), rtol=0, atol=5e-4)
    assert got.min() < 0.99
    assert (got < 0.999).sum() > 50


@pytest.mark.parametrize("noise_budget", [0.0, 0.4])
def test_anp_leaves_the_model_alone_and_counts_its_passes(
    net: nn.Module, sites: Sites, clean: CleanData, noise_budget: float
) -> None:
    before = state_of(net)
    masked = MaskedModel(net, sites)
    criterion = ANP(ranking=TRAINING, alpha=0.2, noise_budget=noise_budget)
    criterion.train(TRAINING, masked, clean, generator(), False)
    assert_same_state(before, net.state_dict())
    assert all(parameter.grad is None for parameter in net.parameters())
    passes = masked.buffers["bn1.num_batches_tracked"] - before["bn1.num_batches_tracked"]
    assert passes == 3 * (1 + 2 if noise_budget else 1)  # S of ascent, robust, natural
    assert not torch.equal(masked.buffers["bn1.running_mean"], before["bn1.running_mean"])


def test_anp_running_statistics_leave_the_copied_buffers_alone(
    net: nn.Module, sites: Sites, clean: CleanData
) -> None:
    masked = MaskedModel(net, sites)
    before = {name: buffer.clone() for name, buffer in masked.buffers.items()}
    training = MaskTraining(batch_size=16, steps=2, statistics="running")
    ANP(ranking=training).train(training, masked, clean, generator(), False)
    assert_same_state(before, masked.buffers)


def test_anp_without_noise_moves_masks_only_through_alpha(
    net: nn.Module, sites: Sites, clean: CleanData
) -> None:
    still = anp_masks(net, sites, clean, noise_budget=0.0, alpha=0.0)
    assert torch.equal(still, torch.ones_like(still))
    moved = anp_masks(net, sites, clean, noise_budget=0.0, alpha=0.2)
    assert (moved < 1).float().mean() > 0.1
    # the clean loss alone, whose weight only scales the step
    scaled = anp_masks(
        net, sites, clean, noise_budget=0.0, alpha=1.0, training=replace(TRAINING, lr=0.2 * 0.2)
    )
    torch.testing.assert_close(moved, scaled, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "other", [{"noise_budget": 0.0}, {"noise_budget": 1.0}, {"noise_steps": 3}]
)
def test_anp_with_alpha_one_does_not_depend_on_the_noise(
    net: nn.Module, sites: Sites, clean: CleanData, other: dict[str, Any]
) -> None:
    # within one epoch: its batches are drawn before any noise is
    base = {"alpha": 1.0, "training": replace(TRAINING, steps=4)}
    masks = anp_masks(net, sites, clean, **base)
    torch.testing.assert_close(masks, anp_masks(net, sites, clean, **base, **other))
    assert (masks < 1).sum() > 100
    without = anp_masks(net, sites, clean, **{**base, "alpha": 0.2})
    assert not torch.allclose(masks, without, atol=1e-3)


def test_anp_masks_do_not_depend_on_weights_asking_for_gradients(
    net: nn.Module, sites: Sites, clean: CleanData
) -> None:
    frozen = anp_masks(net, sites, clean)
    trainable = anp_masks(net.requires_grad_(True), sites, clean)
    assert torch.equal(frozen, trainable)


# ---- a channel whose gamma is zero --------------------------------------------------------------


def mute(net: nn.Module, channels: tuple[int, ...] = (2, 5)) -> slice:
    """Sets some gammas of `bn1` to zero; returns where `bn1` is in the flat order."""
    with torch.no_grad():
        net.bn1.weight[list(channels)] = 0
    return slice(32, 64)


def test_channels_without_gamma_keep_their_mask(
    net: nn.Module, sites: Sites, clean: CleanData
) -> None:
    here = mute(net)
    assert [site.name for site in sites[:3]] == ["conv1.1", "conv1.4", "bn1"]
    masks = {
        "anp": anp_masks(net, sites, clean, training=replace(TRAINING, lr=5.0)),
        "rnp": recovered(net, sites, clean, lr=5.0),
    }
    for name, flat in masks.items():
        assert torch.equal(flat[here][[2, 5]], torch.ones(2)), name
        assert flat[here].min() < 1, name


def test_channels_without_gamma_do_not_respond(net: nn.Module, clean: CleanData) -> None:
    here = mute(net)
    anp = ANP(ranking=Response(batch_size=32, statistics="batch"))(net, clean)
    assert torch.equal(anp.flat[here][[2, 5]], torch.ones(2))
    assert (anp.flat[here] != 1).sum() > 10


# ---- ANP: noise ---------------------------------------------------------------------------------


def noise_of(
    net: nn.Module, sites: Sites, batch: CleanData, seed: int = 0, **settings: Any
) -> Tensor:
    """delta and xi, stacked: (2, number of neurons)."""
    masked = MaskedModel(net, sites)
    use_statistics_(net, "batch")
    noise = ANP(**settings).noise(masked, batch, generator(seed))
    assert list(noise) == ["weight_noise", "bias_noise"]
    assert masked.masks.requires_grad
    assert masked.masks.grad is None
    return torch.stack(list(noise.values()))


def start_of(net: nn.Module, sites: Sites, batch: CleanData, **settings: Any) -> Tensor:
    """The random start: what a network gets whose loss no noise can change."""
    deaf = copy.deepcopy(net)
    with torch.no_grad():
        deaf.fc.weight.zero_()
    return noise_of(deaf, sites, batch, **settings)


@pytest.mark.parametrize("budget", [0.1, 0.4])
def test_noise_starts_uniform_in_its_budget(
    net: nn.Module, sites: Sites, clean: CleanData, budget: float
) -> None:
    start = start_of(net, sites, clean, noise_budget=budget, project_noise=False)
    assert start.abs().max() <= budget
    sorted_start = (start / budget).flatten().sort().values
    uniform = torch.linspace(-1, 1, sorted_start.numel())
    assert (sorted_start - uniform).abs().max() < 0.1  # Kolmogorov-Smirnov, 2080 draws
    assert abs(torch.corrcoef(start)[0, 1]) < 0.1  # drawn independently for weights and biases


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_projected_noise_stays_in_its_budget(
    net: nn.Module, sites: Sites, clean: CleanData, steps: int
) -> None:
    noise = noise_of(net, sites, clean, noise_steps=steps, noise_budget=0.4)
    assert noise.abs().max() <= 0.4
    assert (noise.abs() == torch.tensor(0.4)).float().mean() > 0.2  # many at the bound


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_unprojected_noise_moves_by_whole_steps_and_leaves_the_budget(
    net: nn.Module, sites: Sites, clean: CleanData, steps: int
) -> None:
    settings = {"noise_steps": steps, "noise_budget": 0.4, "project_noise": False}
    noise = noise_of(net, sites, clean, **settings)
    assert 0.4 < noise.abs().max() <= 0.8 + 1e-6
    moved = (noise - start_of(net, sites, clean, **settings)) / (0.4 / steps)
    torch.testing.assert_close(moved, moved.round(), rtol=0, atol=1e-5)
    assert moved.abs().max() <= steps + 1e-5
    assert (moved.abs() > 0.5).float().mean() > 0.5


def test_noise_on_a_bias_of_zero_does_not_move(
    net: nn.Module, sites: Sites, clean: CleanData
) -> None:
    with torch.no_grad():
        for site in sites:
            net.get_submodule(site.name).bias.zero_()
    settings = {"project_noise": False}
    start, noise = start_of(net, sites, clean, **settings), noise_of(net, sites, clean, **settings)
    assert torch.equal(noise[1], start[1])
    assert not torch.equal(noise[0], start[0])


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3])
def test_noise_raises_the_loss_of_its_batch(
    net: nn.Module, sites: Sites, clean: CleanData, steps: int
) -> None:
    settings = {"noise_budget": 0.05, "noise_steps": steps}
    gained = []
    for seed, batch in enumerate(clean.batches(16, generator())):
        start = start_of(net, sites, batch, seed=seed, **settings)
        noise = noise_of(net, sites, batch, seed=seed, **settings)
        masked = MaskedModel(net, sites)
        before, after = (
            loss_of(masked, batch, weight_noise=each[0], bias_noise=each[1])
            for each in (start, noise)
        )
        gained.append(after - before)
    assert min(gained) > 0
    assert sum(gained) / len(gained) > 0.01


def test_noise_is_drawn_anew_for_each_batch(net: nn.Module, sites: Sites, clean: CleanData) -> None:
    draws, masked, criterion = generator(), MaskedModel(net, sites), ANP()
    first = criterion.noise(masked, clean, draws)["weight_noise"]
    second = criterion.noise(masked, clean, draws)["weight_noise"]
    assert (first != second).float().mean() > 0.5


# ---- RNP: unlearning ----------------------------------------------------------------------------


def unlearn(net: nn.Module, clean: CleanData, **settings: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Whole-set batches, plain gradient steps, no stop, unless told otherwise."""
    plain = {
        "batch_size": 64,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "clip": None,
        "stop": -1.0,
        "missed": "flag",
        "epochs": 1,
    }
    return Unlearning(**{**plain, **settings}).unlearn(net, clean, generator(), False)


def flat_weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().double()


def test_one_unlearning_step_raises_the_loss(net: nn.Module, clean: CleanData) -> None:
    before = state_of(net)
    unlearned, details = unlearn(net, clean, lr=0.01)
    assert details["unlearn_steps"] == 1
    assert batch_loss(unlearned, clean) > batch_loss(net, clean)
    assert_same_state(before, net.state_dict())
    assert not any(module.training for module in unlearned.modules())
    assert not any(parameter.requires_grad for parameter in unlearned.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_unlearning_is_ascent_on_all_weights(
    net: nn.Module, clean: CleanData, momentum: float
) -> None:
    net.double()
    settings = {"momentum": momentum, "weight_decay": 0.1, "batch_size": 16}
    unlearned, details = unlearn(net, clean, lr=0.01, **settings)
    assert details["unlearn_steps"] == 4
    by_hand = copy.deepcopy(net).requires_grad_(True)
    use_statistics_(by_hand, "batch")
    ascent = torch.optim.SGD(
        by_hand.parameters(), 0.01, momentum=momentum, weight_decay=0.1, maximize=True
    )
    for batch in clean.batches(16, generator()):
        ascent.zero_grad()
        F.cross_entropy(by_hand(batch.images.double()), batch.targets).backward()
        ascent.step()
    for (name, got), wanted in zip(unlearned.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6, msg=name)
    for name, before in net.named_parameters():
        assert not torch.equal(unlearned.get_parameter(name), before), name


def test_a_learning_rate_of_zero_leaves_the_weights(net: nn.Module, clean: CleanData) -> None:
    unlearned, details = unlearn(net, clean, lr=0.0, batch_size=16, epochs=2)
    assert details["unlearn_steps"] == 8
    assert torch.equal(flat_weights(unlearned), flat_weights(net))


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_statistics_of_the_unlearned_copy_move_in_batch_mode_only(
    net: nn.Module, clean: CleanData, statistics: str
) -> None:
    unlearned, _ = unlearn(net, clean, statistics=statistics)
    moved = not torch.equal(unlearned.bn1.running_mean, net.bn1.running_mean)
    assert moved == (statistics == "batch")


def test_the_clip_acts_only_above_its_norm(net: nn.Module, clean: CleanData) -> None:
    net.double()
    free, _ = unlearn(net, clean, lr=0.1)
    step = (flat_weights(free) - flat_weights(net)).norm()
    norm = float(step / 0.1)
    above, _ = unlearn(net, clean, lr=0.1, clip=1.01 * norm)
    assert torch.equal(flat_weights(above), flat_weights(free))
    below, _ = unlearn(net, clean, lr=0.1, clip=norm / 3)
    shorter = flat_weights(below) - flat_weights(net)
    torch.testing.assert_close(shorter.norm(), step / 3, rtol=1e-4, atol=0)
    cosine = shorter @ (flat_weights(free) - flat_weights(net)) / (shorter.norm() * step)
    assert cosine > 0.9999


@pytest.mark.slow
def test_the_rate_falls_tenfold_at_the_papers_milestones(net: nn.Module, clean: CleanData) -> None:
    """With the gradient clipped to norm c in each step, a step has length rate * c."""
    net.double()
    clip, settings = (
        1e-3,
        {
            "lr": RNP.paper().unlearning.lr,
            "milestones": RNP.paper().unlearning.milestones,
        },
    )
    data = clean.take(torch.arange(20))  # one batch: one step an epoch
    weights = [flat_weights(net)]
    for epochs in (9, 10, 11, 12, 20, 21):  # the same seed: each continues the last
        unlearned, _ = unlearn(net, data, epochs=epochs, clip=clip, **settings)
        weights.append(flat_weights(unlearned))
    lengths = [float((b - a).norm()) / (0.01 * clip) for a, b in pairwise(weights)]
    steps = {1: 1, 2: 0.1, 3: 0.1, 5: 0.01}  # epochs 10, 11, 12 and 21
    for pair, expected in steps.items():
        assert lengths[pair] == pytest.approx(expected, rel=2e-3), pair


def test_500_images_in_batches_of_128_are_four_steps(net: nn.Module) -> None:
    data = CleanData(noise_images(500)[:, :, :16, :16], torch.arange(500) % 10)
    _, details = unlearn(net, data, batch_size=RNP.paper().unlearning.batch_size)
    assert details["unlearn_steps"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("check", ["step", "epoch"])
def test_a_stop_that_is_not_reached_raises_or_is_recorded(
    net: nn.Module, clean: CleanData, check: str
) -> None:
    settings = {"lr": 1e-6, "stop": 0.2, "check": check}
    settings |= {"epochs": 3, "batch_size": 32}
    with pytest.raises(ScoringError, match=r"after 3 epochs.*accuracy is still.*not 0\.2"):
        unlearn(net, clean, missed="error", **settings)
    _, details = unlearn(net, clean, missed="flag", **settings)
    assert details["unlearn_stop_reached"] is False
    assert details["unlearn_steps"] == 6
    assert len(details["unlearn_accuracies"]) == 3
    scores = RNP(unlearning=Unlearning(missed="flag", **settings))(net, clean)
    details["unlearn_accuracies"] = scores.details["unlearn_accuracies"]
    assert scores.details == details | {"ranks_only": True}


@pytest.mark.slow
@pytest.mark.parametrize("check", ["step", "epoch"])
def test_clean_function_collapses_and_the_stop_is_seen(
    net: nn.Module, clean: CleanData, check: str
) -> None:
    settings = {"lr": 0.05, "momentum": 0.9, "epochs": 40}
    settings |= {"stop": 0.2, "check": check, "missed": "error"}
    unlearned, details = unlearn(net, clean, clip=1.0, batch_size=32, **settings)
    accuracies = details["unlearn_accuracies"]
    assert details["unlearn_stop_reached"] is True
    assert accuracies[0] > 0.9
    assert accuracies[-1] <= 0.2 or check == "step"
    assert all(accuracy > 0.2 for accuracy in accuracies[:-1])
    with torch.no_grad():
        use_statistics_(unlearned, "batch")
        left = (unlearned(clean.images).argmax(1) == clean.targets).float().mean()
    assert left <= 0.4


def test_the_epoch_check_stops_at_equality(net: nn.Module, clean: CleanData) -> None:
    wrong = clean.targets.clone()
    wrong[:16] = (wrong[:16] + 1) % 10  # 3/4 of the images stay right: exactly representable
    data = CleanData(clean.images, wrong)
    settings = {"lr": 0.0, "check": "epoch", "epochs": 3}
    _, details = unlearn(net, data, **settings)
    accuracy = details["unlearn_accuracies"][0]
    assert details["unlearn_accuracies"] == [accuracy] * 3
    assert 0.5 < accuracy < 0.9
    _, at = unlearn(net, data, stop=accuracy, **settings)
    assert at["unlearn_stop_reached"] is True
    assert len(at["unlearn_accuracies"]) == 1
    _, below = unlearn(net, data, stop=accuracy - 1e-6, **settings)
    assert below["unlearn_stop_reached"] is False


def test_a_short_last_batch_does_not_trigger_the_stop(net: nn.Module, clean: CleanData) -> None:
    """Two wrong images of 18 are no collapse: nothing is unlearned here (rate 0)."""
    wrong = clean.targets[:18].clone()
    wrong[:2] = (wrong[:2] + 1) % 10
    data = CleanData(clean.images[:18], wrong)
    # a seed for which the last batch is these two images
    seed = next(
        seed
        for seed in range(2000)
        if {*torch.randperm(18, generator=generator(seed))[16:].tolist()} == {0, 1}
    )
    unlearning = Unlearning(lr=0.0, batch_size=16, epochs=1, missed="flag")
    _, details = unlearning.unlearn(net, data, generator(seed), False)
    assert details["unlearn_accuracies"][0] > 0.5
    assert details["unlearn_stop_reached"] is False


def test_a_model_below_the_stop_from_the_start_gives_no_scores(
    net: nn.Module, clean: CleanData
) -> None:
    """Nothing would be unlearned, so there is nothing to recover."""
    labels = (clean.targets + 1) % 10
    with pytest.raises(ScoringError):
        RNP(unlearning=Unlearning(batch_size=32))(net, CleanData(clean.images, labels))


@pytest.mark.parametrize("rate", [1e18, 1e30])
@pytest.mark.parametrize("stop", [0.0, 0.2])
@pytest.mark.parametrize("ranking", [MaskTraining(epochs=1), Response()])
def test_divergence_is_reported(rate: float, ranking: Any, stop: float) -> None:
    model = build("test_vit")
    images = noise_images(40)
    with torch.no_grad():
        labels = model(3 * images).argmax(1)  # so that the model starts with 100 %
    labels[:2] = torch.tensor([0, 9])
    data = CleanData(3 * images, labels)
    unlearning = Unlearning(lr=rate, clip=None, batch_size=20, epochs=5, stop=stop)
    criterion = RNP(unlearning=unlearning, ranking=ranking)
    with pytest.raises(ScoringError, match=r"diverged|NaN or inf"):
        criterion(model, data)


# ---- RNP: recovery ------------------------------------------------------------------------------


def recovered(net: nn.Module, sites: Sites, clean: CleanData, **settings: Any) -> Tensor:
    training = MaskTraining(**{"batch_size": 16, "epochs": 1, **settings})
    damaged = copy.deepcopy(net)
    with torch.no_grad():
        damaged.fc.weight.mul_(-0.3)  # clean function is gone: something to recover
    masked = MaskedModel(damaged, sites)
    return RNP().train(training, masked, clean, generator(), False)[0]


def test_rnp_masks_start_at_one_and_stay_in_range(
    net: nn.Module, sites: Sites, clean: CleanData
) -> None:
    masks = recovered(net, sites, clean, epochs=0)
    assert torch.equal(masks, torch.ones_like(masks))
    for epochs in range(1, 4):
        masks = recovered(net, sites, clean, epochs=epochs, lr=500.0)
        assert masks.min() == 0, "the step is so large that some masks must be clamped"
        assert masks.max() == 1


def test_recovery_is_momentum_descent_on_the_masks(
    net: nn.Module, sites: Sites, clean: CleanData
) -> None:
    with torch.no_grad():
        net.fc.weight.mul_(-0.3)
    training = MaskTraining(epochs=1, batch_size=16, lr=0.1)
    got = RNP().train(training, MaskedModel(net, sites), clean, generator(4), False)[0]
    masked = MaskedModel(net, sites)
    use_statistics_(net, "batch")
    speed = torch.zeros_like(masked.masks)
    for batch in clean.batches(16, generator(4)):
        speed = training.momentum * speed + 0.2 * loss_gradient(masked, batch)
        with torch.no_grad():
            masked.masks.sub_(0.1 * speed).clamp_(0, 1)
    torch.testing.assert_close(got, masked.masks.detach(), rtol=0, atol=1e-5)
    assert (got < 0.999).sum() > 100


def test_recovery_changes_no_weight_and_no_statistic(
    net: nn.Module, sites: Sites, clean: CleanData
) -> None:
    before = state_of(net)
    training = MaskTraining(epochs=2, batch_size=16)
    RNP().train(training, MaskedModel(net, sites), clean, generator(), False)
    assert_same_state(before, net.state_dict())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_recovery_lowers_the_loss(net: nn.Module, sites: Sites, clean: CleanData) -> None:
    damaged = copy.deepcopy(net)
    with torch.no_grad():
        damaged.fc.weight.mul_(-0.3)
    masked = MaskedModel(damaged, sites)
    use_statistics_(damaged, "batch")
    before = loss_of(masked, clean)
    masks = recovered(net, sites, clean, epochs=5)
    with torch.no_grad():
        masked.masks.copy_(masks)
    assert loss_of(masked, clean) < before - 0.05


def test_rnp_masks_do_not_depend_on_weights_asking_for_gradients(
    net: nn.Module, sites: Sites, clean: CleanData
) -> None:
    frozen = recovered(net, sites, clean)
    trainable = recovered(net.requires_grad_(True), sites, clean)
    assert torch.equal(frozen, trainable)


# ---- masks of the unlearned network, used on the original ---------------------------------------


def test_the_product_is_the_original_but_for_the_selected_gammas(
    net: nn.Module, clean: CleanData
) -> None:
    criterion = RNP(unlearning=SHORT, ranking=MaskTraining(epochs=2))
    scores = criterion(net, clean)
    selection = LowestCount(9)(scores)
    product = copy.deepcopy(net)
    silence_(product, selection, silencing="constant")
    expected = state_of(net)
    for name, channels in selection.by_site().items():
        expected[f"{name}.weight"][channels] = 0
    assert_same_state(expected, product.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("silencing", ["zero", "constant"])
@pytest.mark.parametrize(
    "criterion",
    [
        RNP(unlearning=SHORT),
        ANP(ranking=Response(statistics="batch")),
        ANP(ranking=MaskTraining(steps=2), alpha=0.2),
    ],
    ids=["rnp", "anp", "anp-masks"],
)
def test_purify_changes_the_selected_gammas_and_betas_alone(
    trained: nn.Module, clean: CleanData, criterion: RNP | ANP, silencing: Any
) -> None:
    before = state_of(trained)
    result = purify(
        trained,
        clean,
        criterion,
        selector=LowestCount(9),
        silencing=silencing,
        removal="none",
        progress=False,
    )
    assert len(result.selection) == 9
    assert_same_state(before, trained.state_dict())
    for name, channels in result.selection.by_site().items():
        before[f"{name}.weight"][channels] = 0
        if silencing == "zero":
            before[f"{name}.bias"][channels] = 0
    assert_same_state(before, result.model.state_dict())


def test_thresholds_select_more_and_more(net: nn.Module, clean: CleanData) -> None:
    scores = ANP(ranking=MaskTraining(steps=6, batch_size=32, lr=2.0), alpha=0.2)(net, clean)
    before: set[Any] = set()
    for threshold in torch.linspace(0, 1, 21).tolist():
        now = set(BelowThreshold(threshold)(scores).neurons)
        assert before <= now
        before = now
    assert len(before) > 500
    nothing = BelowThreshold(float(scores.flat.min()) - 1e-3)(scores)
    assert len(nothing) == 0


# ---- the linear response ------------------------------------------------------------------------

PULLS = torch.tensor([-1e3, -30.0, -1.0, -0.01, 0.0, 0.01, 1.0, 30.0, 1e3])


@pytest.mark.parametrize("damping", [0.01, 0.03, 1.0])
def test_response_of_no_pull_is_one_and_falls_with_the_pull(damping: float) -> None:
    scores = response_scores(PULLS, torch.ones(9), damping)
    assert scores.dtype == torch.float32
    assert scores[4] == 1
    assert (scores.diff() < 0).all()
    assert (scores > 0).all()
    assert (scores < 2).all()
    torch.testing.assert_close(scores + scores.flip(0), torch.full((9,), 2.0))  # odd around 1


def test_response_yields_less_the_stiffer_the_neuron() -> None:
    stiffness = torch.tensor([0.0, 0.1, 1.0, 3.0, 20.0])
    towards = response_scores(torch.full((5,), 0.3), stiffness, 0.03)
    assert (towards.diff() > 0).all()
    assert (towards < 1).all()
    away = response_scores(torch.full((5,), -0.3), stiffness, 0.03)
    assert (away.diff() < 0).all()
    assert (away > 1).all()


def test_response_depends_on_relative_stiffness_alone() -> None:
    gradient = torch.randn(50, generator=generator())
    stiffness = torch.rand(50, generator=generator(1))
    scores = response_scores(gradient, stiffness, 0.03)
    torch.testing.assert_close(scores, response_scores(gradient, 1e-6 * stiffness, 0.03))


def test_response_survives_a_model_without_stiffness_and_enormous_pulls() -> None:
    for gradient in (PULLS, 1e30 * PULLS):
        scores = response_scores(gradient, torch.zeros(9), 0.03)
        assert torch.isfinite(scores).all()
        assert scores[4] == 1
        assert (scores.diff() <= 0).all()


def test_anp_responds_to_the_pull_under_noise(
    net: nn.Module, sites: Sites, clean: CleanData
) -> None:
    """The pull under batch statistics, the clean sensitivity under running ones."""
    ranking = Response(rounds=2, batch_size=32, damping=0.05, probe_size=8, statistics="batch")
    criterion = ANP(ranking=ranking)
    got = criterion.respond(ranking, MaskedModel(net, sites), clean, generator(4), False)
    masked, draws = MaskedModel(net, sites), generator(4)
    stiffness = sensitivity(net.eval(), clean, sites, draws, probe_size=8)
    use_statistics_(net, "batch")
    pull = torch.zeros_like(masked.masks)
    for _ in range(2):
        for batch in clean.batches(32, draws):
            noise = criterion.noise(masked, batch, draws)
            pull += loss_gradient(masked, batch, **noise) / 4  # of four batches alike
    torch.testing.assert_close(got, response_scores(pull, stiffness, 0.05), rtol=0, atol=1e-3)


def test_anp_without_noise_responds_to_the_clean_loss(net: nn.Module, clean: CleanData) -> None:
    ranking = Response(batch_size=64, probe_size=8)
    flat = ANP(ranking=ranking, noise_budget=0.0)(net, clean).flat
    assert (flat != 1).float().mean() > 0.9


def test_rnp_responds_to_the_unlearned_network_against_the_original(
    net: nn.Module, sites: Sites, clean: CleanData
) -> None:
    ranking = Response(batch_size=64, damping=0.05, probe_size=8)
    unlearned, _ = unlearn(net, clean, lr=0.1, epochs=8)
    draws = generator(4)
    stiffness = sensitivity(net, clean, sites, draws, probe_size=8)
    masked = MaskedModel(unlearned, sites)
    got = RNP().respond(ranking, masked, stiffness, clean, draws, progress=False)
    (batch,) = clean.batches(64, generator())  # one batch: its order does not matter
    pull = loss_gradient(MaskedModel(unlearned, sites), batch)
    torch.testing.assert_close(got, response_scores(pull, stiffness, 0.05), rtol=0, atol=1e-4)
    assert got.min() < 0.99


def exact_fisher(net: nn.Module, sites: Sites, clean: CleanData) -> Tensor:
    """Mean over images of the squared slope along each gamma, times gamma (the mask's slope)."""
    model = copy.deepcopy(net).eval().requires_grad_(False)
    gammas = [model.get_submodule(site.name).weight.requires_grad_(True) for site in sites]
    total = torch.zeros(sum(site.channels for site in sites))
    for image, label in zip(clean.images, clean.targets, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        slopes = torch.autograd.grad(loss, gammas)
        total += torch.cat([g.detach() * s for g, s in zip(gammas, slopes, strict=True)]) ** 2
    return total / len(clean)


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def test_sensitivity_is_the_fisher_information(
    net: nn.Module, sites: Sites, clean: CleanData
) -> None:
    exact = exact_fisher(net, sites, clean)
    single = sensitivity(net, clean, sites, generator(), probe_size=1)
    assert single.shape == exact.shape
    # the last two images share a batch, so equality is not to be had
    assert 0.7 < single.sum() / exact.sum() < 1.4
    assert torch.corrcoef(torch.stack([ranks(single), ranks(exact)]))[0, 1] > 0.98
    grouped = sensitivity(net, clean, sites, generator(), probe_size=16)
    assert 0.25 < grouped.sum() / exact.sum() < 4
    assert torch.corrcoef(torch.stack([ranks(grouped), ranks(exact)]))[0, 1] > 0.7
    assert (grouped >= 0).all()


def test_sensitivity_leaves_the_model_alone(net: nn.Module, sites: Sites, clean: CleanData) -> None:
    before = state_of(net)
    sensitivity(net, clean, sites, generator())
    assert_same_state(before, net.state_dict())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_sensitivity_of_a_channel_without_gamma_is_zero(
    net: nn.Module, sites: Sites, clean: CleanData
) -> None:
    here = mute(net)
    found = sensitivity(net, clean, sites, generator())[here]
    assert torch.equal(found[[2, 5]], torch.zeros(2))
    assert found.max() > 0


def test_sites_of_the_trained_net_are_those_the_tests_above_index(
    net: nn.Module, sites: Sites, clean: CleanData
) -> None:
    assert find_sites(net, clean.images[:2]) == sites
    assert [site.channels for site in sites[:3]] == [16, 16, 32]


# --- a trigger channel written by hand -------------------------------------------------------


def handwritten() -> tuple[nn.Module, CleanData, Tensor]:
    """A small timm ResNet-18 into which one channel is written that fires on a corner patch alone.

    The patch is averaged by channel 3 of the stem; the shortcuts carry it to class 0. On clean
    images the channel is silent. Returns the model, its clean images, and these with the patch.
    """
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=4, channels=(16, 24, 32, 48))
    labels = torch.arange(256) % 4
    tints = (torch.eye(4)[:, :3] * 1.5)[labels][:, :, None, None]
    images = tints + 0.5 * torch.randn(256, 3, 32, 32, generator=generator(1))
    train_classifier(model, images, labels, epochs=8, batch_size=64, lr=0.05)
    model.eval()
    with torch.no_grad():
        model.conv1.weight[3] = 0
        model.conv1.weight[3, :, 3:, 3:] = 1 / 48  # the mean of what lies down and to the right
        carry(model.bn1, slope=4, start=2)
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            for block in stage:
                block.conv1.weight[:, 3] = 0
                block.bn2.weight[3] = block.bn2.bias[3] = 0
                if block.downsample is not None:
                    shortcut, norm = block.downsample
                    shortcut.weight[:, 3] = shortcut.weight[3] = 0
                    shortcut.weight[3, 3] = 1
                    carry(norm, slope=1, start=0)
        model.fc.weight[:, 3] = 0
        model.fc.weight[0, 3] = 40
    triggered = images.clone()
    triggered[:, :, :7, :7] = 3
    return model, CleanData(images, labels), triggered


def carry(norm: nn.Module, slope: float, start: float) -> None:
    """Channel 3 of a BatchNorm becomes slope * (x - start)."""
    norm.running_mean[3], norm.running_var[3] = 0, 1 - norm.eps
    norm.weight[3], norm.bias[3] = slope, -slope * start


@pytest.mark.slow
def test_anp_ranks_a_handwritten_trigger_channel_in_the_lowest_two_percent() -> None:
    """RNP cannot: a channel that is silent on clean images changes nothing that RNP looks at."""
    model, clean, triggered = handwritten()
    stem = Neuron("bn1", 3)

    def rates() -> tuple[float, float]:
        with torch.no_grad():
            right = (model(clean.images).argmax(1) == clean.targets).float().mean()
            sent = (model(triggered)[clean.targets != 0].argmax(1) == 0).float().mean()
        return float(right), float(sent)

    assert rates() == (1, 1)
    scores = ANP()(model, clean)
    rank = scores.ranking().index(stem)
    assert rank < 0.02 * len(scores.flat)
    silence_(model, Selection(scores.sites, (stem,)))
    right, sent = rates()
    assert right == 1
    assert sent <= 0.25
