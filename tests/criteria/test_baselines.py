"""The baselines: values worked out by other means, planted channels, and fine-tuning."""

from __future__ import annotations

import copy
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from helpers.images import generator, noise_images
from helpers.networks import build, take_statistics_
from helpers.states import assert_same_state, state_of
from nnprune_backdoor import CleanData, PurifyError
from nnprune_backdoor import importance as importances
from nnprune_backdoor.core.masks import MaskedModel
from nnprune_backdoor.core.scores import ChannelScores
from nnprune_backdoor.core.sites import Neuron, find_sites
from nnprune_backdoor.criteria import BNP, CLP, FP, Magnitude, Random
from nnprune_backdoor.criteria.bnp import gaussian_kl
from nnprune_backdoor.criteria.clp import lipschitz_bounds
from nnprune_backdoor.criteria.parts.layers import standardised
from nnprune_backdoor.errors import DataError, ScoringError, UnsupportedModelError
from nnprune_backdoor.removal import compact
from nnprune_backdoor.selectors import BelowThreshold, LowestFraction, Outlier
from nnprune_backdoor.training import FineTuning, fine_tune


class Zoo(nn.Module):
    """One layer of each kind; norms are registered in another order than they run in."""

    def __init__(self) -> None:
        super().__init__()
        self.row_bn = nn.BatchNorm1d(48)
        self.grouped_bn = nn.BatchNorm2d(32)
        self.depth_bn = nn.BatchNorm2d(16)
        self.first_bn = nn.BatchNorm2d(16)
        self.group_norm = nn.GroupNorm(4, 24)
        self.first = nn.Conv2d(3, 16, 3, bias=False)
        self.depth = nn.Conv2d(16, 16, 3, groups=16)
        self.grouped = nn.Conv2d(16, 32, (3, 1), groups=4)
        self.bare = nn.Conv2d(32, 24, 1)
        self.with_group_norm = nn.Conv2d(24, 24, 3)
        self.row = nn.Linear(24, 48)
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first_bn(self.first(x)).relu()
        x = self.depth_bn(self.depth(x)).relu()
        x = self.grouped_bn(self.grouped(x)).relu()
        x = self.bare(x).relu()
        x = self.group_norm(self.with_group_norm(x)).relu()
        return self.head(self.row_bn(self.row(x.mean((2, 3)))).relu())


PAIRS = {
    "first_bn": "first",
    "depth_bn": "depth",
    "grouped_bn": "grouped",
    "bare": "bare",
    "group_norm": "with_group_norm",
    "row_bn": "row",
}
BATCHNORMS = ("first_bn", "depth_bn", "grouped_bn", "row_bn")


