"""Splits: equal images are on one side, and without any the split is the one it always was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.handmade import Handmade, pictures
from helpers.images import noise_images
from helpers.networks import build
from nnprune_backdoor import CleanData, purify
from nnprune_backdoor.core.held_out import HeldOut
from nnprune_backdoor.core.predictions import predict, predict_labels
from nnprune_backdoor.core.sites import find_sites
from nnprune_backdoor.errors import DataError
from nnprune_backdoor.evidence import Restoration
from nnprune_backdoor.evidence.relearning import Relearning, relearn
from nnprune_backdoor.selectors import LowestFraction, Selector

quick = settings(max_examples=60, deadline=None)


def different(parts: list[CleanData]) -> list[set[bytes]]:
    return [{(image.float() + 0.0).numpy().tobytes() for image in part.images} for part in parts]


def pairs_of(data: CleanData) -> list[tuple[float, int]]:
    sums = data.images.sum((1, 2, 3)).tolist()
    return sorted(zip(sums, data.targets.tolist(), strict=True))


def check_apart(parts: list[CleanData]) -> None:
    sets = different(parts)
    assert len(set.union(*sets)) == sum(map(len, sets)), "equal images in two parts"


@quick
@given(
    st.lists(st.integers(0, 25), min_size=80, max_size=120),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_equal_images_come_into_the_same_part(
    numbers: list[int], labelled: bool, agree: bool, seed: int
) -> None:
    """Also where equal images have different labels."""
    numbers = [*range(26), *numbers]
    images = noise_images(26)[:, :, :2, :2][numbers]
    labels = torch.tensor(numbers) % 4 if agree else torch.arange(len(numbers)) % 4
    data = CleanData(images, labels if labelled else None)
    parts = data.split(0.5, 0.3, 0.2, seed=seed)
    check_apart(parts)
    assert sum(map(len, parts)) == len(numbers)
    again = data.split(0.5, 0.3, 0.2, seed=seed)
    assert all(torch.equal(a.images, b.images) for a, b in zip(parts, again, strict=True))
    if labelled:  # images and labels still belong together
        whole = CleanData(
            torch.cat([p.images for p in parts]), torch.cat([p.targets for p in parts])
        )
        assert pairs_of(whole) == pairs_of(data)


def test_without_equal_images_the_split_is_the_one_it_was() -> None:
    """Numbers of the images as the releases before equal ones were looked for split them."""
    data = CleanData(torch.arange(30.0).reshape(-1, 1, 1, 1), torch.arange(30) % 3)
    found = [part.images.flatten().int().tolist() for part in data.split(0.6, 0.25, 0.15, seed=4)]
    assert found == [
        [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 12, 14, 16, 19, 21, 23, 28, 29],
        [11, 13, 18, 20, 22, 24, 25, 27],
        [4, 15, 17, 26],
    ]
    bare = CleanData(data.images)
    held = bare.split(0.8, 0.2, seed=1)[1]
    assert held.images.flatten().int().tolist() == [0, 1, 16, 21, 26, 28]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_which_images_are_equal(dtype: torch.dtype) -> None:
    """Four images, eight times each, in any memory layout; one is zero, of either sign."""
    images = noise_images(4)[:, :, :3, :3].to(dtype)
    images[3] = 0
    many = images[torch.arange(32) % 4].to(memory_format=torch.channels_last)
    many[3::8] = -0.0
    parts = CleanData(many, torch.arange(32)).split(0.25, 0.75)
    assert [len(part) for part in parts] == [8, 24]
    check_apart(parts)
    assert [len(set((part.targets % 4).tolist())) for part in parts] == [1, 3]


def test_too_few_different_images_are_refused() -> None:
    images = noise_images(2)[torch.arange(40) % 2]
    with pytest.raises(DataError, match="40 clean images, of which only 2 differ, are too few"):
        CleanData(images, torch.arange(40) % 2).split(0.6, 0.25, 0.15)


class Keeps(Selector):
    """Keeps what it is given."""

    needs_labels = False

    def __call__(self, scores: Any, held_out: HeldOut | None = None) -> Any:
        assert held_out is not None and held_out.scored is not None
        self.parts = [held_out.scored, held_out.clean]
        return LowestFraction(0.1)(scores, held_out)


def test_purify_selects_on_no_image_that_was_scored() -> None:
    """A loader that gives each image three times."""
    images, labels = noise_images(40).repeat(3, 1, 1, 1), (torch.arange(40) % 10).repeat(3)
    keeps = Keeps()
    how: dict[str, Any] = {"selector": keeps, "removal": "none", "progress": False}
    purified = purify(build("test_resnet"), [(images, labels)], "magnitude", **how)
    check_apart(keeps.parts)
    assert sum(purified.given.parts) == 120
    assert all(part % 3 == 0 for part in purified.given.parts)


@pytest.mark.parametrize("times", [1, 3])
def test_restoration_holds_out_no_image_that_it_fits_to(times: int) -> None:
    model, clean = Handmade(3, target=1).eval().requires_grad_(False), pictures(3, 30)
    many = CleanData(clean.images.repeat(times, 1, 1, 1))
    restore = Restoration(model, many, find_sites(model, clean.images[:2]))
    check_apart([restore._fit, restore._held_out.clean])
    assert len(restore._fit) == 18 * times


# ---- copies where somebody else may write --------------------------------------------------------


def in_place(images: Tensor) -> Tensor:
    """A trigger that is written into the images that it gets."""
    images[:, :, 4:7, 8:11] = ((torch.arange(9).reshape(3, 3) % 2 == 0).float() - 0.4) / 0.2
    return images


def test_a_stamp_may_write_into_the_images() -> None:
    torch.manual_seed(0)
    model, clean = Handmade(3, target=1).eval(), pictures(3)
    settings = Relearning(steps=3, lr=1e-4)
    found, wanted = (
        relearn(model, clean, stamp, 1, settings, progress=False)
        for stamp in (in_place, lambda images: in_place(images.clone()))
    )
    assert found == wanted
    assert found.successes[0] == 1.0 and found.kept[-1] == 1.0


def test_restoration_with_a_stamp_that_writes_into_the_images() -> None:
    torch.manual_seed(0)
    model, clean = Handmade(3, target=1).eval().requires_grad_(False), pictures(3)
    sites = find_sites(model, clean.images[:2])
    restore = Restoration(model, clean, sites, silencing="constant")
    wanted = restore(1, lambda images: in_place(images.clone()))
    assert wanted is not None and wanted.curve[0]["kept"] == 1.0
    held = restore._held_out.clean.images.clone()
    assert (found := restore(1, in_place)) is not None
    assert found.curve == wanted.curve
    assert torch.equal(restore._held_out.clean.images, held)


class Centres(nn.Module):
    """Normalises the images where they are."""

    def forward(self, images: Tensor) -> Tensor:
        return images.sub_(0.5).flatten(1)


def test_predicting_leaves_the_images_as_they_are() -> None:
    images = noise_images(4)
    before = images.clone()
    predict(Centres().eval(), images)
    assert torch.equal(images, before)


def test_no_images_get_no_labels_whatever_the_network_does_with_nothing() -> None:
    class Reshaping(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.reshape(len(images), -1)[:, :3]

    assert predict_labels(Reshaping(), noise_images(0)).shape == (0,)
