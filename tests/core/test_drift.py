"""One huge logit hides nothing: drift is measured class by class."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from helpers.images import noise_images
from helpers.networks import build
from nnprune_backdoor import CleanData, purify
from nnprune_backdoor.core.checks import check_repeatable
from nnprune_backdoor.core.compute import Compute
from nnprune_backdoor.core.drift import allowed_drift, logit_drift
from nnprune_backdoor.errors import UnsupportedModelError
from nnprune_backdoor.selectors import LowestCount, LowestFraction

CLEAN = CleanData(noise_images(40), torch.arange(40) % 10)


class Masked(nn.Module):
    """Some classes' logits get a constant, as for a subset of ImageNet's."""

    def __init__(self, net: nn.Module, value: float, classes: int = 3, how: str = "add") -> None:
        super().__init__()
        self.net, self.value, self.classes, self.how = net, value, classes, how

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        mask = torch.arange(logits.shape[1]) < self.classes
        if self.how == "fill":
            return logits.masked_fill(mask, self.value)
        return logits + mask.to(logits) * self.value


MASKS = [(-1e9, 1, "add"), (-1e9, 7, "add"), (-1e4, 3, "add"), (-1e30, 3, "fill"), (-1e7, 8, "add")]


@pytest.mark.parametrize(("value", "masked", "how"), [*MASKS, (0.0, 0, "add")])
@pytest.mark.parametrize("images", [2, 16])
def test_drift_is_measured_class_by_class(value: float, masked: int, how: str, images: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(images, 10, generator=generator)
    model = Masked(nn.Identity(), value, masked, how)
    expected = model(logits)
    rounded = model(logits * (1 + 3e-7 * torch.randn(logits.shape, generator=generator)))
    assert logit_drift(expected, expected) == 0
    assert logit_drift(expected, rounded) < allowed_drift(torch.float32) / 5
    for row in range(10 - masked):  # one logit of one image, by a hundredth of their spread
        wrong = expected.clone()
        wrong[0, masked + row] += 0.03
        assert logit_drift(expected, wrong) > 10 * allowed_drift(torch.float32)


def test_an_untrained_network_that_hardly_tells_images_apart_may_round() -> None:
    logits = 0.5 + 1e-4 * torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
    assert logit_drift(logits, logits + 5e-7) < allowed_drift(torch.float32)
    half = (100 * logits).to(torch.bfloat16)
    assert logit_drift(half, half * (1 + 2**-8)) < allowed_drift(torch.bfloat16)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_drifts(wrong: float) -> None:
    logits = torch.randn(4, 10)
    given = logits.clone()
    given[1, 2] = wrong
    assert not logit_drift(logits, given) <= 1


class Noisy(nn.Module):
    """Its logits change from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build("test_resnet")

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits + logits.std() * torch.randn(logits.shape)


@pytest.mark.parametrize(("value", "masked", "how"), MASKS)
def test_noise_inside_is_seen_beside_masked_classes(value: float, masked: int, how: str) -> None:
    check_repeatable(Masked(build("test_resnet"), value, masked, how).eval(), CLEAN.images)
    with pytest.raises(UnsupportedModelError, match="changes with chance"):
        check_repeatable(Masked(Noisy(), value, masked, how).eval(), CLEAN.images)


class Tied(nn.Module):
    """Two convolutions with one weight: silencing a channel of one silences the other's too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias
        self.fc = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        parts = self.first(images).relu(), self.second(images.flip(1)).relu()
        return self.fc(torch.cat(parts, 1).mean((2, 3)))


@pytest.mark.parametrize(("value", "masked", "how"), MASKS)
def test_tied_weights_are_seen_beside_masked_classes(value: float, masked: int, how: str) -> None:
    model = Masked(Tied(), value, masked, how).eval()
    with pytest.raises(UnsupportedModelError, match="shared between layers"):
        purify(model, CLEAN, "magnitude", selector=LowestCount(1), progress=False)


@pytest.mark.parametrize(("value", "masked", "how"), MASKS)
def test_a_masked_network_is_purified_as_without_the_mask(
    value: float, masked: int, how: str
) -> None:
    plain, options = build("test_resnet"), {"selector": LowestFraction(0.3), "progress": False}
    model = Masked(plain, value, masked, how).eval()
    labels = masked + torch.arange(40) % (10 - masked)
    clean = CleanData(CLEAN.images, labels)
    given, wanted = (purify(net, clean, "magnitude", **options) for net in (model, plain))
    assert given.removal.drift <= allowed_drift(torch.float32)
    assert len(given.removal.removed) == len(wanted.removal.removed) > 0
    with torch.no_grad():
        logits = [net(CLEAN.images)[:, masked:] for net in (given.model, wanted.model)]
    assert logit_drift(logits[1], logits[0]) < 1e-3


@pytest.mark.parametrize("value", [0.0, -1e9])
def test_a_layout_that_computes_something_else_is_not_taken(value: float) -> None:
    class Flattened(nn.Module):
        """Reads memory in the order in which it lies."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 30 * 30, 10)

        def forward(self, images: Tensor) -> Tensor:
            maps = self.conv(images)
            flat = torch.as_strided(maps, (len(maps), 3600), (3600, 1))
            return 0.01 * self.fc(flat)

    model = Masked(Flattened(), value, 2).eval()
    kept = copy.deepcopy(model)
    Compute(channels_last=True).lay_out_(model, CLEAN.images[:4])
    assert model.net.conv.weight.is_contiguous()
    with torch.no_grad():
        assert torch.equal(model(CLEAN.images[:4]), kept(CLEAN.images[:4]))
