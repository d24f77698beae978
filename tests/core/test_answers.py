"""Answers of two models: which images are kept to be shown, and what is said of each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nnprune_backdoor import CleanData
from nnprune_backdoor.core.answers import Answers
from nnprune_backdoor.core.recovered import RecoveredTrigger


class FirstPixel(nn.Module):
    """The label that stands in the first pixel; or always the same."""

    def __init__(self, always: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.always = always

    def forward(self, images: Tensor) -> Tensor:
        labels = images[:, 0, 0, 0].long()
        if self.always is not None:
            labels = labels * 0 + self.always
        return nn.functional.one_hot(labels, 10).float() + self.weight


def saying(labels: list[int]) -> CleanData:
    images = torch.zeros(len(labels), 1, 4, 4)
    images[:, 0, 0, 0] = torch.tensor(labels)
    return CleanData(images, torch.tensor(labels))


def to(target: int) -> RecoveredTrigger:
    mask = torch.zeros(1, 4, 4)
    mask[0, 0, 0] = 1
    return RecoveredTrigger(target, mask, torch.full((1, 4, 4), float(target)), 1.0, 10, 5)


@pytest.mark.parametrize(
    ("labels", "targets", "shown"),
    [
        ([5, 5, 5, 1, 2, 3], (), (0, 3, 4, 5)),  # as many labels as can be
        ([5, 1, 1, 1, 2, 3], (5,), (1, 2, 4, 5)),  # what is a target already shows nothing
        ([5, 5, 5, 1], (5,), (0, 1, 2, 3)),  # where there is nothing else
        ([5, 1], (), (0, 1)),
    ],
)
def test_which_images_are_shown(
    labels: list[int], targets: tuple[int, ...], shown: tuple[int, ...]
) -> None:
    clean = saying(labels)
    found = Answers.of(FirstPixel(), FirstPixel(), clean, [to(target) for target in targets])
    assert found.shown == shown
    assert torch.equal(found.images, clean.images[list(shown)])


def test_the_answers_are_those_of_each_model() -> None:
    clean = saying([5, 1, 2, 3, 4])
    found = Answers.of(FirstPixel(), FirstPixel(always=8), clean, [to(7)])
    assert found.labels is not None
    assert found.labels.tolist() == found.before.tolist() == [5, 1, 2, 3, 4]
    assert found.after.tolist() == [8] * 5
    (stamped,) = found.stamped
    assert stamped.trigger.target == 7
    assert stamped.before == (7, 7, 7, 7)
    assert stamped.after == (8, 8, 8, 8)


def test_images_without_labels() -> None:
    assert (
        Answers.of(FirstPixel(), FirstPixel(), CleanData(saying([1, 2]).images), []).labels is None
    )
