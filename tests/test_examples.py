"""The examples run, as scripts and from another folder. Their numbers are checked by eye."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers.networks import build
from helpers.settings import shorten_training
from nnprune_backdoor import Preprocessing, load_purified, load_weights, read_images
from nnprune_backdoor.attacks import photo_patches
from nnprune_backdoor.criteria import TAC, Response, base
from nnprune_backdoor.selectors import LowestFraction

EXAMPLES = Path(__file__).parent.parent / "examples"
FAMILIES = ("convnext", "densenet", "efficientnet", "mobilenet", "resnet", "swin", "vgg", "vit")
# script -> what it must have printed
TASKS = {
    "compress_and_purify": r"purified first(.*\n)+.*fine-tuned .* parameters",
    "custom_criterion": r"Torch-Pruning, 5 % .* ASR",
    "custom_model": r"equal logits: True",
    "hub_checkpoint": r"refused: unknown class folder(.*\n)+.* loaded again",
    "unlabelled": r"refused: expected labelled(.*\n)+.* 4\.0%  same prediction",
}
# in the notebook, what a test can wait for
STAND_INS = {
    "Demo(width=0.25)": "Demo(width=0.25, epochs=1, images=128)",
    'method="tac", selector="trigger"': "method=quick, selector=amount",
    "purified.plot_curve(": "purified.plot_scores(",  # `amount` tries none, and has no curve
    "%matplotlib inline\n": "",
}

Run = Callable[..., str]


pytestmark = pytest.mark.usefixtures("photographs_cut_once")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a script as `python examples/NAME.py ARGUMENTS` would; what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)

    def script(name: str, *arguments: str | Path) -> str:
        path = str(EXAMPLES / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    return script


def test_every_example_is_run() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    others = {"_shared", "any_timm", "swap_criterion", "command_line_folders"}
    assert scripts == {*FAMILIES, *TASKS, *others, "torch_pruning_then_repair"}
    assert [path.stem for path in EXAMPLES.glob("*.ipynb")] == ["quickstart"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_on_a_network_of_its_own(family: str, tmp_path: Path, run: Run) -> None:
    printed = run(family, "--quick", "--out", tmp_path / "out")
    assert re.search(r"ACC .*%.*%(.*\n)+ASR .*%.*%", printed)
    assert re.search(r"removed from the tensors: [1-9]", printed)
    sizes = re.search(r"parameters +([\d,]+) +([\d,]+)", printed)
    assert sizes
    before, after = (int(size.replace(",", "")) for size in sizes.groups())
    assert after < before
    saved = load_purified(tmp_path / "out")
    assert sum(weight.numel() for weight in saved.parameters()) == after


@pytest.fixture
def given(tmp_path: Path, run: Run) -> tuple[str | Path, ...]:
    """Options for weights and a folder of images that the user has."""
    save_file(build("test_resnet").state_dict(), tmp_path / "my.safetensors")
    run("command_line_folders", "--quick", "--out", tmp_path)
    return ("--weights", tmp_path / "my.safetensors", "--clean", tmp_path / "test", "--size", "32")


@pytest.mark.slow
def test_a_family_on_the_users_files(
    given: tuple[str | Path, ...],
    tmp_path: Path,
    run: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    printed = run("resnet", *given, "--arch", "test_resnet", "--quick", "--out", tmp_path / "out")
    assert "my.safetensors: test_resnet, 10 classes" in printed
    assert "52 of 52 images" in printed
    assert "ACC" in printed
    assert "ASR" not in printed  # nobody knows the trigger
    load_purified(tmp_path / "out")

    names = tmp_path / "names.txt"
    names.write_text("\n".join(reversed(photo_patches().class_names)))
    run("resnet", *given, "--arch", "test_resnet", "--quick", "--classes", names)
    for wrong, reason in (
        (["--weights", "my.safetensors"], "give both --weights and --clean"),
        (["--arch", "test_resnet"], "--arch needs --weights"),
        ([*given, "--arch", "resnet1"], "timm has no architecture"),
    ):
        with pytest.raises(SystemExit):
            run("resnet", *wrong)
        assert reason in capsys.readouterr().err


@pytest.mark.slow
def test_any_timm(
    given: tuple[str | Path, ...], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "ACC" in run("any_timm", *given, "--arch", "test_resnet", "--quick")
    for arch in ("test_resnet", "test_vit"):  # with and without BatchNorm
        assert "ASR" in run("any_timm", "--arch", arch, "--quick")
    with pytest.raises(SystemExit):
        run("any_timm")
    assert "--arch" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no neuron:UserWarning")  # of groups that are left alone
@pytest.mark.parametrize("task", TASKS)
def test_a_task(task: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    registered = dict(base._CRITERIA._classes)
    monkeypatch.setattr(base._CRITERIA, "_classes", registered)  # not for the other tests
    assert re.search(TASKS[task], run(task, "--quick"))


@pytest.mark.slow
def test_swapping_the_criterion(run: Run) -> None:
    printed = run("swap_criterion", "--quick", "--ratio", "0.1")
    table = [line.split("|") for line in printed.splitlines() if "|" in line]
    rows = {cells[1].strip(): cells for cells in table}
    assert list(rows)[2:] == ["before", "magnitude", "random", "rnp"]
    channels = {name: int(cells[2]) for name, cells in list(rows.items())[2:]}
    assert channels["before"] > max(channels[name] for name in ("magnitude", "random", "rnp"))
    assert all("%" in cells[4] and "%" in cells[5] for cells in list(rows.values())[2:])


@pytest.mark.slow
def test_pruning_with_torch_pruning_then_repairing(run: Run) -> None:
    printed = run("torch_pruning_then_repair", "--quick", "--ratio", "0.1")
    table = [line.split("|") for line in printed.splitlines() if "|" in line]
    rows = {(cells[1].strip(), cells[6].strip()): cells for cells in table[2:]}
    for name in ("none", "magnitude", "random", "rnp"):
        sizes = [rows[name, stage][2] for stage in ("pruned", "distilled")]
        assert sizes[0] == sizes[1]
        assert (int(sizes[0]) < int(rows["before", ""][2])) == (name != "none")


@pytest.mark.slow
def test_the_folders_of_the_command_lines_page(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run("command_line_folders", "--quick")
    plain = Preprocessing(size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    found = {name: read_images(tmp_path / name, plain) for name in ("photos", "clean", "test")}
    assert [len(images.files) for images in found.values()] == [240, 6, 52]
    assert all(len(images.classes) == 10 for images in found.values())
    with pytest.raises(SystemExit):
        run("command_line_folders")
    assert "photos exists" in capsys.readouterr().err
    save_file({"a": torch.ones(2)}, tmp_path / "demo.safetensors")
    run("command_line_folders", "--wrap", "demo.safetensors")
    weights = load_weights(tmp_path / "stranger.pth")
    assert list(weights) == ["a"]
    assert any("'module.'" in line for line in weights.notes)


@pytest.mark.slow
def test_the_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shorten_training(monkeypatch)
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    # as it is shown it comes from one run, from top to bottom
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    source = "\n".join("".join(cell["source"]) for cell in cells)
    for theirs, ours in STAND_INS.items():
        assert theirs in source, theirs
        source = source.replace(theirs, ours)
    quick = TAC(target=0, steps=10, min_success=0.0, ranking=Response())
    names: dict[str, Any] = {"quick": quick, "amount": LowestFraction(0.05)}
    exec(compile(source, "quickstart.ipynb", "exec"), names)
    assert "equal logits: True" in capsys.readouterr().out
