from __future__ import annotations

import copy
from typing import get_args

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from helpers.images import generator, noise_images
from helpers.networks import build, take_statistics_
from helpers.states import assert_same_state, hooks_of, state_of
from nnprune_backdoor.core.masks import MaskedModel, Silencing, silence_
from nnprune_backdoor.core.norms import use_statistics_
from nnprune_backdoor.core.scores import Selection, neurons_of
from nnprune_backdoor.core.sites import Neuron, Site, find_sites
from nnprune_backdoor.errors import UnsupportedModelError

IMAGES = noise_images(4)
LABELS = torch.tensor([3, 1, 4, 1])
MEANINGS = list(get_args(Silencing))


def some_of(sites: tuple[Site, ...], share: float = 0.1, seed: int = 0) -> Selection:
    """A random selection; at least one neuron a site."""
    draw = torch.rand(sum(site.channels for site in sites), generator=generator(seed))
    neurons = neurons_of(sites)
    chosen = {neurons[i] for i in (draw < share).nonzero().flatten().tolist()}
    chosen |= {Neuron(site.name, site.channels // 2) for site in sites}
    return Selection(sites, tuple(sorted(chosen)))


def masked_by(model: nn.Module, selection: Selection, silencing: Silencing) -> MaskedModel:
    masked = MaskedModel(model, selection.sites, silencing=silencing)
    with torch.no_grad():
        masked.masks.copy_(selection.keep())
    return masked


# ---- masks of ones ------------------------------------------------------------------------------


@pytest.mark.parametrize("silencing", MEANINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_masks_of_ones_are_the_identity_bit_for_bit(
    any_model: nn.Module, dtype: torch.dtype, silencing: Silencing
) -> None:
    model, images = any_model.to(dtype), IMAGES.to(dtype)
    masked = MaskedModel(model, find_sites(model, images), silencing=silencing)
    assert torch.equal(masked.masks, torch.ones_like(masked.masks))
    got = masked(images)
    assert got.dtype == dtype
    assert torch.equal(got, model(images))


@pytest.mark.parametrize("silencing", MEANINGS)
def test_noise_of_zeros_is_the_identity_too(any_model: nn.Module, silencing: Silencing) -> None:
    masked = MaskedModel(any_model, find_sites(any_model, IMAGES), silencing=silencing)
    nothing = torch.zeros_like(masked.masks)
    logits = masked(IMAGES, weight_noise=nothing, bias_noise=nothing)
    assert torch.equal(logits, any_model(IMAGES))


@pytest.mark.parametrize("silencing", MEANINGS)
def test_masks_of_ones_are_the_identity_under_batch_statistics(silencing: Silencing) -> None:
    model = build("test_resnet")
    masked = MaskedModel(model, find_sites(model, IMAGES), silencing=silencing)
    use_statistics_(model, "batch")
    got = masked(IMAGES)  # first: the plain call below moves the model's own statistics
    assert torch.equal(got, model(IMAGES))


# ---- masks that a norm would undo ---------------------------------------------------------------


def small_densenet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "densenet121", num_classes=10, growth_rate=8, block_config=(2, 2)
    ).eval()


def test_norms_of_concatenations_keep_their_statistics_so_that_masks_pull() -> None:
    """Under a batch's statistics they scale back what a mask on a convolution before scales."""
    model, images = small_densenet(), noise_images(8)
    take_statistics_(model, images)
    sites = find_sites(model, images)
    masked = MaskedModel(model.requires_grad_(False), sites)
    before = {name: buffer.clone() for name, buffer in masked.buffers.items()}
    masked.use_statistics_("batch", images)
    assert all(torch.equal(masked.buffers[name], buffer) for name, buffer in before.items())
    names = {site.name for site in sites}
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {n for n, m in norms.items() if m.training} == names & norms.keys()
    loss = F.cross_entropy(masked(images), torch.arange(8))
    (pull,) = torch.autograd.grad(loss, masked.masks)
    bare = [site.kind == "layer" for site in sites]
    parts = pull.split([site.channels for site in sites])
    assert min(part.abs().median() for part, b in zip(parts, bare, strict=True) if b) > 1e-6
    masked.use_statistics_("running", images)
    assert not any(m.training for m in norms.values())


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "resnetv2_18"])
def test_other_networks_take_the_statistics_that_are_asked_for(name: str) -> None:
    """A sum of residuals is normalised in whole: a mask on one summand still pulls."""
    model = timm.create_model(name, num_classes=10) if "v2" in name else build(name)
    masked = MaskedModel(model.eval().requires_grad_(False), find_sites(model, IMAGES))
    masked.use_statistics_("batch", IMAGES)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(norm.training for norm in norms)


