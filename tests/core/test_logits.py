"""The classifier is found by what its channels do to the logits, wherever it stands."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.images import noise_images
from nnprune_backdoor.core.sites import find_classifiers, find_sites
from nnprune_backdoor.errors import UnsupportedModelError

IMAGES = noise_images(2)


class Net(nn.Module):
    """conv -> relu -> mean -> whatever makes logits of eight features."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(images).relu().mean((2, 3)))
        return logits


class Head(nn.Module):
    """Layers a, b, c ... and parameters, and a function of them and of the features."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, features: Tensor) -> Tensor:
        return self.run(self, features)


def names(head: nn.Module) -> set[str]:
    torch.manual_seed(0)
    return {site.name.removeprefix("head.") for site in find_sites(Net(head).eval(), IMAGES)}


def calibration() -> nn.Linear:
    """A scale and a shift; drawn at random, the scale may be too small to see in half precision."""
    layer = nn.Linear(1, 1)
    layer.weight.data.fill_(1.5)
    layer.bias.data.fill_(0.1)
    return layer


def linear(inputs: int = 8, outputs: int = 10) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
        layers[-2].bias.data.fill_(1.0)  # a hidden layer that is dead on both images is no site
    return nn.Sequential(*layers[:-1])


MASKED = torch.zeros(10).index_fill(0, torch.tensor([3, 7]), -1e9)

# what gives the logits -> the sites besides the convolution
torch.manual_seed(0)
HEADS: dict[str, tuple[nn.Module, set[str]]] = {
    "auxiliary head last": (
        Head(lambda s, h: (s.f(h), s.rot(h))[0], f=linear(), rot=linear(8, 4)),
        set(),
    ),
    "auxiliary head of another input": (
        Head(lambda s, h: (s.f(h), s.aux(h[:, :5]))[0], f=linear(), aux=linear(5)),
        set(),
    ),
    "cat of two": (
        Head(lambda s, h: torch.cat([s.a(h), s.b(h)], 1), a=linear(8, 3), b=linear(8, 7)),
        set(),
    ),
    "one linear a class": (
        Head(
            lambda s, h: torch.cat([one(h) for one in s.ones], 1),
            ones=nn.ModuleList(linear(8, 1) for _ in range(10)),
        ),
        set(),
    ),
    "one MLP a class": (
        Head(
            lambda s, h: torch.cat([one(h) for one in s.ones], 1),
            ones=nn.ModuleList(mlp(8, 4, 1) for _ in range(10)),
        ),
        {f"ones.{number}.0" for number in range(10)},
    ),
    "calibrated": (
        Head(
            lambda s, h: s.scale(s.f(h).unsqueeze(-1)).squeeze(-1),
            f=linear(),
            scale=calibration(),
        ),
        set(),
    ),
    "temperature": (
        Head(lambda s, h: s.f(h) * s.t, f=linear(), t=nn.Parameter(torch.tensor(2.0))),
        set(),
    ),
    "logit adjustment": (
        Head(lambda s, h: s.f(h) - s.prior, f=linear(), prior=nn.Parameter(torch.randn(10))),
        set(),
    ),
    "low-rank adapter": (
        Head(
            lambda s, h: s.f(h) + s.up(s.down(h)), f=linear(), down=linear(8, 2), up=linear(2, 10)
        ),
        {"down"},
    ),
    "averaged": (Head(lambda s, h: (s.a(h) + s.b(h)) / 2, a=linear(), b=linear()), set()),
    "averaged, of different inputs": (
        Head(lambda s, h: (s.a(h) + s.b(h[:, :5])) / 2, a=linear(), b=linear(5)),
        set(),
    ),
    "log_softmax": (nn.Sequential(linear(), nn.LogSoftmax(1)), set()),
    "centred": (Head(lambda s, h: s.f(h) - s.f(h).mean(1, keepdim=True), f=linear()), set()),
    "batch norm of logits": (nn.Sequential(linear(), nn.BatchNorm1d(10)), set()),
    "relu of logits": (nn.Sequential(linear(), nn.Softplus()), set()),
    "masked": (Head(lambda s, h: s.f(h) + MASKED, f=linear()), set()),
    "masked_fill": (Head(lambda s, h: s.f(h).masked_fill(MASKED < 0, -1e9), f=linear()), set()),
    "permuted": (Head(lambda s, h: s.f(h)[:, torch.arange(9, -1, -1)], f=linear()), set()),
    "subset of more": (Head(lambda s, h: s.f(h)[:, ::2], f=linear(8, 20)), set()),
    "largest of two a class": (
        Head(lambda s, h: s.f(h).view(-1, 10, 2).amax(2), f=linear(8, 20)),
        set(),
    ),
    "gated by another": (Head(lambda s, h: s.f(h) * s.g(h), f=linear(), g=linear()), set()),
    "two classes as one logit": (
        Head(lambda s, h: torch.cat([-s.f(h), s.f(h)], 1), f=linear(8, 1)),
        set(),
    ),
    "two classes": (mlp(8, 5, 2), {"0"}),
    "two classes, no activation": (nn.Sequential(linear(8, 5), linear(5, 2)), {"0"}),
    "hidden as wide as classes": (mlp(8, 10, 10), {"0"}),
    "hidden as wide, no activation": (nn.Sequential(linear(), linear(10, 10)), {"0"}),
    "two hidden as wide": (mlp(8, 10, 10, 10), {"0", "2"}),
    "bare product": (
        Head(lambda s, h: s.a(h).relu() @ s.w, a=linear(8, 6), w=nn.Parameter(torch.randn(6, 10))),
        {"a"},
    ),
    "cosine": (
        Head(
            lambda s, h: 9 * F.linear(F.normalize(s.a(h)), F.normalize(s.w)),
            a=linear(8, 6),
            w=nn.Parameter(torch.randn(10, 6)),
        ),
        {"a"},
    ),
    "prototypes": (
        Head(
            lambda s, h: -(s.a(h)[:, None] - s.w).pow(2).sum(2),
            a=linear(8, 6),
            w=nn.Parameter(torch.randn(10, 6)),
        ),
        {"a"},
    ),
    "distances": (
        Head(
            lambda s, h: -torch.cdist(s.a(h), s.w),
            a=linear(8, 6),
            w=nn.Parameter(torch.randn(10, 6)),
        ),
        {"a"},
    ),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in HEADS
        for dtype in (torch.float32, torch.bfloat16)
        if (name, dtype) != ("distances", torch.bfloat16)  # PyTorch has no such cdist
    ],
    ids=str,
)
@pytest.mark.parametrize("frozen", [False, True])
def test_what_gives_the_logits_is_no_site(name: str, dtype: torch.dtype, frozen: bool) -> None:
    head, expected = HEADS[name]
    model = Net(copy.deepcopy(head)).eval().to(dtype).requires_grad_(not frozen)
    found = {site.name.removeprefix("head.") for site in find_sites(model, IMAGES.to(dtype))}
    assert found == {"conv", *expected}


def test_networks_that_are_averaged_are_scored_and_their_classifiers_are_not() -> None:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList([Net(linear()), Net(mlp(8, 6, 10))])

        def forward(self, images: Tensor) -> Tensor:
            return torch.stack([net(images) for net in self.nets]).mean(0)

    model = Ensemble().eval()
    found = {site.name for site in find_sites(model, IMAGES)}
    assert found == {"nets.0.conv", "nets.1.conv", "nets.1.head.0"}
    assert find_classifiers(model, IMAGES) == ("nets.1.head.2", "nets.0.head")


def test_a_calibrated_classifier_is_the_one_before_the_calibration() -> None:
    head, _ = HEADS["calibrated"]
    assert find_classifiers(Net(head).eval(), IMAGES) == ("head.f",)


@pytest.mark.parametrize("name", ["bare product", "cosine", "prototypes", "distances"])
def test_where_no_layer_gives_the_logits_no_classifier_is_named(name: str) -> None:
    head, _ = HEADS[name]
    with pytest.raises(UnsupportedModelError, match="found no classifier"):
        find_classifiers(Net(head).eval(), IMAGES)


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, h: F.normalize(s.f(h)),
        lambda s, h: F.normalize(s.f(h)) * s.t,
        lambda s, h: s.f(h).sort(1).values.cumsum(1),
        lambda s, h: F.layer_norm(s.f(h), (10,)),
    ],
    ids=["normalised", "normalised and scaled", "cumulated", "layer norm"],
)
def test_logits_that_no_layer_gives_are_refused(forward: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    head = Head(forward, f=linear(), t=nn.Parameter(torch.tensor(9.0)))
    with pytest.raises(UnsupportedModelError, match="cannot tell which layers give the logits"):
        find_sites(Net(head).eval(), IMAGES)


def test_a_pass_without_gradients_ends_with_its_classifier_or_is_refused() -> None:
    class Cut(Net):
        def forward(self, images: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(images)

    assert [site.name for site in find_sites(Cut(linear()).eval(), IMAGES)] == ["conv"]
    with pytest.raises(UnsupportedModelError, match="no gradient reaches"):
        find_sites(Cut(Head(lambda s, h: 2 * s.f(h), f=linear())).eval(), IMAGES)


def test_a_detached_part_of_the_network_is_still_scored() -> None:
    head = Head(lambda s, h: s.f(h.detach()), f=linear())
    assert names(head) == {"conv"}


def test_gradients_of_the_user_are_left_alone() -> None:
    model = Net(linear()).eval()
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    find_sites(model, IMAGES)
    assert model.head.weight.grad is None
    assert torch.equal(model.conv.weight.grad, torch.ones_like(model.conv.weight))


def test_a_pass_that_cannot_run_with_gradients_is_run_without() -> None:
    class Overwriting(Net):
        def forward(self, images: Tensor) -> Tensor:
            leaf = torch.zeros(1, requires_grad=True)
            leaf += images.sum()  # an error where gradients are on
            return super().forward(images)

    assert [site.name for site in find_sites(Overwriting(linear()).eval(), IMAGES)] == ["conv"]
