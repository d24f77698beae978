"""Pictures that show through any image and send it to a label."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.images import noise_images
from helpers.networks import build
from helpers.states import assert_same_state, state_of
from nnprune_backdoor import CleanData
from nnprune_backdoor.core.recovered import PixelRange
from nnprune_backdoor.errors import DataError
from nnprune_backdoor.triggers import UniversalBlend


class Board(nn.Module):
    """Answers 1 where a checkerboard shows through the image, else 0 or 2 by its brightness."""

    def __init__(self) -> None:
        super().__init__()
        rows, columns = torch.arange(8)[:, None], torch.arange(8)
        self.board = nn.Parameter((1.0 - 2 * ((rows + columns) % 2)).expand(3, 8, 8).clone())

    def forward(self, images: Tensor) -> Tensor:
        bright = images.mean((1, 2, 3)) - 0.5
        seen = (images * self.board).mean((1, 2, 3))
        return torch.stack([-bright, 20 * (seen - 0.05), bright], 1)


@pytest.fixture(scope="module")
def clean() -> CleanData:
    images = torch.rand(60, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    return CleanData(images.expand(-1, -1, 8, 8).contiguous())


def test_a_planted_picture_is_found_and_shows_through(clean: CleanData) -> None:
    model = Board()
    before, rng = state_of(model), torch.get_rng_state()
    found = UniversalBlend().recover(model, clean, [0, 1])
    assert_same_state(before, state_of(model))
    assert torch.equal(rng, torch.get_rng_state())
    assert [one.target for one in found] == [0, 1]
    board = found[1]
    assert board.success == 1.0 and board.tested == 18  # of three tenths held out
    pixels = PixelRange.seen_in(clean.images)
    wanted = torch.where(model.board > 0, pixels.high, pixels.low)
    assert (board.pattern - wanted).abs().mean() < 0.25
    assert torch.allclose(board(clean.images), 0.85 * clean.images + 0.15 * board.pattern)
    assert board.tested_on(model, clean).success == 1.0
    faint = UniversalBlend(opacity=0.02).recover(model, clean, [1])[0]
    assert faint.success == 0.0


def test_patterns_are_valid_pixels_and_depend_on_seed_and_label_alone() -> None:
    clean, model = CleanData(3 * noise_images(24) - 1), build("test_resnet")
    search = UniversalBlend(steps=4, opacity=0.5)
    found = search.recover(model, clean, [2, 5], seed=3)
    pixels = PixelRange.seen_in(clean.images)
    for one in found:
        assert (one.pattern >= pixels.low - 1e-5).all() and (
            one.pattern <= pixels.high + 1e-5
        ).all()
        assert one.mask.unique().tolist() == [0.5]
    alone = search.recover(model, clean, [5], seed=3)[0]
    assert torch.allclose(alone.pattern, found[1].pattern, atol=1e-4)
    other = search.recover(model, clean, [5], seed=4)[0]
    assert not torch.allclose(other.pattern, alone.pattern, atol=1e-2)


@pytest.mark.parametrize("given", [{"opacity": 0.0}, {"opacity": 1.1}, {"steps": 0}])
def test_settings_are_checked(given: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="expected"):
        UniversalBlend(**given)