# ---- what masks and noise multiply --------------------------------------------------------------


@pytest.mark.parametrize("silencing", MEANINGS)
def test_masks_and_noise_multiply_weights_and_biases(
    any_model: nn.Module, silencing: Silencing
) -> None:
    """(m + delta) on weights; 1 + xi on biases, or m + xi where the mask is on both."""
    sites = find_sites(any_model, IMAGES)
    masked = MaskedModel(any_model, sites, silencing=silencing)
    count, source = len(masked.masks), generator(3)
    mask, delta, xi = (torch.rand(count, generator=source) for _ in range(3))
    with torch.no_grad():
        masked.masks.copy_(mask)
        got = masked(IMAGES, weight_noise=delta - 0.5, bias_noise=xi - 0.5)
        on_weight = mask + delta - 0.5
        on_bias = (mask if silencing == "zero" else 1) + xi - 0.5
        by_hand = copy.deepcopy(any_model)
        sizes = [site.channels for site in sites]
        for site, w, b in zip(sites, on_weight.split(sizes), on_bias.split(sizes), strict=True):
            module = by_hand.get_submodule(site.name)
            if site.kind == "heads":
                module.weight.mul_(w.repeat_interleave(site.width))
            else:
                _scale_(module, w, b)
        wanted = by_hand(IMAGES)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, any_model(IMAGES), rtol=1e-2, atol=1e-2)


def _scale_(module: nn.Module, weight: Tensor, bias: Tensor) -> None:
    if hasattr(module, "gain"):  # nfnet's convolutions standardise their weight: scale the gain
        module.gain.mul_(weight.reshape(-1, 1, 1, 1))
    else:
        module.weight.mul_(weight.reshape(-1, *(1,) * (module.weight.ndim - 1)))
    if module.bias is not None:
        module.bias.mul_(bias)


@pytest.mark.parametrize("silencing", MEANINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_mask_gets_a_finite_gradient_and_no_weight_gets_one(
    any_model: nn.Module, dtype: torch.dtype, silencing: Silencing
) -> None:
    model = any_model.to(dtype).requires_grad_(False)
    sites = find_sites(model, IMAGES.to(dtype))
    masked = MaskedModel(model, sites, silencing=silencing)
    F.cross_entropy(masked(IMAGES.to(dtype)).float(), LABELS).backward()
    gradient = masked.masks.grad
    assert gradient is not None
    assert torch.isfinite(gradient).all()
    for site, part in zip(sites, gradient.split([s.channels for s in sites]), strict=True):
        assert part.count_nonzero() > 0, site
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_weight_gets_a_gradient_from_autograd_grad_even_if_it_asks_for_one(
    any_model: nn.Module,
) -> None:
    masked = MaskedModel(any_model, find_sites(any_model, IMAGES))
    torch.autograd.grad(F.cross_entropy(masked(IMAGES), LABELS), masked.masks)
    assert all(parameter.requires_grad for parameter in any_model.parameters())
    assert all(parameter.grad is None for parameter in any_model.parameters())


def test_mask_gradient_is_the_slope_of_the_loss(any_model: nn.Module) -> None:
    model = any_model.double().requires_grad_(False)
    images = IMAGES.double()
    masked = MaskedModel(model, find_sites(model, images))
    masked.masks = masked.masks.detach().double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(masked(images), LABELS), masked.masks)
    direction = torch.randn(len(gradient), generator=generator(5), dtype=torch.float64)
    step = 1e-6 * direction
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            masked.masks.add_(sign * step)
            losses.append(F.cross_entropy(masked(images), LABELS))
            masked.masks.sub_(sign * step)
    slope = (losses[0] - losses[1]) / 2e-6
    torch.testing.assert_close(slope, gradient @ direction, rtol=1e-3, atol=1e-6)


# ---- masks of zero are silence_ -----------------------------------------------------------------


