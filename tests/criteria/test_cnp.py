"""Checks that CNP does what its paper and published code say."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.handmade import TAC_QUICK, TRIGGER, Breaks, Handmade, pictures, pixels_of
from helpers.images import generator, noise_images
from helpers.networks import build, planted
from helpers.states import assert_same_state, hooks_of, state_of
from nnprune_backdoor import CleanData
from nnprune_backdoor.core.masks import MaskedModel, silence_
from nnprune_backdoor.core.norms import use_statistics_
from nnprune_backdoor.core.scores import lowest
from nnprune_backdoor.core.sites import Site, find_classifiers, find_sites
from nnprune_backdoor.criteria import CNP, PlateauTraining, Response
from nnprune_backdoor.criteria.cnp import _Views, contrastive_loss
from nnprune_backdoor.criteria.parts.response import response_scores
from nnprune_backdoor.errors import DataError, ScoringError, UnsupportedModelError
from nnprune_backdoor.selectors import LowestFraction

Sites = tuple[Site, ...]
RESPONSE = Response(stages=5, batch_size=16, statistics="batch")
TRAINING = PlateauTraining(steps=3, batch_size=16, check_every=2)
QUICK = CNP(ranking=RESPONSE)


def brighter(images: Tensor) -> Tensor:
    """A stamp: a square in the corner."""
    stamped = images.clone()
    stamped[..., -8:, -8:] = 4.0
    return stamped


def views_of(model: nn.Module, images: Tensor) -> _Views:
    sites, heads = find_sites(model, images[:2]), find_classifiers(model, images[:2])
    return _Views(model, sites, heads, brighter)


# ---- settings -----------------------------------------------------------------------------------


def test_paper_settings_are_those_of_the_published_code() -> None:
    paper = CNP.paper()
    assert (paper.target, paper.candidates, paper.noise_passes) == (None, 1, 5)
    noise = (paper.noise_budget, paper.noise_steps, paper.project_noise)
    assert noise == (0.4, 1, False)
    inversion = (
        paper.inversion,
        paper.inversion_lr,
        paper.inversion_penalty,
        paper.steps,
        paper.batch_size,
        paper.min_success,
    )
    assert inversion == ("authors", 0.005, 0.01, 800, 128, 0.0)
    assert paper.ranking == PlateauTraining(
        steps=1200,
        batch_size=128,
        lr=0.2,
        momentum=0.9,
        statistics="batch",
        least_lr=0.01,
        patience=2,
        check_every=40,
    )
    assert (paper.temperature, paper.mirror) == (0.3, True)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(DataError, match="candidates of at least 1"):
        CNP(candidates=0)
    with pytest.raises(DataError, match="check_every of more than 0"):
        PlateauTraining(steps=1, check_every=0)
    with pytest.raises(DataError, match="both mean and std"):
        CNP(mean=(0.5,))


def test_one_percent_of_a_resnet18_is_48_neurons() -> None:
    sites = find_sites(timm.create_model("resnet18").eval(), noise_images(2))
    assert sum(site.channels for site in sites) == 4800
    assert math.floor(0.01 * 4800) == 48


# ---- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("similarities", "expected"),
    [
        ([0.7] * 6, math.log(6)),
        ([1, 1, 1, 0, 0, 0], 1.133664),
        ([1, 1, 1, -1, -1, -1], 1.099884),
        ([0, 0, 0, 1, 1, 1], math.log(3 + 3 * math.exp(1 / 0.3))),
        ([1, 0.5, 1, 0.5, 0.5, 1], 1.827176),
    ],
)
def test_the_contrastive_loss(similarities: list[float], expected: float) -> None:
    pairs = torch.tensor([similarities] * 3, dtype=torch.float64)
    assert contrastive_loss(pairs, 0.3).item() == pytest.approx(expected, abs=1e-6)


def test_the_contrastive_loss_in_general() -> None:
    pairs = torch.rand(5, 6, generator=generator(), dtype=torch.float64) * 2 - 1
    scaled = pairs / 0.3
    expected = (scaled.logsumexp(1) - scaled[:, :3].mean(1)).mean()
    torch.testing.assert_close(contrastive_loss(pairs, 0.3), expected)


def test_at_masks_of_one_without_noise_the_pairs_are_known(
    net: nn.Module, clean: CleanData
) -> None:
    """(1, c, 1, c, c, 1) with c the similarity of benign and stamped features."""
    views = views_of(net, clean.images)
    loss, recovered = replace(QUICK, noise_budget=0.0).loss(views, clean.images, generator())
    with torch.no_grad():
        plain, logits = views.features(views.original, clean.images)
        stamped, stamped_logits = views.features(views.original, brighter(clean.images))
    c = F.cosine_similarity(plain, stamped)
    one = torch.ones_like(c)
    pairs = torch.stack([one, c, one, c, c, one], 1)
    torch.testing.assert_close(loss, contrastive_loss(pairs, 0.3), rtol=0, atol=1e-5)
    assert c.min() < 0.95
    assert torch.equal(recovered, logits.argmax(1) == stamped_logits.argmax(1))


def test_a_batch_costs_six_forward_passes(net: nn.Module, clean: CleanData) -> None:
    views, passes = views_of(net, clean.images), []
    net.fc.register_forward_hook(lambda *_: passes.append(True))
    QUICK.loss(views, clean.images[:4], generator())
    assert len(passes) == 6


def test_the_loss_is_that_of_six_pairs_under_noise(net: nn.Module, clean: CleanData) -> None:
    """Recomputed with plain calls, at masks other than one."""
    views, images = views_of(net, clean.images), clean.images[:16]
    with torch.no_grad():
        views.masked.masks.copy_(torch.rand(len(views.masked.masks), generator=generator(1)))
    got, _ = QUICK.loss(views, images, generator(2))
    masked, original = views.masked, net
    labels = masked(images).argmax(1)
    noise = QUICK.noise(masked, images, labels, generator(2))

    def z(run: Any, x: Tensor, **noise: Tensor) -> Tensor:
        seen: list[Tensor] = []
        handle = net.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        run(x, **noise)
        handle.remove()
        return seen[0]

    x = brighter(images)
    benign, poisoned = z(original, images), z(original, x)
    pairs = [
        (z(masked, images), benign),
        (z(masked, x), benign),
        (z(masked, images, **noise), benign),
        (z(masked, images, **noise), poisoned),
        (z(masked, images), poisoned),
        (z(masked, x), poisoned),
    ]
    cosines = [(a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)) for a, b in pairs]
    ratios = torch.stack([cosine.div(0.3).exp() for cosine in cosines])
    expected = -(ratios[:3] / ratios.sum(0)).log().mean()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# ---- the views of the model ---------------------------------------------------------------------


def test_masks_of_one_and_noise_of_zero_change_no_bit(any_model: nn.Module) -> None:
    """With and without BatchNorm."""
    images = noise_images(3)
    views = views_of(any_model, images)
    zero = torch.zeros_like(views.masked.masks)
    with torch.no_grad():
        expected = any_model(images)
        for run, noise in (
            (views.original, {}),
            (views.masked, {}),
            (views.masked, {"weight_noise": zero, "bias_noise": zero}),
        ):
            features, logits = views.features(run, images, **noise)
            assert torch.equal(logits, expected)
            assert features.shape[0] == 3
            assert features.dtype == torch.float32


def test_features_are_what_the_classifier_is_given(any_model: nn.Module) -> None:
    images = noise_images(3)
    (name,) = find_classifiers(any_model, images[:2])
    views, hooks = views_of(any_model, images), hooks_of(any_model)
    with torch.no_grad():
        features, logits = views.features(views.original, images)
        head = any_model.get_submodule(name)
        shape = (-1, head.in_channels, 1, 1) if isinstance(head, nn.Conv2d) else features.shape
        torch.testing.assert_close(head(features.reshape(shape)).flatten(1), logits)
    assert hooks_of(any_model) == hooks


def test_heads_that_are_averaged_give_their_features_side_by_side() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 6, 3)
            self.one, self.two = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, images: Tensor) -> Tensor:
            hidden = self.body(images).relu().mean((2, 3))
            mean: Tensor = (self.one(hidden) + self.two(hidden * 1)) / 2
            return mean

    model = TwoHeads().eval()
    assert find_classifiers(model, noise_images(2)) == ("two", "one")
    views = views_of(model, noise_images(2))
    assert views.features(views.masked, noise_images(5))[0].shape == (5, 12)


def test_a_model_without_a_classifier_is_refused_at_once(clean: CleanData) -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3)

        def forward(self, images: Tensor) -> Tensor:
            half = self.last(self.body(images).relu()).mean((2, 3))
            return torch.cat([half, -half], 1)

    with pytest.raises(UnsupportedModelError, match="cannot tell which layers give"):
        CNP()(Doubled().eval(), clean)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_nfnet"])
@pytest.mark.parametrize("ranking", [RESPONSE, TRAINING])
def test_networks_without_batch_norm_are_scored(name: str, ranking: Any) -> None:
    model, images = build(name), CleanData(noise_images(16))
    scores = replace(QUICK, stamp=brighter, ranking=ranking)(model, images)
    assert scores.details["trigger"] == "given"
    assert (scores.flat != 1).float().mean() > 0.5


# ---- masks --------------------------------------------------------------------------------------


def trained_masks(net: nn.Module, clean: CleanData, **settings: Any) -> Tensor:
    """Settings of mask training, and temperature."""
    hot = {name: settings.pop(name) for name in ("temperature",) if name in settings}
    ranking = replace(TRAINING, **settings)
    return replace(QUICK, stamp=brighter, ranking=ranking, **hot)(net, clean).flat


def test_masks_move_and_nothing_else_does(net: nn.Module, clean: CleanData) -> None:
    before, views = state_of(net), views_of(net, clean.images)
    use_statistics_(net, "batch")
    masks, trained = QUICK.train(TRAINING, views, clean, generator(), False)
    assert_same_state(before, net.state_dict())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert (masks != 1).float().mean() > 0.2
    assert masks.min() >= 0
    assert masks.max() <= 1
    assert len(trained["recovered"]) == 1  # after two of the three steps
    assert trained["mask_steps"] == 3
    # the original keeps its own copies of the buffers as well
    drifted = views.original.buffers["bn1.running_mean"]
    assert not torch.equal(drifted, before["bn1.running_mean"])


@pytest.mark.slow
def test_pruning_changes_the_selected_gammas_alone(net: nn.Module, clean: CleanData) -> None:
    scores = replace(QUICK, stamp=brighter, ranking=TRAINING)(net, clean)
    selection, before = LowestFraction(0.01)(scores), state_of(net)
    silence_(net, selection, silencing="constant")
    gone = selection.by_site()
    for name, tensor in net.state_dict().items():
        site, _, kind = name.rpartition(".")
        expected = before[name].clone()
        if kind == "weight" and site in gone:
            expected[gone[site]] = 0
        assert torch.equal(tensor, expected), name


def test_running_statistics_do_not_enter_the_masks(net: nn.Module, clean: CleanData) -> None:
    masks = trained_masks(net, clean)
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(1.0)
    assert torch.equal(masks, trained_masks(net, clean))
    assert not torch.equal(masks, trained_masks(net, clean, statistics="running"))


@pytest.mark.parametrize("steps", [1, 3])
def test_steps_follow_the_gradient_of_the_loss(
    net: nn.Module, clean: CleanData, steps: int
) -> None:
    criterion, training = QUICK, replace(TRAINING, steps=steps, check_every=100)
    use_statistics_(net, "batch")
    got, trained = criterion.train(
        training, views_of(net, clean.images), clean, generator(4), False
    )
    assert trained == {"mask_steps": steps, "recovered": []}
    views, draws = views_of(net, clean.images), generator(4)
    masks, speed = views.masked.masks, torch.zeros_like(views.masked.masks)
    for images in islice(criterion.draws(clean, draws, 16), steps):
        (gradient,) = torch.autograd.grad(criterion.loss(views, images, draws)[0], masks)
        speed = 0.9 * speed + gradient
        with torch.no_grad():
            masks.sub_(0.2 * speed).clamp_(0, 1)
    torch.testing.assert_close(got, masks.detach(), rtol=0, atol=5e-4)
    assert (got < 1).float().mean() > 0.1


@pytest.mark.slow
def test_the_rate_falls_where_recovery_stalls(net: nn.Module, clean: CleanData) -> None:
    """Every look after the first is no better: the masks must then move less."""
    settings = {"steps": 6, "check_every": 1, "patience": 0, "temperature": 1e3}
    slow = trained_masks(net, clean, lr=10.0, least_lr=1e-6, **settings)
    fast = trained_masks(net, clean, lr=10.0, least_lr=10.0, **settings)
    assert (1 - slow).sum() < (1 - fast).sum()


@pytest.mark.slow
def test_the_response_is_the_mean_gradient_at_one(net: nn.Module, clean: CleanData) -> None:
    ranking = Response(batch_size=16, rounds=2, damping=0.05, statistics="batch")
    criterion = replace(QUICK, stamp=brighter, ranking=ranking)
    got = criterion(net, clean).flat
    draws, images = generator(), CleanData(clean.images)
    labelled = CleanData(clean.images, net(clean.images).argmax(1))
    stiffness = ranking.stiffness(net, labelled, find_sites(net, clean.images[:2]), draws)
    use_statistics_(net, "batch")
    views = views_of(net, clean.images)
    pull = torch.zeros_like(views.masked.masks)
    for _ in range(2):
        for batch in images.batches(16, draws):
            loss, _ = criterion.loss(views, batch.images, draws)
            pull += torch.autograd.grad(loss, views.masked.masks)[0] * len(batch) / 128
    expected = response_scores(pull, stiffness, 0.05)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)


def test_mirroring_turns_about_half_of_the_images(clean: CleanData) -> None:
    plain = QUICK.augmented(clean.images, generator())
    assert plain is clean.images
    mirrored = replace(QUICK, mirror=True).augmented(clean.images, generator())
    same = (mirrored == clean.images).flatten(1).all(1)
    assert 20 < same.sum() < 44
    assert torch.equal(mirrored[~same], clean.images[~same].flip(3))


# ---- noise --------------------------------------------------------------------------------------


def test_noise_is_one_step_from_its_start_and_not_projected(
    net: nn.Module, clean: CleanData
) -> None:
    views, labels = views_of(net, clean.images), clean.targets
    noise = torch.stack(list(QUICK.noise(views.masked, clean.images, labels, generator()).values()))
    draws = generator()
    count = len(views.masked.masks)
    start = torch.stack([(torch.rand(count, generator=draws) * 2 - 1) * 0.4 for _ in range(2)])
    step = (noise - start).abs()
    assert noise.abs().max() <= 0.8
    assert noise.abs().max() > 0.7
    moved = step > 0
    assert moved.float().mean() > 0.9
    torch.testing.assert_close(step[moved], torch.full_like(step[moved], 0.4))
    within = replace(QUICK, project_noise=True).noise(
        views.masked, clean.images, labels, generator()
    )
    assert max(part.abs().max() for part in within.values()) <= 0.4


def test_noise_leads_to_the_target_of_a_handmade_backdoor() -> None:
    torch.manual_seed(0)
    model, images = Handmade(3, target=1).eval(), pictures(3)
    increase = CNP().noise_increase(model, images, generator())
    assert increase.shape == (3,)
    assert increase.sum() == 0
    assert replace(QUICK, candidates=1).find_target(model, images, 0, False)[0] == increase.argmax()


@pytest.mark.slow
def test_the_increase_is_counted_over_five_passes(net: nn.Module, clean: CleanData) -> None:
    criterion, draws = replace(QUICK, ranking=replace(RESPONSE, batch_size=32)), generator(6)
    got = criterion.noise_increase(net, clean, generator(6))
    masked, expected = MaskedModel(net, find_sites(net, clean.images[:2])), [0] * 10
    for images in islice(criterion.draws(clean, draws, 32), 10):  # 320 draws of 64 images
        before = net(images).argmax(1)
        after = masked(images, **criterion.noise(masked, images, before, draws)).argmax(1)
        for label in range(10):
            expected[label] += int((after == label).sum() - (before == label).sum())
    assert got.tolist() == expected
    assert max(expected) > 0


# ---- target and trigger -------------------------------------------------------------------------


@pytest.fixture
def model() -> Handmade:
    torch.manual_seed(0)
    return Handmade(3, target=1).eval()


@pytest.fixture
def images() -> CleanData:
    return CleanData(pictures(3).images)


@pytest.mark.slow
@pytest.mark.parametrize(("candidates", "colours"), [(None, 1), (None, 3), (2, 3), (3, 1)])
def test_the_trigger_neuron_comes_first(candidates: int | None, colours: int) -> None:
    """Two classes and greyscale too."""
    torch.manual_seed(0)
    model, images = Handmade(colours, target=1).eval(), pictures(colours)
    # in greyscale the pull is faint beside what noise starts from
    scores = CNP(candidates=candidates, ranking=Response(stages=20, rounds=3), **TAC_QUICK)(
        model, CleanData(images.images)
    )
    assert scores.details["target"] == 1
    assert scores.ranking()[0] == ("conv", TRIGGER)
    assert ("noise_increase" in scores.details) == (candidates is not None)
    assert [trigger.target for trigger in scores.triggers] == [1]


def test_candidates_that_do_not_work_make_it_look_at_all_labels(
    model: Handmade, images: CleanData, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    real = CNP.search

    def search(self: CNP, model: Any, clean: Any, labels: Any, *rest: Any) -> Any:
        asked.append(labels)
        strict = replace(self, min_success=1.1) if labels else self
        return real(strict, model, clean, labels, *rest)

    monkeypatch.setattr(CNP, "search", search)
    quick = CNP(candidates=2, search_steps=80, min_success=0.5)
    target, details = quick.find_target(model, images, 0, False)
    assert target == 1
    assert asked == [details["candidates"], None]
    assert len(details["candidates"]) == 2
    assert len(details["search"]["sizes"]) == 3


@pytest.mark.slow
def test_labels_change_nothing(model: Handmade, images: CleanData) -> None:
    quick = {**TAC_QUICK, "search_steps": 20, "steps": 20, "min_success": 0.0}
    garbage = CleanData(images.images, torch.randint(3, (len(images),), generator=generator()))
    for criterion in (
        CNP(**quick),
        CNP(candidates=2, ranking=PlateauTraining(steps=3), **quick),
        CNP(candidates=1, inversion="authors", **quick),
    ):
        expected = criterion(model, images)
        found = criterion(model, garbage)
        assert torch.equal(expected.flat, found.flat)
        assert expected.details == found.details


def test_the_authors_inversion(model: Handmade, images: CleanData) -> None:
    """Valid pixels, a mask in [0, 1], and a trigger that works; the last iterate of all steps."""
    settings: dict[str, Any] = {"mean": (0.4,) * 3, "std": (0.2,) * 3, "inversion": "authors"}
    criterion = CNP(steps=300, inversion_lr=0.02, **settings)
    trigger = criterion.invert(model, images, 1, 0, False)
    assert (trigger.target, trigger.steps) == (1, 300)
    assert trigger.success > 0.99
    assert trigger.tested == 64
    assert trigger.norm < 64
    assert trigger.mask.min() >= 0
    assert trigger.mask.max() <= 1
    stamped = trigger(images.images)
    pixels = pixels_of(3)
    assert (stamped >= pixels.low - 1e-5).all()
    assert (stamped <= pixels.high + 1e-5).all()
    with pytest.raises(DataError, match=r"labels in \[0, 3\), got \[7\]"):
        CNP(target=7, inversion="authors")(model, images)


def test_the_first_step_of_the_authors_inversion(model: Handmade, images: CleanData) -> None:
    """Adam's first step is the rate along the sign of the gradient of CE + 0.01 sum |mask|."""
    criterion = CNP(steps=1, inversion="authors", mean=(0.4,) * 3, std=(0.2,) * 3)
    got, draws = criterion.invert(model, images, 1, 5, False), generator(5)
    unit = torch.rand(4, 16, 16, generator=draws).requires_grad_(True)
    batch = next(criterion.draws(images, draws, 32))
    pixels = pixels_of(3)
    mask, pattern = unit[:1], pixels.low + (pixels.high - pixels.low) * unit[1:]
    logits = model((1 - mask) * batch + mask * pattern)
    loss = F.cross_entropy(logits, torch.ones(32, dtype=torch.long)) + 0.04 * mask.sum()
    loss.backward()
    assert unit.grad is not None
    step = (unit.detach() - 0.005 * unit.grad.sign()).clamp(0, 1)
    torch.testing.assert_close(got.mask, step[:1], rtol=0, atol=1e-5)


