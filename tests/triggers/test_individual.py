"""A perturbation for each image: inside ball and range, and it sends images to the label."""

from __future__ import annotations

import pytest
import torch

from helpers.images import noise_images
from helpers.networks import build
from helpers.states import assert_same_state, state_of
from nnprune_backdoor.core.predictions import predict_logits
from nnprune_backdoor.core.recovered import PixelRange
from nnprune_backdoor.errors import DataError
from nnprune_backdoor.triggers import IndividualPerturbations


@pytest.mark.parametrize("rms", [0.02, 0.3])
def test_each_image_moves_towards_the_label_inside_ball_and_range(rms: float) -> None:
    model, images = build("test_resnet"), noise_images(12)
    pixels = PixelRange.seen_in(images)
    before, modes = state_of(model), [module.training for module in model.modules()]
    moved = [
        IndividualPerturbations(rms=rms, steps=steps).perturb(
            model, images, 2, pixels, torch.Generator().manual_seed(0)
        )
        for steps in (1, 5)
    ]
    for one in moved:
        shares = (one - images) / (pixels.high - pixels.low)
        assert shares.square().flatten(1).mean(1).sqrt().max() <= rms * 1.001
        assert (shares.flatten(1).abs().amax(1) > 0).all()
        assert (one >= pixels.low).all() and (one <= pixels.high).all()
        assert not one.requires_grad
    given, *sure = (predict_logits(model, x).float().log_softmax(1) for x in (images, *moved))
    assert (sure[1][:, 2] > given[:, 2]).all()
    there = [(x.argmax(1) == 2).float().mean() for x in sure]
    assert there[1] >= there[0] and (there[1] == 1 or sure[1][:, 2].mean() > sure[0][:, 2].mean())
    assert_same_state(before, state_of(model))
    assert [module.training for module in model.modules()] == modes
    assert all(weight.grad is None for weight in model.parameters())


def test_an_image_that_is_there_is_not_moved_on() -> None:
    model, images = build("test_resnet"), noise_images(12)
    pixels = PixelRange.seen_in(images)
    settings = IndividualPerturbations(rms=0.3, steps=6)

    def perturbed(images: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return settings.perturb(model, images, 2, pixels, generator)

    def size(change: torch.Tensor) -> torch.Tensor:
        return (change / (pixels.high - pixels.low)).square().flatten(1).mean(1).sqrt()

    moved = perturbed(images)
    assert (predict_logits(model, moved).argmax(1) == 2).all()
    again = perturbed(moved)
    beginning = 0.1 * settings.rms  # random, where nothing is known of the image yet
    assert (size(again - moved) <= 1.001 * beginning).all()
    assert (size(moved - images) > 1.001 * beginning).all()  # the control


def test_other_images_beside_it_do_not_matter() -> None:
    model, images = build("test_resnet"), noise_images(6)
    pixels = PixelRange.seen_in(images)
    both, alone = (
        IndividualPerturbations().perturb(model, some, 1, pixels, torch.Generator().manual_seed(0))
        for some in (images, images[:3])
    )
    torch.testing.assert_close(both[:3], alone, rtol=1e-3, atol=1e-4)


def test_bad_settings_are_refused() -> None:
    for bad in ({"steps": 0}, {"rms": 0.0}, {"rms": 1.5}):
        with pytest.raises(DataError, match="steps of at least 1 and rms"):
            IndividualPerturbations(**bad)  # type: ignore[arg-type]
