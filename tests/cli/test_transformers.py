"""The command line on a folder of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

from helpers.transformers_models import CLASSES, images_for, logits_of, small, transformers
from nnprune_backdoor import load_model, load_purified
from nnprune_backdoor.cli.main import main
from nnprune_backdoor.files import read_record

pytestmark = pytest.mark.cli


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, a ViT with its processor, and `clean`, images in class folders."""
    root = tmp_path_factory.mktemp("given")
    small("ViT").save_pretrained(root / "model")  # type: ignore[operator]
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(root / "model")
    draw = np.random.default_rng(0)
    for number in range(40):
        folder = root / "clean" / f"class{number % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def run(root: Path, command: str, *more: Path | str) -> int:
    words = [str(root / word) if word in ("model", "clean") else word for word in command.split()]
    return main([*words, *map(str, more)])


PURIFY = "purify model --arch hf --clean clean --method magnitude --fraction 0.1 --quiet --out"


def test_in_its_shape_it_is_a_folder_of_transformers_again(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(given, PURIFY, out, "--removal", "none") == 0
    images = images_for("ViT", 2)
    model = transformers.AutoModelForImageClassification.from_pretrained(out)
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    assert (processor.size["height"], processor.image_mean[0]) == (32, 0.5)
    assert torch.equal(logits_of(model, images), logits_of(load_purified(out), images))
    assert not torch.equal(
        logits_of(model, images), logits_of(load_model(given / "model", "hf"), images)
    )
    answers: list[Any] = []
    for options in ([], ["--arch", "hf"]):
        capsys.readouterr()
        assert (
            run(given, "evaluate", out, "--clean", given / "clean", "--format", "json", *options)
            == 0
        )
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["ACC"] == answers[1]["ACC"]


def test_other_preprocessing_is_not_written_beside_the_weights(given: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(given, PURIFY, out, "--removal", "none", "--mean", "0.4", "0.4", "0.4") == 0
    assert not (out / "preprocessor_config.json").exists()
    assert read_record(out)["source"]["preprocessing"]["mean"] == [0.4, 0.4, 0.4]


def test_preprocessing_that_cannot_be_done_is_replaced_by_hand(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(given / "model", tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text('{"do_resize": false}')
    command = PURIFY.replace("model", str(tmp_path / "model"))
    by_hand = [
        "--removal",
        "none",
        "--size",
        "32",
        "--mean",
        "0.5",
        "0.5",
        "0.5",
        "--std",
        "0.5",
        "0.5",
        "0.5",
    ]
    assert run(given, command, tmp_path / "out") == 1
    assert "give --size, --mean and --std" in capsys.readouterr().err
    assert run(given, command, tmp_path / "out", *by_hand) == 0
    assert not (tmp_path / "out" / "preprocessor_config.json").exists()


def test_compacted_it_is_a_folder_of_purify(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(given, PURIFY, out) == 0
    assert not (out / "config.json").exists()
    assert run(given, "evaluate", out, "--clean", given / "clean") == 0
    assert "32 x 32" in capsys.readouterr().err  # from the record


def test_what_is_missing_is_said(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small("ViT").save_pretrained(tmp_path / "bare")  # type: ignore[operator]
    clean = given / "clean"
    for arguments, message in (
        (["scan", given / "model", "--clean", clean], "or --arch hf"),
        (["purify", given / "model", "--clean", clean, "--out", tmp_path / "o"], "or --arch hf"),
        (["scan", tmp_path / "bare", "--arch", "hf", "--clean", clean], "--mean and --std"),
        (["scan", given / "model", "--arch", "hf", "--key", "a", "--clean", clean], "--key"),
    ):
        assert main(list(map(str, arguments))) == 2
        assert message in capsys.readouterr().err
