"""The examples run. What they print is checked by eye, on their defaults."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


FAMILIES = ("convnext", "densenet", "efficientnet", "mobilenet", "resnet", "swin", "vgg", "vit")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_from_training_to_loading(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(EXAMPLES / f"{family}.py"))["main"]
    main(["--quick", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "equal logits: True" in printed
    assert re.search(r"removed from the tensors: [1-9]", printed)
    assert (tmp_path / "out" / "record.json").is_file()


def test_swapping_the_criterion(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(EXAMPLES / "swap_criterion.py"))["main"]
    main(
        ["--epochs", "2", "--width", "0.125", "--train", "1500", "--clean", "100", "--ratio", "0.1"]
    )
    table = [line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line]
    rows = {cells[1].strip(): cells for cells in table}
    assert list(rows)[2:] == ["before", "magnitude", "random", "rnp"]
    channels = {name: int(cells[2]) for name, cells in list(rows.items())[2:]}
    assert channels["before"] > max(channels[name] for name in ("magnitude", "random", "rnp"))
    assert all("%" in cells[4] and "%" in cells[5] for cells in list(rows.values())[2:])