def test_a_stamp_of_ones_own_needs_no_target(model: Handmade, images: CleanData) -> None:
    def board(images: Tensor) -> Tensor:
        stamped = images.clone()
        stamped[:, :, 4:7, 8:11] = ((torch.arange(9).reshape(3, 3) % 2 == 0).float() - 0.4) / 0.2
        return stamped

    scores = CNP(stamp=board)(model, images)
    assert scores.ranking()[0] == ("conv", TRIGGER)
    assert scores.details == {"trigger": "given", "ranks_only": True}
    assert scores.triggers == ()
    assert "board" not in scores.criterion


@pytest.mark.parametrize("wrong", [lambda x: x[:1], lambda x: x * torch.nan])
def test_a_stamp_that_is_none_is_refused(model: Handmade, images: CleanData, wrong: Any) -> None:
    with pytest.raises(DataError, match="expected stamp to return finite images of shape"):
        CNP(stamp=wrong)(model, images)


def test_divergence_is_an_error(images: CleanData) -> None:
    limit = images.images.mean((1, 2, 3)).max().item() + 1e-3
    model = Breaks(limit).eval()
    with pytest.raises(ScoringError, match="trigger recovery diverged"):
        CNP(target=2, steps=40)(model, images)
    with pytest.raises(ScoringError, match="trigger recovery diverged"):
        CNP(target=2, inversion="authors", inversion_lr=0.1)(model, images)
    huge = CNP(stamp=brighter, noise_budget=1e38)
    for criterion in (huge, replace(huge, ranking=PlateauTraining(steps=9))):
        with pytest.raises(ScoringError, match=r"contrastive loss diverged.*noise_budget"):
            criterion(Handmade(3, target=1).eval(), images)


