"""Small pictures and confusion: what is shown is what was recovered and counted."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.reports import corner
from helpers.results import PIXELS
from nnprune_backdoor.core.answers import Answers, Stamp, Stamped
from nnprune_backdoor.core.recovered import RecoveredTrigger
from nnprune_backdoor.reports.confusion import confusion_of, confusion_section
from nnprune_backdoor.reports.gallery import example_shelves, shelf_of, trigger_shelf
from nnprune_backdoor.reports.sections import Picture
from nnprune_backdoor.triggers import RecoveredPerturbation


def opened(picture: Picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture.png)))


def perturbation(size: int = 32) -> RecoveredPerturbation:
    """Largest change 0.05 of the range."""
    pattern = torch.zeros(3, size, size)
    pattern[0, 0, 0], pattern[1, 0, 1] = 0.05, -0.02
    return RecoveredPerturbation(4, pattern, PIXELS, 0.9, 12)


def answers(*triggers: Stamp, labels: bool = True, size: int = 32) -> Answers:
    generator = torch.Generator().manual_seed(0)
    stamped = tuple(Stamped(trigger, (4, 4), (0, 4)) for trigger in triggers)
    own = torch.tensor([0, 1, 2, 2]) if labels else None
    images = torch.rand(2, 3, size, size, generator=generator)
    return Answers(
        own, torch.tensor([0, 1, 2, 1]), torch.tensor([0, 1, 1, 2]), (1, 3), images, stamped
    )


def test_a_perturbation_is_amplified_and_the_factor_said() -> None:
    (shelf,) = trigger_shelf([perturbation()], PIXELS)
    (picture,) = shelf.pictures
    pixels = opened(picture)
    assert pixels[0, 0].tolist() == [255, 128, 128]
    assert pixels[0, 1].tolist() == [128, round(255 * (0.5 - 0.02 * 10)), 128]
    assert picture.caption == "label 4: perturbation, times 10"


def test_a_patch_is_shown_on_grey() -> None:
    (shelf,) = trigger_shelf([corner(1)], PIXELS, lambda label: f"no. {label}")
    (picture,) = shelf.pictures
    pixels = opened(picture)
    assert (pixels[:3, :3] == 255).all() and (pixels[3:] == 128).all()
    assert picture.caption == "label no. 1: patch, 9 of 1,024 pixels, on grey"


def test_a_picture_that_shows_through_is_a_blend_and_shown_whole() -> None:
    picture = torch.zeros(3, 32, 32)
    picture[:, :16] = 1
    blend = RecoveredTrigger(2, torch.full((1, 32, 32), 0.15), picture, 1.0, 9, steps=60)
    (shelf,) = trigger_shelf([blend], PIXELS)
    pixels = opened(shelf.pictures[0])
    assert (pixels[:16] == 255).all() and (pixels[16:] == 0).all()
    assert shelf.pictures[0].caption == "label 2: blend, shows through by 0.15"
    assert example_shelves(answers(blend), PIXELS)[1].title == "With the blend of label 2"


def test_images_are_shown_without_and_with_each_trigger() -> None:
    given = answers(corner(4), perturbation())
    plain, patched, perturbed = example_shelves(given, PIXELS)
    assert [shelf.title for shelf in (patched, perturbed)] == [
        "With the patch of label 4",
        "With the perturbation of label 4",
    ]
    assert [picture.caption for picture in plain.pictures] == [
        "label: 1\ngiven model: 1\npurified: 1",
        "label: 2\ngiven model: 1\npurified: 2",
    ]
    assert patched.pictures[0].caption == "given model: 4\npurified: 0"
    assert (opened(patched.pictures[0])[:3, :3] == 255).all()
    images = (255 * given.images).round().permute(0, 2, 3, 1).byte().numpy()
    for picture, image in zip(plain.pictures, images, strict=True):
        assert (opened(picture) == image).all()
    assert "label:" not in example_shelves(answers(labels=False), PIXELS)[0].pictures[0].caption


def test_a_scan_shows_a_trigger_alone_and_on_an_image() -> None:
    example = answers().images[0]
    shelf = shelf_of(corner(2), example, PIXELS)
    assert len(shelf.pictures) == 3
    assert (opened(shelf.pictures[2])[5:] == opened(shelf.pictures[1])[5:]).all()
    assert len(shelf_of(corner(2), None, PIXELS).pictures) == 1


def test_large_and_many_pictures_stay_small() -> None:
    """Twelve triggers of 256 x 256 pixels, of which six are shown, on noise."""
    given = answers(*[perturbation(256)] * 12, size=256)
    triggers = [stamped.trigger for stamped in given.stamped]
    shelves = [*trigger_shelf(triggers, PIXELS), *example_shelves(given, PIXELS)]
    assert shelves[0].title == "The triggers alone: 6 of 12"
    pictures = [picture for shelf in shelves for picture in shelf.pictures]
    assert len(pictures) == 6 + 2 * (1 + 6)
    assert {Image.open(io.BytesIO(picture.png)).size for picture in pictures} == {(96, 96)}
    assert sum(len(picture.png) for picture in pictures) < 600_000


def test_both_matrices_are_counted() -> None:
    found = confusion_of(answers())
    assert found == {
        "labelled": True,
        "before": [[0, 0, 1], [1, 1, 1], [2, 1, 1], [2, 2, 1]],
        "after": [[0, 0, 1], [1, 1, 1], [2, 1, 1], [2, 2, 1]],
    }
    section = confusion_section(found, 3, str)
    assert [title for title, _ in section.beside] == ["Model as given", "Purified model"]
    table = section.beside[1][1]
    assert [list(row) for row in table.rows] == [
        ["0", "1", "", ""],
        ["1", "", "1", ""],
        ["2", "", "1", "1"],
    ]
    assert table.shades == [[0, 4, 0, 0], [0, 0, 4, 0], [0, 0, 2, 2]]


def test_without_labels_the_given_model_stands_for_them() -> None:
    found = confusion_of(answers(labels=False))
    assert found["before"] == [[0, 0, 1], [1, 1, 2], [2, 2, 1]]
    section = confusion_section(found, 3, str)
    assert [title for title, _ in section.beside] == ["Purified model"]
    assert "the given model's own answers" in section.text[0]


@pytest.mark.parametrize("labelled", [True, False])
def test_of_many_classes_the_pairs_that_are_confused_most(labelled: bool) -> None:
    given = replace(
        answers(),
        labels=torch.tensor([7] * 5 + [8] * 3 + [9]) if labelled else None,
        before=torch.tensor([7] * 5 + [30] * 3 + [9]),
        after=torch.tensor([11] * 5 + [8] * 3 + [9]),
    )
    section = confusion_section(confusion_of(given), 50, lambda label: f"<{label}>")
    assert section.table is not None and not section.beside
    rows = [list(row) for row in section.table.rows]
    if labelled:
        assert rows == [["<7>", "<11>", "0", "5"], ["<8>", "<30>", "3", "0"]]
    else:
        assert rows == [["<7>", "<11>", "5"], ["<30>", "<8>", "3"]]
