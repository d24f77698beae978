"""When the training of masks may end before its last step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from nnprune_backdoor import ANP, CNP, RNP, CleanData, DataError
from nnprune_backdoor.criteria.settling import Settling


def steps_until_settled(settling: Settling, lowest: list[list[int]], count: int = 100) -> int:
    """Masks whose lowest are those named, ten steps of each; 0: never settled."""
    for names in lowest:
        masks = torch.linspace(0.5, 0.9, count)
        masks[names] = torch.linspace(0.0, 0.1, len(names))
        for _ in range(settling.every):
            if settling(masks):
                return settling.steps
    return 0


def test_it_settles_after_three_looks_alike() -> None:
    same = [[5, 6]] * 9
    assert steps_until_settled(Settling(1.0), same) == 40  # the first look has nothing before it
    assert steps_until_settled(Settling(1.0, looks=1), same) == 20


def test_a_change_at_the_low_end_counts_until_half_of_the_steps_are_after_it() -> None:
    # looks 4 and 5 are held against look 2, 6 and 7 against 3, which are from before; then 8 to 10
    moved = [[5, 6]] * 3 + [[6, 7]] * 9
    assert steps_until_settled(Settling(1.0), moved) == 100
    assert steps_until_settled(Settling(0.4), moved) == 40


def test_masks_that_still_go_the_same_way_have_not_settled() -> None:
    settling, slope = Settling(0.9), torch.linspace(1e-3, 1e-4, 100)
    for step in range(1, 400):  # the ranking is the same throughout
        assert not settling(1 - step * slope)
    resting = Settling(0.9)
    depth = [(1 - 0.98**step) * 500 for step in range(400)]
    assert any(resting(1 - part * slope) for part in depth)
    # x = 0.98^(steps / 2) was left to go half as long ago, and x / (1 + x) is to be a tenth: 218
    assert 218 < resting.steps <= 260


def test_what_changes_above_the_low_end_does_not_matter() -> None:
    assert steps_until_settled(Settling(1.0, share=0.01), [[5, 6]] * 4) == 40
    assert steps_until_settled(Settling(1.0, share=0.03), [[5, 6, 9], [5, 6, 8]] * 9) == 0


def test_masks_that_have_not_left_one_have_not_settled() -> None:
    settling = Settling(1.0)
    assert not any(settling(torch.ones(100)) for _ in range(200))


def test_without_a_part_it_never_settles() -> None:
    assert steps_until_settled(Settling(None), [[5, 6]] * 9) == 0


@pytest.mark.parametrize("alike", [0.0, 1.1, -1.0])
def test_parts_that_are_none(alike: float) -> None:
    with pytest.raises(DataError, match=r"settle in \(0, 1\]"):
        Settling(alike)


def test_published_settings_do_not_stop() -> None:
    assert ANP.paper().settle is RNP.paper().settle is CNP.paper().settle is None


def test_criteria_stop_early_with_the_lowest_masks_of_longer_training(
    net: nn.Module, clean: CleanData
) -> None:
    whole = CNP(stamp=lambda x: x.flip(3), ranking="masks", mask_steps=100, mask_batch=16)
    long, short = whole(net, clean), replace(whole, settle=0.5)(net, clean)
    assert long.details["mask_steps"] == 100
    assert short.details["mask_steps"] < 100
    few = len(long.flat) // 50
    lowest = [set(each.flat.argsort()[:few].tolist()) for each in (long, short)]
    assert len(lowest[0] & lowest[1]) >= few / 2


def test_all_three_watch_their_masks(net: nn.Module, clean: CleanData) -> None:
    anp = ANP(batch_size=16, optimise="masks", steps=60, settle=0.2)
    assert anp(net, clean).details["mask_steps"] == 40
    rnp = RNP(
        batch_size=32,
        unlearn_epochs=1,
        unlearn_missed="flag",
        recovery="masks",
        recover_momentum=0.0,
        settle=0.3,
    )
    assert rnp(net, clean).details["mask_steps"] == 20