@pytest.fixture
def zoo() -> Zoo:
    """Gammas of both signs around one, some spread in the statistics, an eps that can be seen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Zoo()
        for module in model.modules():
            if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)):
                sign = torch.randint(2, module.weight.shape) * 2.0 - 1
                module.weight.data = sign * (1 + 0.1 * torch.randn_like(module.weight))
                module.bias.data.normal_(0, 0.1)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.2, 2)
                module.eps = 0.1
    return model.eval()


@pytest.fixture
def images() -> CleanData:
    """More than one pass of them, without labels."""
    return CleanData(noise_images(40)[:, :, :12, :12])


def channels_of(model: nn.Module, site: str) -> tuple[np.ndarray[Any, Any], Any]:
    return model.get_submodule(PAIRS[site]).weight.detach().double().numpy(), model.get_submodule(
        site
    )


def z(values: Any) -> np.ndarray[Any, Any]:
    values = np.asarray(values, dtype=np.float64)
    return (values - values.mean()) / values.std(ddof=1)


# --- layers ---


def test_standardised_by_hand() -> None:
    found = standardised(torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64))
    variance = (4 + 1 + 0 + 9) / 3
    assert found.tolist() == pytest.approx([x / variance**0.5 for x in (-2, -1, 0, 3)])
    assert standardised(torch.tensor([7.0])).tolist() == [0]
    assert standardised(torch.full((20,), 0.1).double()).tolist() == [0] * 20


def test_a_layer_of_ten_channels_has_no_outlier_at_three_deviations() -> None:
    for count, reachable in ((10, False), (11, True)):
        values = torch.zeros(count)
        values[4] = 1e6
        assert (float(standardised(values).max()) > 3) == reachable


# --- CLP ---


def test_clp_is_the_spectral_norm_by_numpy(zoo: Zoo, images: CleanData) -> None:
    scores = CLP()(zoo, images)
    assert {site.name: site.producer for site in scores.sites} == PAIRS
    for site, found in scores.by_site().items():
        weight, norm = channels_of(zoo, site)
        bounds = []
        for channel, kernel in enumerate(weight):
            matrix = kernel.reshape(kernel.shape[0], -1)  # (inputs it reads, positions)
            bound = np.linalg.svd(matrix, compute_uv=False).max()
            if site != "bare":
                bound *= abs(norm.weight[channel].item())
            if site in BATCHNORMS:
                bound /= (norm.running_var[channel].item() + norm.eps) ** 0.5
            bounds.append(bound)
        np.testing.assert_allclose(found.numpy(), -z(bounds), atol=1e-5)


def test_clp_of_a_depthwise_and_of_a_linear_layer_are_vector_norms(
    zoo: Zoo, images: CleanData
) -> None:
    scores = CLP()(zoo, images)
    for site, layer in (("depth_bn", zoo.depth), ("row_bn", zoo.row)):
        norm = zoo.get_submodule(site)
        factor = norm.weight.abs() / (norm.running_var + norm.eps).sqrt()
        bounds = layer.weight.flatten(1).norm(dim=1) * factor
        np.testing.assert_allclose(scores[site].numpy(), -z(bounds.detach()), atol=1e-5)


def test_clp_sees_the_pair_and_not_its_parts(zoo: Zoo, images: CleanData) -> None:
    """What the convolution gains and BatchNorm takes back again changes nothing."""
    before = CLP()(zoo, images)
    with torch.no_grad():
        zoo.grouped.weight[3] *= 50
        zoo.grouped_bn.weight[3] /= -50
    torch.testing.assert_close(CLP()(zoo, images).flat, before.flat, atol=1e-5, rtol=0)


@pytest.mark.parametrize("site", PAIRS)
def test_a_steep_channel_is_found_by_clp(zoo: Zoo, images: CleanData, site: str) -> None:
    """Among bounds within a tenth of each other the published rule takes it alone, and so does
    its robust relative; without it, neither takes any.

    Where the layer is almost a third of all neurons, its own outlier squeezes so many scores
    together that the MAD of all shrinks; there the published rule alone is exact.
    """
    with torch.no_grad():
        for some in find_sites(zoo, images.images[:2]):
            bounds = lipschitz_bounds(zoo, some).float()
            wanted = 0.9 + 0.2 * torch.rand(some.channels, generator=generator(some.channels))
            weight = zoo.get_submodule(some.producer).weight
            weight.mul_((wanted / bounds).reshape(-1, *[1] * (weight.ndim - 1)))
    selectors = (BelowThreshold(-3), Outlier(deviations=3))
    assert [len(select(CLP()(zoo, images))) for select in selectors] == [0, 0]
    with torch.no_grad():
        zoo.get_submodule(PAIRS[site]).weight[7] *= 10
    scores = CLP()(zoo, images)
    assert scores.ranking()[0] == Neuron(site, 7)
    for select in selectors[: 1 if site == "row_bn" else 2]:
        assert select(scores).neurons == (Neuron(site, 7),)


# --- BNP ---


def test_the_divergence_by_hand_and_its_direction() -> None:
    values = [torch.tensor(x, dtype=torch.float64) for x in (0.0, 1.0, 1.0, 2.0)]
    # log(sqrt 2 / 1) + (1 + (0 - 1)^2) / (2 * 2) - 1/2
    assert float(gaussian_kl(*values)) == pytest.approx(0.5 * np.log(2))
    # log(1 / sqrt 2) + (2 + 1) / 2 - 1/2
    assert float(gaussian_kl(*values[2:], *values[:2])) == pytest.approx(1 - 0.5 * np.log(2))


def test_bnp_is_the_divergence_by_torch(zoo: Zoo, images: CleanData) -> None:
    read: dict[str, Tensor] = {}
    for name in BATCHNORMS:
        module = zoo.get_submodule(name)
        module.register_forward_pre_hook(lambda _, given, name=name: read.update({name: given[0]}))
    with torch.no_grad():
        zoo(images.images)
    wanted = {}
    for name, x in read.items():
        norm: Any = zoo.get_submodule(name)
        flat = x.double().transpose(0, 1).flatten(1)
        clean = Normal(flat.mean(1), (flat.var(1) + norm.eps).sqrt())
        running = Normal(norm.running_mean.double(), (norm.running_var.double() + norm.eps).sqrt())
        wanted[name] = -z(kl_divergence(clean, running))
    scores = BNP()(zoo, images)
    for name in BATCHNORMS:
        np.testing.assert_allclose(scores[name].numpy(), wanted[name], atol=1e-4)
    assert not scores["bare"].any() and not scores["group_norm"].any()


def test_a_channel_trained_on_something_else_is_found_by_bnp(zoo: Zoo, images: CleanData) -> None:
    take_statistics_(zoo, images.images)
    with torch.no_grad():
        zoo.row_bn.running_mean[11] += 8 * zoo.row_bn.running_var[11].sqrt()
    scores = BNP()(zoo, images)
    assert scores.ranking()[0] == Neuron("row_bn", 11)
    taken = BelowThreshold(-3)(scores)
    assert taken.by_site()["row_bn"] == [11]


def test_a_channel_that_never_moved_is_no_outlier_of_bnp(zoo: Zoo, images: CleanData) -> None:
    take_statistics_(zoo, images.images)
    with torch.no_grad():
        zoo.first.weight[2] = 0
        zoo.first_bn.running_mean[2] = 0
        zoo.first_bn.running_var[2] = 1e-41
    assert float(BNP()(zoo, images)["first_bn"][2]) > -1


def test_batchnorm_without_statistics_is_refused_by_bnp(images: CleanData) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.Flatten(),
        nn.Linear(800, 5),
    )
    with pytest.raises(UnsupportedModelError, match=r"BNP needs.*these are: BatchNorm2d.*tac"):
        BNP()(model, images)
    assert len(CLP()(model, images).flat) == 8


# --- FP ---


class Dormant(nn.Module):
    """Channels whose activations can be worked out: 1 x 1 kernels on constant colours."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.last = nn.Conv2d(4, 2, 1)
        self.row = nn.Linear(2, 3)
        self.head = nn.Linear(3, 2)
        with torch.no_grad():
            for layer in (self.first, self.last, self.row, self.head):
                layer.weight.zero_()
                layer.bias.zero_()
            self.first.weight[:, 0, 0, 0] = torch.tensor([1.0, -1.0, 2.0, 0.0])
            self.first.bias[3] = 0.5
            self.last.weight[:, 0, 0, 0] = torch.tensor([3.0, 1.0])
            self.row.weight[:, 0] = torch.tensor([0.0, 1.0, 2.0])

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.first(x).relu()).relu()
        return self.head(self.row(x.mean((2, 3))).relu())