@pytest.mark.parametrize("silencing", MEANINGS)
def test_masks_of_zero_compute_what_silencing_computes(
    any_model: nn.Module, silencing: Silencing
) -> None:
    selection = some_of(find_sites(any_model, IMAGES))
    silenced = copy.deepcopy(any_model)
    silence_(silenced, selection, silencing=silencing)
    with torch.no_grad():
        got = masked_by(any_model, selection, silencing)(IMAGES)
        wanted = silenced(IMAGES)
        assert not torch.allclose(wanted, any_model(IMAGES), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("silencing", MEANINGS)
def test_norm_masks_of_zero_are_silencing_bit_for_bit(silencing: Silencing) -> None:
    model = build("test_resnet")
    selection = some_of(find_sites(model, IMAGES))
    silenced = copy.deepcopy(model)
    silence_(silenced, selection, silencing=silencing)
    with torch.no_grad():
        assert torch.equal(masked_by(model, selection, silencing)(IMAGES), silenced(IMAGES))


class TwoUses(nn.Module):
    """One norm after two convolutions, if asked also registered under a second name."""

    def __init__(self, alias: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        if alias:
            self.again = self.norm
        self.fc = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm(self.conv1(images)).relu()
        second = getattr(self, "again", self.norm)
        return self.fc(second(self.conv2(hidden)).relu().mean((2, 3)))


@pytest.mark.parametrize("alias", [False, True])
@pytest.mark.parametrize("silencing", MEANINGS)
def test_one_norm_that_serves_two_convolutions_is_masked_in_both_places(
    silencing: Silencing, alias: bool
) -> None:
    torch.manual_seed(0)
    model = TwoUses(alias).eval()
    nn.init.constant_(model.norm.bias, 0.5)
    sites = (Site("norm", 8, "norm", "conv1"),)
    selection = Selection(sites, (Neuron("norm", 2), Neuron("norm", 5)))
    silenced = copy.deepcopy(model)
    silence_(silenced, selection, silencing=silencing)
    with torch.no_grad():
        got, wanted = masked_by(model, selection, silencing)(IMAGES), silenced(IMAGES)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alias", [False, True])
def test_a_module_with_two_names_is_put_back_after_a_call(alias: bool) -> None:
    model = TwoUses(alias).eval()
    before, held = state_of(model), dict(model.named_parameters())
    masked = MaskedModel(model, find_sites(model, IMAGES))
    use_statistics_(model, "batch")
    with torch.no_grad():
        masked.masks.fill_(0.5)
        masked(IMAGES)
    assert_same_state(before, model.state_dict())
    after = dict(model.named_parameters())
    assert held.keys() == after.keys()
    assert all(held[name] is after[name] for name in held)


def test_norms_that_share_their_weight_can_be_masked() -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)]
    layers[3].weight = layers[1].weight
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    model = nn.Sequential(*layers, *head).eval()
    assert torch.equal(MaskedModel(model, find_sites(model, IMAGES))(IMAGES), model(IMAGES))


