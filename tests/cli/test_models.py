"""What the commands take as a model, and what they say and record of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from helpers.networks import build
from nnprune_backdoor import load_model, load_purified, load_weights
from nnprune_backdoor.cli.main import main
from nnprune_backdoor.errors import CheckpointError
from nnprune_backdoor.files import read_record

pytestmark = pytest.mark.cli

SIZE = ["--size", "32", "--crop-pct", "1"]
PURIFY = ["--method", "clp", "--fraction", "0.3", *SIZE]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("test_resnet")


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    generator = torch.Generator().manual_seed(0)
    for number in range(24):
        pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def purified(tmp_path_factory: pytest.TempPathFactory, model: nn.Module, clean: Path) -> Path:
    root = tmp_path_factory.mktemp("purified")
    content = {"arch": "test_resnet", "model": model.state_dict(), "n_averaged": torch.tensor(1)}
    torch.save({**content, "criterion": {"weight": torch.ones(1)}}, root / "given.pth")
    command = ["purify", root / "given.pth", "--clean", clean, "--out", root / "out", *PURIFY]
    assert main([*map(str, command), "--quiet"]) == 0
    return root / "out"


def evaluated(model: Path, triggered: Path, *options: str) -> list[str]:
    return ["evaluate", str(model), "--triggered", str(triggered), "--target", "0", *options]


def answer(capsys: pytest.CaptureFixture[str], command: list[str]) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    assert main([*command, "--format", "json"]) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def test_which_tensors_were_taken_is_printed_and_recorded(
    tmp_path: Path, model: nn.Module, clean: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = {f"net.{name}": t for name, t in model.state_dict().items() if "tracked" not in name}
    ema = {f"net_ema.{name.removeprefix('net.')}": t + 1 for name, t in plain.items()}
    content = {"state_dict": {**plain, **ema, "queue": torch.ones(2)}, "a\nb": 1}
    torch.save(content, tmp_path / "w.pth")
    path, out = tmp_path / "w.pth", tmp_path / "out"
    command = ["purify", str(path), "--clean", str(clean), "--out", str(out), *PURIFY]
    command += ["--arch", "test_resnet", "--weights", "ema", "--drop", "queue"]
    _, notes = answer(capsys, command)
    taken = read_record(out)["source"]["weights"]
    assert taken["entry"] == ["state_dict"] and taken["prefix"] == "net_ema." and taken["averaged"]
    assert set(taken["left_out"]) == {*plain, "queue"}
    assert all("num_batches_tracked" in name for name in taken["set_to_0"])
    assert "; --weights plain or ema (weights=...) says which" in notes, "a note is cut off"
    for note in (
        "took 'state_dict' of state_dict, a?b",
        "removed the prefix 'net_ema.'",
        "dropped as asked: queue",
        "set to 0",
    ):
        assert f"w.pth: {note}" in notes
    _, notes = answer(
        capsys, evaluated(path, clean, *SIZE, "--arch", "test_resnet", "--prefix", "net.")
    )
    assert "w.pth: removed the prefix 'net.' as asked" in notes


def test_a_checkpoint_that_is_named_as_an_index_is_purified(
    tmp_path: Path, model: nn.Module, clean: Path
) -> None:
    torch.save(model.state_dict(), tmp_path / "w.json")
    command = ["purify", tmp_path / "w.json", "--clean", clean, "--out", tmp_path / "out", *PURIFY]
    assert main([*map(str, command), "--arch", "test_resnet", "--quiet"]) == 0
    assert read_record(tmp_path / "out")["source"]["checkpoint"] == "w.json"


def test_a_folder_of_a_hub_says_how_images_are_prepared(
    tmp_path: Path, model: nn.Module, clean: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    prepared = {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": "x", "crop_pct": 1.0}
    config = {"architecture": "test_resnet", "pretrained_cfg": {**prepared, "url": "http://x"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, notes = answer(capsys, evaluated(tmp_path, clean))
    assert "32 x 32" in notes and "0.1, 0.2, 0.3" in notes


def test_a_purified_folder_or_the_weights_in_it_is_a_model_everywhere(
    tmp_path: Path, purified: Path, clean: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = purified / "model.safetensors"
    (one, notes), (other, others) = (
        answer(capsys, evaluated(path, clean)) for path in (purified, inner)
    )
    assert notes == others
    assert one["model"]["sha256"] == other["model"]["sha256"]
    assert one["ASR"] == other["ASR"]
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_purified(inner)(images), load_purified(purified)(images))
    for command in (
        [*evaluated(inner, clean), "--arch", "test_resnet"],
        [*evaluated(inner, clean), "--drop", "fc.*"],
        ["attack", str(clean), "--model", str(inner), "--out", str(tmp_path / "a.safetensors")],
        ["purify", str(inner), "--clean", str(clean), "--out", str(purified), "--overwrite"],
    ):
        assert main(command) == 2
    printed = capsys.readouterr().err
    assert "its record says how to build it; leave out --arch" in printed
    assert "leave out --drop" in printed
    assert "is a purified model, whose layers may be smaller" in printed
    assert "holds the model itself" in printed


@pytest.mark.parametrize("removal", ["exact", "none"])
def test_a_purified_model_is_purified_again(
    tmp_path: Path,
    purified: Path,
    clean: Path,
    capsys: pytest.CaptureFixture[str],
    removal: str,
) -> None:
    first = read_record(purified)
    assert first["recipe"], "nothing was cut, so nothing is tested"
    given = purified if removal == "exact" else purified / "model.safetensors"
    command = ["purify", str(given), "--clean", str(clean), "--out", str(tmp_path / "out")]
    answer(capsys, [*command, *PURIFY[:4], "--removal", removal])
    record = read_record(tmp_path / "out")
    assert record["architecture"] == first["architecture"]
    assert (record["recipe"] == first["recipe"]) == (removal == "none")
    smaller = load_purified(tmp_path / "out")
    sizes = [sum(p.numel() for p in m.parameters()) for m in (smaller, load_purified(purified))]
    assert (sizes[0] < sizes[1]) == (removal == "exact")
    evaluate = evaluated(tmp_path / "out", clean)
    assert answer(capsys, evaluate)[0]["ASR"]["count"] == 24


def test_weights_of_a_purified_model_without_its_record_are_told_from_others(
    tmp_path: Path, purified: Path
) -> None:
    alone = Path(shutil.copy(purified / "model.safetensors", tmp_path / "alone.safetensors"))
    assert "these are weights of a purified model" in load_weights(alone).notes
    with pytest.raises(CheckpointError, match=r"of a purified model whose record\.json is not bes"):
        load_model(alone, "test_resnet")
    for path in (purified, purified / "model.safetensors"):
        with pytest.raises(CheckpointError, match=r"a purified model; read it by load_purified\("):
            load_model(path)