def test_fp_is_the_mean_positive_output() -> None:
    images = torch.zeros(2, 3, 2, 2)
    images[0, 0] = torch.tensor([[1.0, 1.0], [-3.0, -3.0]])
    images[1, 0] = 3.0
    scores = FP(layers="all")(Dormant(), CleanData(images))
    # over the eight positions (1, 1, -3, -3 and four times 3), after a ReLU
    first = np.array([14 / 8, 6 / 8, 28 / 8, 4 / 8])
    last = np.array([42 / 8, 14 / 8])
    row = np.array([0, 42 / 8, 84 / 8])
    for site, means in (("first", first), ("last", last), ("row", row)):
        assert scores[site].tolist() == pytest.approx(means / means.mean(), rel=1e-6)


def test_fp_as_published_ranks_the_last_convolution_first() -> None:
    clean = CleanData(torch.rand(4, 3, 2, 2))
    every = FP(layers="all")(Dormant(), clean)
    for criterion in (FP(), FP.paper()):
        scores = criterion(Dormant(), clean)
        assert [neuron.site for neuron in scores.ranking()[:3]] == ["last", "last", "first"]
        for site in ("first", "last", "row"):
            assert torch.equal(scores[site].argsort(), every[site].argsort())
    without = tuple(site for site in every.sites if site.name == "row")
    assert FP()(Dormant(), clean, sites=without)["row"].tolist() == every["row"].tolist()


