"""Data sets by name: what is on disk is read as torchvision lays it out, and nothing is fetched."""

from __future__ import annotations

import csv
import socket
from pathlib import Path

import pytest
from PIL import Image

from helpers.images import write_mnist
from nnprune_backdoor import Preprocessing
from nnprune_backdoor.errors import DataError, UnknownNameError
from nnprune_backdoor.files.datasets import list_datasets, read_dataset

GREY = Preprocessing(size=(28, 28), mean=(0.5,), std=(0.5,))
COLOUR = Preprocessing(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)


def test_images_and_labels_are_those_on_disk(tmp_path: Path) -> None:
    found = read_dataset("mnist", write_mnist(tmp_path), GREY)
    assert found.files == tuple(f"test/{i}" for i in range(30))
    assert found.data.targets.tolist() == [i % 10 for i in range(30)]
    greys = (255 * GREY.pixels(found.data.images)[:, 0, 0, 0]).round().int().tolist()
    assert greys == [5 * i for i in range(30)]
    assert len(found.classes) == 10
    assert found.classes[3].startswith("3")


def test_a_draw_follows_the_seed(tmp_path: Path) -> None:
    root = write_mnist(tmp_path)
    drawn = [read_dataset("mnist", root, GREY, limit=8, seed=seed).files for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 8
    assert read_dataset("mnist", root, GREY, split="train", limit=1).files[0].startswith("train/")


def write_gtsrb(root: Path) -> Path:
    folder = root / "gtsrb" / "GTSRB" / "Final_Test" / "Images"
    folder.mkdir(parents=True)
    rows = [("Filename", "ClassId")]
    for number in range(4):
        Image.new("RGB", (9, 9), (60 * number,) * 3).save(folder / f"{number}.ppm")
        rows.append((f"{number}.ppm", str(number + 3)))
    with (root / "gtsrb" / "GT-final_test.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=";").writerows(rows)
    return root


def test_a_data_set_without_names_has_numbers(tmp_path: Path) -> None:
    found = read_dataset("gtsrb", write_gtsrb(tmp_path), COLOUR)
    assert found.data.targets.tolist() == [3, 4, 5, 6]
    assert found.classes == tuple(map(str, range(43)))
    (tmp_path / "gtsrb" / "GTSRB" / "Final_Test" / "Images" / "2.ppm").write_text("cut short")
    with pytest.raises(DataError, match=r"'gtsrb', image 2: damaged"):
        read_dataset("gtsrb", tmp_path, COLOUR)


@pytest.mark.parametrize("name", list_datasets())
def test_what_is_not_there_is_said_and_not_fetched(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("it went to the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    preprocessing = GREY if name.endswith("mnist") else COLOUR
    with pytest.raises(DataError, match=f"no '{name}' as torchvision lays it out"):
        read_dataset(name, tmp_path, preprocessing)
    with pytest.raises(DataError, match="no such folder"):
        read_dataset(name, tmp_path / "none", preprocessing)


def test_misuse(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'cifar10'"):
        read_dataset("cifar", tmp_path, COLOUR)
    with pytest.raises(DataError, match="split 'test' or 'train'"):
        read_dataset("mnist", tmp_path, GREY, split="val")
    with pytest.raises(DataError, match="at least one"):
        read_dataset("mnist", tmp_path, GREY, limit=0)
