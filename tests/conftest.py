"""Tiny real networks and clean images that the tests share."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from helpers.images import generator, noise_images
from helpers.networks import PIXELS, SMALL, build
from nnprune_backdoor import CleanData, attacks, demo
from nnprune_backdoor.attacks import train_classifier
from nnprune_backdoor.core.sites import Site, find_sites

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: what begins last must not keep one process busy alone."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


@pytest.fixture(params=list(SMALL))
def any_model(request: pytest.FixtureRequest) -> nn.Module:
    """Each of the small architectures in turn; a new one for each test."""
    return build(request.param)


@pytest.fixture(scope="session")
def clean() -> CleanData:
    """64 labelled images, ten classes, that can be learned: a pattern a class, under noise."""
    labels = torch.arange(64) % 10
    patterns = torch.randn(10, 3, 4, 4, generator=generator(1))
    patterns = nn.functional.interpolate(patterns, PIXELS, mode="bilinear")
    return CleanData(patterns[labels] + 0.7 * noise_images(64, seed=2), labels)


@pytest.fixture(scope="session")
def _trained(clean: CleanData) -> nn.Module:
    model = build("test_resnet")
    train_classifier(model, clean.images, clean.targets, epochs=12, batch_size=32, lr=0.05)
    with torch.no_grad():
        share = (model(clean.images).argmax(1) == clean.targets).float().mean()
    assert share > 0.9, "the tests below need a network that has learned something"
    return model


@pytest.fixture
def trained(_trained: nn.Module) -> nn.Module:
    """A test_resnet that classifies `clean` rightly; one's own copy, trainable, in eval mode."""
    return copy.deepcopy(_trained)


@pytest.fixture
def net(trained: nn.Module) -> nn.Module:
    """What criteria are given: the trained network, frozen."""
    return trained.requires_grad_(False)


@pytest.fixture
def sites(net: nn.Module, clean: CleanData) -> tuple[Site, ...]:
    """The sites of `net`."""
    return find_sites(net, clean.images[:2])


@pytest.fixture(scope="session")
def photographs_cut_once() -> Iterator[None]:
    """Cutting them takes longer than the training of some tests."""
    once = functools.cache(attacks.photo_patches)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(attacks, "photo_patches", once)
        patched.setattr(demo, "photo_patches", once)
        yield