def test_fp_knows_two_choices_of_layers() -> None:
    with pytest.raises(DataError, match="'last' or 'all', got 'first'"):
        FP(layers="first")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "last"), [("test_resnet", "layer4.0.downsample.2"), ("test_vit", "blocks.5.mlp.fc2")]
)
def test_fp_passes_over_a_patch_embedding(name: str, last: str, clean: CleanData) -> None:
    """test_resnet has one block a stage, whose shortcut runs after its branch."""
    assert FP()(build(name), clean).ranking()[0].site == last


def test_a_dormant_channel_is_found_by_fp(zoo: Zoo, images: CleanData) -> None:
    with torch.no_grad():
        zoo.group_norm.bias.fill_(3)
        zoo.group_norm.bias[5] = -50
    assert FP()(zoo, images).ranking()[0] == Neuron("group_norm", 5)
    assert int(FP(layers="all")(zoo, images)["group_norm"].argmin()) == 5


# --- magnitude and chance ---


def test_magnitude_by_hand(zoo: Zoo, images: CleanData) -> None:
    with torch.no_grad():
        for site, layer in PAIRS.items():
            zoo.get_submodule(layer).weight.zero_()
            zoo.get_submodule(layer).weight[0].flatten()[:1] = 3
            zoo.get_submodule(layer).weight[1].flatten()[:2] = torch.tensor([-6.0, 8.0])
            if site != layer:
                zoo.get_submodule(site).weight[:2] = torch.tensor([2.0, -0.5])
                zoo.get_submodule(site).bias.fill_(9)
    for site, found in Magnitude()(zoo, images).by_site().items():
        wanted = torch.zeros(len(found))
        wanted[:2] = torch.tensor([3.0, 10.0] if site == "bare" else [6.0, 5.0])
        torch.testing.assert_close(found, wanted / wanted.mean())


def test_a_layer_of_zeros_is_no_error(zoo: Zoo, images: CleanData) -> None:
    with torch.no_grad():
        zoo.bare.weight.zero_()
        zoo.bare.bias.zero_()
    for criterion in (Magnitude(), FP(layers="all"), CLP()):
        assert not criterion(zoo, images)["bare"].any()


def test_chance_is_uniform_and_another_one_for_every_seed(zoo: Zoo, images: CleanData) -> None:
    one, other = (Random()(zoo, images, seed=seed).flat for seed in (0, 1))
    assert not torch.equal(one, other)
    both = torch.cat([one, other])
    assert float(both.min()) >= 0 and float(both.max()) < 1
    assert float(both.mean()) == pytest.approx(0.5, abs=4 / 12**0.5 / len(both) ** 0.5)


@pytest.mark.slow
def test_every_architecture_is_scored(any_model: nn.Module) -> None:
    """Or refused by BNP, which is when no layer with neurons has running statistics."""
    images = CleanData(noise_images(10))
    for criterion in (FP(), FP(layers="all"), CLP(), Magnitude(), Random(), BNP()):
        try:
            scores = criterion(any_model, images)
        except UnsupportedModelError:
            modules = [any_model.get_submodule(site.name) for site in scores.sites]
            assert isinstance(criterion, BNP)
            assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules)
        else:
            told = scores.flat[scores.flat != 0]
            assert len(told.unique()) > len(told) / 2