# ---- does it find the backdoor? -----------------------------------------------------------------


@pytest.fixture(scope="module")
def patched() -> tuple[nn.Module, CleanData, Tensor]:
    """A network trained on a patch for class 0, and images with the patch that are not of it."""
    model, clean, triggered, target = planted()
    return model.requires_grad_(False), clean, triggered[clean.targets != target]


def patch(images: Tensor) -> Tensor:
    stamped = images.clone()
    stamped[:, :, -6:, -6:] = 4.0
    return stamped


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranking", "share"),
    [
        (Response(stages=20, batch_size=32), 0.02),
        (PlateauTraining(steps=15, batch_size=32, statistics="running"), 0.01),
    ],
)
def test_with_the_true_trigger_the_backdoor_goes_first(
    patched: tuple[nn.Module, CleanData, Tensor], ranking: Any, share: float
) -> None:
    """Silencing a few neurons ends it and costs nothing; random ones do not end it."""
    model, clean, triggered = patched
    criterion = CNP(stamp=patch, ranking=ranking)
    scores = criterion(model, CleanData(clean.images[:64]))
    masked = MaskedModel(model, scores.sites)

    def measure(keep: Tensor) -> tuple[float, float]:
        with torch.no_grad():
            masked.masks.copy_(keep)
            right = masked(clean.images).argmax(1) == clean.targets
            sent = masked(triggered).argmax(1) == 0
        return right.float().mean().item(), sent.float().mean().item()

    ones = torch.ones(len(scores.flat))
    accuracy, success = measure(ones)
    assert accuracy > 0.98
    assert success > 0.98
    count = round(share * len(ones))
    accuracy, success = measure(lowest(scores, count).keep())
    assert accuracy > 0.95
    assert success < 0.1
    ones[torch.randperm(len(ones), generator=generator())[:count]] = 0
    assert measure(ones)[1] > 0.9
