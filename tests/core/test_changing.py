"""Networks that keep, in eval mode, what they once computed from their weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from helpers.images import noise_images
from nnprune_backdoor import CleanData
from nnprune_backdoor.core.changing import changing_weights
from nnprune_backdoor.criteria import Unlearning
from nnprune_backdoor.evidence import Relearning, relearn
from nnprune_backdoor.training import Distillation, FineTuning, distil, fine_tune


class Keeping(nn.Module):
    """Keeps twice its weight in eval mode, until its mode is set."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.weight = nn.Parameter(torch.ones(2))
        self.kept: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Keeping:
        self.kept = {}
        super().train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if "twice" not in self.kept:
            self.kept["twice"] = 2 * self.weight
        return x * self.kept["twice"]


def test_each_pass_starts_from_the_weights() -> None:
    model, x = Keeping().eval(), torch.ones(2)
    model.inner.train()
    with changing_weights(model):
        for value in (1.0, 3.0):
            with torch.no_grad():
                model.weight.fill_(value)
            output = model(x)
            output.sum().backward()
            assert output.tolist() == [2 * value] * 2
        with torch.no_grad():
            model.weight.fill_(5.0)
    assert model(x).tolist() == [10.0, 10.0]  # nothing stale is left
    assert not model._forward_pre_hooks
    assert not model.training
    assert model.inner.training


def test_a_network_that_keeps_nothing_gets_no_hook() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with changing_weights(model):
        assert not model._forward_pre_hooks


def unlearned(model: nn.Module, clean: CleanData) -> nn.Module:
    settings = Unlearning(epochs=2, stop=-1.0, missed="flag", batch_size=8)
    return settings.unlearn(model, clean, torch.Generator().manual_seed(0), False)[0]


def distilled(model: nn.Module, clean: CleanData) -> nn.Module:
    settings = Distillation(epochs=2, batch_size=8, stamped=0.0)
    return distil(model, model, clean, settings, progress=False)


def tuned(model: nn.Module, clean: CleanData) -> nn.Module:
    return fine_tune(model, clean, FineTuning(epochs=2, batch_size=8), progress=False)


@pytest.fixture
def biased() -> nn.Module:
    """EfficientViT, whose attention biases are not zero."""
    torch.manual_seed(0)
    model = timm.create_model("efficientvit_m0", img_size=64, num_classes=10).eval()
    for name, weight in model.named_parameters():
        if name.endswith("attention_biases"):
            nn.init.normal_(weight)
    return model


@pytest.fixture
def clean() -> CleanData:
    return CleanData(noise_images(16).repeat(1, 1, 2, 2), torch.arange(16) % 10)


@pytest.mark.parametrize("train", [unlearned, distilled, tuned])
def test_attention_biases_are_trained_and_none_is_kept(
    biased: nn.Module, clean: CleanData, train: Callable[[nn.Module, CleanData], nn.Module]
) -> None:
    with torch.no_grad():
        biased(clean.images)  # keeps the biases
    product = train(biased, clean).eval()
    weights = product.state_dict()
    biases = [name for name in weights if name.endswith("attention_biases")]
    assert biases
    assert all(not torch.equal(weights[name], biased.state_dict()[name]) for name in biases)
    fresh = timm.create_model("efficientvit_m0", img_size=64, num_classes=10).eval()
    fresh.load_state_dict(weights)
    with torch.no_grad():
        assert torch.equal(product(clean.images), fresh(clean.images))


def test_relearning_takes_several_steps(biased: nn.Module, clean: CleanData) -> None:
    settings = Relearning(steps=2, batch_size=4)
    found = relearn(biased, clean, lambda images: images + 1, 3, settings, progress=False)
    assert len(found.successes) == 3