# --- in Torch-Pruning ---


@pytest.mark.parametrize("criterion", [FP(), CLP(), BNP(), Random(), Magnitude()])
def test_importances_appear_by_registration(criterion: Any, clean: CleanData) -> None:
    model = build("test_resnet")
    importance = getattr(importances, f"{type(criterion).__name__}Importance")(model, clean)
    assert torch.equal(importance.scores.flat, criterion(model, clean).flat)
    assert criterion.reference in (importance.__doc__ or "")
    assert "baseline" in criterion.reference


# --- fine-tuning ---


def lowest(model: nn.Module, clean: CleanData) -> Any:
    sites = find_sites(model, clean.images[:2])
    total = sum(site.channels for site in sites)
    scores = ChannelScores(sites, torch.rand(total, generator=generator(1)), "made up")
    return LowestFraction(0.2)(scores)


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = copy.deepcopy(model).eval()(images)
    return found


def test_fine_tuning_learns_and_leaves_the_model_alone(clean: CleanData) -> None:
    model = build("test_resnet").train()
    model.layer1.eval()
    model.layer2.requires_grad_(False)
    model.set_grad_checkpointing(True)
    before, random_state = state_of(model), torch.get_rng_state()
    tuned = fine_tune(model, clean, FineTuning(epochs=12, lr=0.05, batch_size=32), progress=False)
    assert_same_state(before, state_of(model))
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in [*model.parameters(), *tuned.parameters()])
    for one, other in zip(tuned.modules(), model.modules(), strict=True):
        assert one.training == other.training
    for one, other in zip(tuned.parameters(), model.parameters(), strict=True):
        assert one.requires_grad == other.requires_grad
    assert model.grad_checkpointing is tuned.grad_checkpointing is True
    assert not torch.equal(tuned.layer2[0].conv1.weight, model.layer2[0].conv1.weight)
    assert float((outputs(model, clean.images).argmax(1) == clean.targets).float().mean()) < 0.3
    assert float((outputs(tuned, clean.images).argmax(1) == clean.targets).float().mean()) > 0.8


def test_fine_tuning_is_repeatable(clean: CleanData) -> None:
    model = build("test_resnet")
    settings = FineTuning(epochs=1, batch_size=32, shift=2)
    one, same, other = (
        fine_tune(model, clean, settings, seed=seed, progress=False) for seed in (3, 3, 4)
    )
    assert_same_state(state_of(one), state_of(same))
    assert not torch.equal(one.fc.weight, other.fc.weight)


@pytest.mark.parametrize("name", ["test_resnet", "mixer"])
@pytest.mark.parametrize("silencing", ["zero", "constant"])
def test_silenced_neurons_stay_exactly_silent(
    clean: CleanData, name: str, silencing: Literal["zero", "constant"]
) -> None:
    model = build(name)
    selection = lowest(model, clean)
    tuned = fine_tune(
        model,
        clean,
        FineTuning(epochs=2, lr=0.02, silencing=silencing),
        selection=selection,
        progress=False,
    )
    spoken: dict[str, Tensor] = {}
    for site, channels in selection.by_site().items():
        layer: Any = tuned.get_submodule(site)
        assert not layer.weight[channels].any()
        assert layer.bias is None or silencing == "constant" or not layer.bias[channels].any()
        kept = [channel for channel in range(len(layer.weight)) if channel not in channels]
        assert not torch.equal(layer.weight[kept], model.get_submodule(site).weight[kept])
        layer.register_forward_hook(
            lambda module, _, output, site=site: spoken.update({site: output.clone()})
        )
    logits = tuned(clean.images)
    for site, output in spoken.items():
        along = -1 if isinstance(tuned.get_submodule(site), nn.Linear) else 1
        said = output.movedim(along, 0)[selection.by_site()[site]].flatten(1)
        assert torch.equal(said.amax(1), said.amin(1))
        assert silencing == "constant" or not said.any()
    masked = MaskedModel(tuned, selection.sites, silencing=silencing)
    masked.masks.requires_grad_(False).copy_(selection.keep())
    torch.testing.assert_close(masked(clean.images), logits)


