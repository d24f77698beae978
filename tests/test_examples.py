"""The examples run. What they print is checked by eye, on their defaults."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nnprune_backdoor import Preprocessing, load_weights, read_images
from nnprune_backdoor.criteria import TAC, base
from nnprune_backdoor.selectors import LowestFraction

EXAMPLES = Path(__file__).parent.parent / "examples"


FAMILIES = ("convnext", "densenet", "efficientnet", "mobilenet", "resnet", "swin", "vgg", "vit")
# script -> what it must have printed
TASKS = {
    "compress_and_purify": r"with the pass(.*\n)+.*fine-tuned .* parameters",
    "custom_criterion": r"Torch-Pruning, 5 % .* ASR",
    "custom_model": r"equal logits: True",
    "hub_checkpoint": r"refused: unknown class folder(.*\n)+.* loaded again",
    "unlabelled": r"refused: expected labelled(.*\n)+.* 4\.0%  same answer",
}


def run(name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the script prints."""
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](arguments)
    return capsys.readouterr().out


def test_every_example_is_run() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {*FAMILIES, *TASKS, "swap_criterion", "command_line_folders"}
    assert [path.stem for path in EXAMPLES.glob("*.ipynb")] == ["quickstart"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_from_training_to_loading(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = run(family, ["--quick", "--out", str(tmp_path / "out")], capsys)
    assert "equal logits: True" in printed
    assert re.search(r"removed from the tensors: [1-9]", printed)
    assert (tmp_path / "out" / "record.json").is_file()


@pytest.mark.filterwarnings("ignore:no neuron:UserWarning")  # of groups that are left alone
@pytest.mark.parametrize("task", TASKS)
def test_a_task(
    task: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    registered = dict(base._CRITERIA._classes)
    monkeypatch.setattr(base._CRITERIA, "_classes", registered)  # not for the other tests
    assert re.search(TASKS[task], run(task, ["--quick"], capsys))


def test_swapping_the_criterion(capsys: pytest.CaptureFixture[str]) -> None:
    small = "--epochs 2 --width 0.125 --train 1500 --clean 100 --ratio 0.1"
    printed = run("swap_criterion", small.split(), capsys)
    table = [line.split("|") for line in printed.splitlines() if "|" in line]
    rows = {cells[1].strip(): cells for cells in table}
    assert list(rows)[2:] == ["before", "magnitude", "random", "rnp"]
    channels = {name: int(cells[2]) for name, cells in list(rows.items())[2:]}
    assert channels["before"] > max(channels[name] for name in ("magnitude", "random", "rnp"))
    assert all("%" in cells[4] and "%" in cells[5] for cells in list(rows.values())[2:])


def test_the_folders_of_the_command_lines_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("command_line_folders", ["--quick", "--out", str(tmp_path)], capsys)
    plain = Preprocessing(size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    found = {name: read_images(tmp_path / name, plain) for name in ("photos", "clean", "test")}
    assert [len(images.files) for images in found.values()] == [240, 6, 52]
    assert all(len(images.classes) == 10 for images in found.values())
    with pytest.raises(SystemExit):
        run("command_line_folders", ["--out", str(tmp_path)], capsys)
    assert "is there already" in capsys.readouterr().err
    save_file({"a": torch.ones(2)}, tmp_path / "demo.safetensors")
    wrapped = ["--wrap", str(tmp_path / "demo.safetensors"), "--out", str(tmp_path)]
    run("command_line_folders", wrapped, capsys)
    weights = load_weights(tmp_path / "stranger.pth")
    assert list(weights) == ["a"]
    assert any("'module.'" in line for line in weights.notes)


# in the notebook, what a test can wait for
STAND_INS = {
    "Demo(width=0.25)": "Demo(width=0.25, epochs=1, images=640)",
    'method="tac", selector="trigger"': "method=quick, selector=amount",
    "purified.plot_curve(": "purified.plot_scores(",  # `amount` tries none, and has no curve
    "%matplotlib inline\n": "",
}


def test_the_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    # as it is shown it comes from one run, from top to bottom
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    source = "\n".join("".join(cell["source"]) for cell in cells)
    for theirs, ours in STAND_INS.items():
        assert theirs in source, theirs
        source = source.replace(theirs, ours)
    quick = TAC(target=0, steps=10, min_success=0.0)
    names: dict[str, Any] = {"quick": quick, "amount": LowestFraction(0.05)}
    exec(compile(source, "quickstart.ipynb", "exec"), names)
    assert "equal logits: True" in capsys.readouterr().out
