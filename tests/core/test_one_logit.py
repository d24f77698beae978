"""Classifiers with one logit an image: read as two classes, and given back as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.images import generator, noise_images
from nnprune_backdoor import CleanData, load_purified, purify, save_purified
from nnprune_backdoor.core.outputs import logits_alone
from nnprune_backdoor.core.predictions import predict
from nnprune_backdoor.core.sites import find_classifiers, find_sites
from nnprune_backdoor.errors import DataError, UnsupportedModelError
from nnprune_backdoor.evidence import Scan
from nnprune_backdoor.selectors import LowestFraction
from nnprune_backdoor.training import Distillation, distil
from nnprune_backdoor.triggers import Inversion

LABELS = torch.arange(96) % 2
PATTERNS = F.interpolate(torch.randn(2, 3, 4, 4, generator=generator(1)), 32, mode="bilinear")
CLEAN = CleanData(PATTERNS[LABELS] + 0.3 * noise_images(96, seed=2), LABELS)

ENDS: dict[str, Callable[[], list[nn.Module]]] = {
    "(N, 1)": lambda: [],
    "(N,)": lambda: [nn.Flatten(0)],
}


def binary(end: str = "(N, 1)", seed: int = 0) -> nn.Sequential:
    """Trained for a moment, with a linear layer in front of its last one."""
    torch.manual_seed(seed)
    body = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(256, 8),
        nn.Linear(8, 1),
    )
    optimiser = torch.optim.Adam(body.parameters(), 0.01)
    for _ in range(12):
        loss = F.binary_cross_entropy_with_logits(body(CLEAN.images).flatten(), LABELS.float())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model = body.extend(ENDS[end]()).eval()
    assert (said(model, CLEAN.images) == LABELS).float().mean() > 0.9
    return model


def said(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return (model(images).flatten() > 0).long()


@pytest.mark.parametrize("end", ENDS)
def test_the_two_logits_mean_what_the_one_does(end: str) -> None:
    model = binary(end)
    two = logits_alone(model, CLEAN.images[:2])(CLEAN.images)
    z = binary()(CLEAN.images).flatten()
    assert two.shape == (96, 2)
    assert torch.allclose(two.softmax(1)[:, 1], z.sigmoid(), atol=1e-5)
    wanted = F.binary_cross_entropy_with_logits(z, LABELS.float())
    assert torch.allclose(F.cross_entropy(two, LABELS), wanted, atol=1e-4)
    assert torch.equal(predict(model, CLEAN.images), said(model, CLEAN.images))


@pytest.mark.parametrize("end", ENDS)
def test_its_classifier_and_its_neurons_are_found(end: str) -> None:
    model = binary(end)
    assert find_classifiers(model, CLEAN.images[:2]) == ("8",)
    assert [site.name for site in find_sites(model, CLEAN.images[:2])] == ["1", "3", "7"]
    assert not model._forward_hooks


@pytest.mark.parametrize("end", ENDS)
def test_it_is_purified_and_given_back_as_it_was(end: str, tmp_path: Path) -> None:
    model = binary(end)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    purified = purify(
        model, CLEAN, "magnitude", selector=LowestFraction(0.2), repair="none", progress=False
    )
    assert purified.selection.neurons
    product = purified.model
    assert product(CLEAN.images[:5]).shape == model(CLEAN.images[:5]).shape
    assert type(product[-1]) is type(model[-1]) and not product._forward_hooks
    assert (said(product, CLEAN.images) == LABELS).float().mean() > 0.8
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    save_purified(purified, tmp_path / "saved", arch=None)
    again = load_purified(tmp_path / "saved", model=binary(end, seed=1))
    assert torch.equal(again(CLEAN.images[:5]), product(CLEAN.images[:5]))


def test_distilling_gives_back_one_logit() -> None:
    model, pruned = binary(), binary(seed=3)
    settings = Distillation(epochs=2, stamped=0, turned=0)
    student = distil(pruned, model, CleanData(CLEAN.images), settings)
    assert student(CLEAN.images[:3]).shape == (3, 1)
    assert not student._forward_hooks and not model._forward_hooks and not pruned._forward_hooks


@pytest.mark.slow
def test_a_scan_asks_about_both_of_its_classes() -> None:
    quick: dict[str, Any] = {"search": Inversion(steps=4, batch_size=32), "candidates": 2}
    model = binary()
    diagnosis = Scan(**quick)(model, CLEAN, progress=False)
    assert diagnosis.classes == 2 and {trigger.target for trigger in diagnosis.triggers} == {0, 1}
    assert not model._forward_hooks


@pytest.mark.parametrize("last", [[nn.Sigmoid()], [nn.Sigmoid(), nn.Flatten(0)]])
def test_a_sigmoid_at_the_end_is_refused_with_what_to_do(last: list[nn.Module]) -> None:
    model = binary().extend(last).eval()
    with pytest.raises(UnsupportedModelError, match=r"nn.Identity\(\) in place of its last"):
        purify(model, CLEAN, "magnitude", progress=False)


def test_labels_of_several_classes_an_image_are_refused_with_the_reason() -> None:
    many = [(CLEAN.images, F.one_hot(LABELS, 2).float())]
    with pytest.raises(DataError, match="Multi-label classifiers are not purified"):
        purify(binary(), many, "magnitude", progress=False)