@pytest.mark.parametrize("silencing", MEANINGS)
def test_transposed_convolutions_are_silenced_by_output_channel(silencing: Silencing) -> None:
    """Their weight is (in, out, ...), unlike that of every other layer."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)]
    model = nn.Sequential(*layers, *head).eval()
    sites = find_sites(model, IMAGES)
    if "2" not in [site.name for site in sites]:
        return  # not offered as a site: fine as well
    selection = Selection(sites, (Neuron("2", 1), Neuron("2", 3)))
    silenced = copy.deepcopy(model)
    silence_(silenced, selection, silencing=silencing)
    with torch.no_grad():
        got = masked_by(model, selection, silencing)(IMAGES)
        torch.testing.assert_close(got, silenced(IMAGES), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
@pytest.mark.parametrize("silencing", MEANINGS)
def test_a_silenced_norm_says_act_of_beta_everywhere_or_nothing(
    name: str, silencing: Silencing
) -> None:
    model = build(name)
    sites = find_sites(model, IMAGES)
    bn, producer = model.bn1, sites[[site.name for site in sites].index("bn1")].producer
    act = model.act1 if name == "test_resnet" else bn.act  # timm fuses norm and activation here
    beta = bn.bias.detach().clone()
    selection = Selection(sites, tuple(Neuron("bn1", channel) for channel in (0, 3, 7)))
    said: dict[str, Tensor] = {}
    act.register_forward_hook(lambda module, given, output: said.update(act=output))
    silence_(model, selection, silencing=silencing)
    with torch.no_grad():
        model(IMAGES)
    assert producer
    for channel in (0, 3, 7):
        constant = F.silu(beta) if name == "test_efficientnet" else F.relu(beta)
        wanted = constant[channel] if silencing == "constant" else torch.tensor(0.0)
        got = said["act"][:, channel]
        torch.testing.assert_close(got, wanted.expand_as(got))
    assert said["act"][:, 1].std() > 0


# ---- what silencing changes ---------------------------------------------------------------------


@pytest.mark.parametrize("silencing", MEANINGS)
def test_silencing_changes_the_selected_entries_and_no_other_bit(
    any_model: nn.Module, silencing: Silencing
) -> None:
    sites = find_sites(any_model, IMAGES)
    selection = some_of(sites)
    before = state_of(any_model)
    silence_(any_model, selection, silencing=silencing)
    after = any_model.state_dict()
    expected = {name: tensor.clone() for name, tensor in before.items()}
    heads = {site.name: site for site in sites if site.kind == "heads"}
    for name, channels in selection.by_site().items():
        if name in heads:
            for head in channels:
                first = head * heads[name].width
                expected[f"{name}.weight"][:, first : first + heads[name].width] = 0
            continue
        expected[f"{name}.weight"][channels] = 0
        if silencing == "zero" and f"{name}.bias" in expected:
            expected[f"{name}.bias"][channels] = 0
    assert_same_state(expected, after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    norms = {site.name for site in sites if site.kind == "norm"}
    # convolutions before norms are never touched
    assert not {f"{site.producer}.weight" for site in sites if site.name in norms} & changed
    kinds = {name.rsplit(".", 1)[1] for name in changed}
    assert kinds == ({"weight"} if silencing == "constant" else {"weight", "bias"})


@pytest.mark.parametrize("silencing", MEANINGS)
def test_silencing_is_idempotent_and_order_does_not_matter(silencing: Silencing) -> None:
    model = build("test_byobnet")
    sites = find_sites(model, IMAGES)
    neurons = some_of(sites).neurons
    results = []
    for parts in ([neurons], [neurons, neurons], [neurons[::-1]], [neurons[7:], neurons[:7]]):
        copied = copy.deepcopy(model)
        for part in parts:
            silence_(copied, Selection(sites, part), silencing=silencing)
        results.append(state_of(copied))
    for other in results[1:]:
        assert_same_state(results[0], other)


def test_silencing_nothing_changes_nothing(any_model: nn.Module) -> None:
    before = state_of(any_model)
    silence_(any_model, Selection(find_sites(any_model, IMAGES), ()))
    assert_same_state(before, any_model.state_dict())


def test_silencing_keeps_mode_flags_and_trainability() -> None:
    model = build("test_resnet").train()
    model.layer1.eval()
    selection = some_of(find_sites(copy.deepcopy(model).eval(), IMAGES))
    modes = [module.training for module in model.modules()]
    silence_(model, selection)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.parameters())
    F.cross_entropy(model(IMAGES), LABELS).backward()  # no in-place write in the graph


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_parametrised_layer_is_refused(norm: object) -> None:
    model = _two_layers()
    norm(model[0])  # type: ignore[operator]
    selection = Selection(find_sites(model, IMAGES), (Neuron("0", 1),))
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match=r"'0' has a parametrised weight.*remove_param"):
        silence_(model, selection)
    assert_same_state(before, model.state_dict())


def test_a_refusal_midway_leaves_the_model_as_it_was() -> None:
    """A parametrised layer after a plain one: nothing may be half silenced."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    model = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()
    parametrizations.weight_norm(model[0][2])
    sites = find_sites(model, IMAGES)
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match="parametrised"):
        silence_(model, Selection(sites, (Neuron("0.0", 1), Neuron("0.2", 1))))
    assert_same_state(before, model.state_dict())


def test_a_weight_rewritten_by_an_old_style_hook_is_refused() -> None:
    """torch.nn.utils.prune recomputes `weight` in each forward: a write to it would be lost."""
    model = _two_layers()
    prune.l1_unstructured(model[0], "weight", amount=3)
    selection = Selection(find_sites(model, IMAGES), (Neuron("0", 1),))
    with pytest.raises(UnsupportedModelError):
        silence_(model, selection, silencing="constant")


def _two_layers() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 10)).eval()


# ---- the model is left alone --------------------------------------------------------------------