def test_what_was_kept_silent_can_then_be_removed(clean: CleanData) -> None:
    model = build("test_resnet")
    selection = lowest(model, clean)
    tuned = fine_tune(model, clean, FineTuning(epochs=1), selection=selection, progress=False)
    small, report = compact(tuned, selection, clean.images[:8])
    assert report.after.parameters < report.before.parameters
    wanted = outputs(tuned, clean.images)
    torch.testing.assert_close(outputs(small, clean.images), wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(UnsupportedModelError, match=r"the selection knows.*in its full shape"):
        fine_tune(small, clean, FineTuning(epochs=1), selection=selection, progress=False)


def test_without_the_selection_silenced_neurons_wake_up(clean: CleanData) -> None:
    model = build("test_resnet")
    selection = lowest(model, clean)
    silent = fine_tune(model, clean, FineTuning(epochs=0), selection=selection, progress=False)
    awake = fine_tune(silent, clean, FineTuning(epochs=1), progress=False)
    for site, channels in selection.by_site().items():
        assert not silent.get_submodule(site).weight[channels].any()
        assert silent.get_submodule(site).weight.any()
    woken = [awake.get_submodule(s).weight[c].any() for s, c in selection.by_site().items()]
    assert any(woken)


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_statistics_move_only_if_batches_give_them(
    clean: CleanData, statistics: Literal["batch", "running"]
) -> None:
    model = build("test_resnet")
    tuned = fine_tune(
        model, clean, FineTuning(epochs=1, lr=1e-3, statistics=statistics), progress=False
    )
    before, after = dict(model.named_buffers()), dict(tuned.named_buffers())
    same = all(torch.equal(before[name], after[name]) for name in before)
    assert same == (statistics == "running")


X, Y = noise_images(10), torch.arange(10)


@pytest.mark.parametrize(
    ("clean", "settings", "error", "message"),
    [
        (CleanData(X), {}, DataError, "labelled"),
        (CleanData(X[:1], Y[:1]), {}, DataError, "all clean images have label 0"),
        (CleanData(X, Y), {"epochs": -1}, DataError, "epochs of at least 0, got -1"),
        (CleanData(X, Y), {"lr": 0.0}, DataError, "lr of more than 0"),
        (CleanData(X, Y), {"optimiser": "adam"}, DataError, "'sgd' or 'adamw', got 'adam'"),
        (CleanData(X, Y), {"largest_gradient": 0.0}, DataError, "largest_gradient of more than 0"),
        (CleanData(X, Y), {"batch_size": 1}, DataError, "batch_size of at least 2"),
        (CleanData(X, Y), {"shift": -1}, DataError, "shift of at least 0"),
        (CleanData(X, Y), {"silencing": "zeros"}, DataError, "silencing .* got 'zeros'"),
        (CleanData(X, Y), {"statistics": "both"}, DataError, "statistics .* got 'both'"),
        (CleanData(X, Y), {"epochs": 9, "lr": 1e9}, ScoringError, "take a smaller lr"),
    ],
)
def test_what_fine_tuning_refuses(
    clean: CleanData, settings: dict[str, Any], error: type[PurifyError], message: str
) -> None:
    model = build("test_resnet")
    before, random_state = state_of(model), torch.get_rng_state()
    with pytest.raises(error, match=message):
        fine_tune(model, clean, FineTuning(**settings), progress=False)
    assert_same_state(before, state_of(model))
    assert torch.equal(random_state, torch.get_rng_state())


def test_a_wrapped_model_is_not_fine_tuned(clean: CleanData) -> None:
    with pytest.raises(UnsupportedModelError, match=r"model\.module"):
        fine_tune(nn.DataParallel(build("test_resnet")), clean, progress=False)