def test_no_hook_stays_after_a_call(any_model: nn.Module) -> None:
    before = hooks_of(any_model)
    MaskedModel(any_model, find_sites(any_model, IMAGES))(IMAGES)
    assert hooks_of(any_model) == before


def test_nothing_stays_after_an_exception_inside(any_model: nn.Module) -> None:
    masked = MaskedModel(any_model, find_sites(any_model, IMAGES))
    hooks, state = hooks_of(any_model), state_of(any_model)
    with torch.no_grad():
        masked.masks.zero_()
    with pytest.raises((RuntimeError, AssertionError)):
        masked(IMAGES[:, :1])
    assert hooks_of(any_model) == hooks
    assert_same_state(state, any_model.state_dict())  # functional_call has put the weights back
    with torch.no_grad():
        masked.masks.fill_(1)
    assert torch.equal(masked(IMAGES), any_model(IMAGES))


def test_an_interrupt_inside_leaves_no_hook_either() -> None:
    model = build("test_vit")
    masked = MaskedModel(model, find_sites(model, IMAGES))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.blocks[3].register_forward_pre_hook(interrupt)
    before = hooks_of(model)
    with pytest.raises(KeyboardInterrupt):
        masked(IMAGES)
    assert hooks_of(model) == before
    handle.remove()


def test_running_statistics_drift_in_the_copy_alone() -> None:
    model = build("test_resnet")
    sites = find_sites(model, IMAGES)
    before = state_of(model)
    masked = MaskedModel(model, sites)
    use_statistics_(model, "batch")
    with torch.no_grad():
        first, second = masked(IMAGES), masked(IMAGES)
    assert_same_state(before, model.state_dict())
    assert torch.equal(first, second)  # they do not depend on running statistics
    for name, buffer in masked.buffers.items():
        assert not torch.equal(buffer, before[name]), name
        if name.endswith("num_batches_tracked"):
            assert buffer == before[name] + 2


def test_two_views_of_one_model_do_not_meet() -> None:
    model = build("test_efficientnet")
    sites = find_sites(model, IMAGES)
    one, other = MaskedModel(model, sites), MaskedModel(model, sites)
    with torch.no_grad():
        one.masks.zero_()
        assert torch.equal(other(IMAGES), model(IMAGES))
        assert not torch.equal(one(IMAGES), other(IMAGES))


def test_a_subset_of_sites_masks_only_these() -> None:
    model = build("test_resnet")
    subset = find_sites(model, IMAGES)[3:5]
    masked = MaskedModel(model, subset)
    assert len(masked.masks) == sum(site.channels for site in subset)
    assert torch.equal(masked(IMAGES), model(IMAGES))


def test_frozen_masks_ask_for_no_gradient_and_ask_again_afterwards() -> None:
    model = build("test_resnet").requires_grad_(False)
    masked = MaskedModel(model, find_sites(model, IMAGES))

    def work() -> None:
        with masked.frozen_masks():
            assert not masked(IMAGES).requires_grad
            raise ValueError("midway")

    with pytest.raises(ValueError, match="midway"):
        work()
    assert masked(IMAGES).requires_grad


# ---- BatchNorm statistics -----------------------------------------------------------------------


def test_use_statistics_puts_batch_norms_alone_into_train_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.GroupNorm(2, 8))
    use_statistics_(model.train(), "batch")
    assert [layer.training for layer in model] == [False, True, False, False]
    use_statistics_(model, "running")
    assert [layer.training for layer in model] == [False] * 4


def _conv_norm() -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8, momentum=0.37)
    layers = [nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(8, 10))
    norm.running_mean.normal_()
    norm.running_var.uniform_(1, 2)
    norm.num_batches_tracked.fill_(99)
    return model


def test_networks_made_in_inference_mode_are_refused_and_copies_are_not() -> None:
    with torch.inference_mode():
        model = build("test_resnet")
    sites = find_sites(model, IMAGES[:2])
    with pytest.raises(UnsupportedModelError, match=r"copy\.deepcopy"):
        MaskedModel(model, sites)
    with pytest.raises(UnsupportedModelError, match=r"copy\.deepcopy"):
        silence_(model, some_of(sites))
    usable = copy.deepcopy(model)
    assert MaskedModel(usable, sites)(IMAGES).requires_grad
    silence_(usable, some_of(sites))
