"""README's Python is run as it stands, but for the network, which is a small one here."""

from __future__ import annotations

import re
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nnprune_backdoor import CleanData, purify
from nnprune_backdoor.criteria import TAC
from nnprune_backdoor.selectors import LowestFraction

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)
# what stands for a newcomer's own things, and what a test can wait for
STAND_INS = {
    '"resnet18"': '"test_resnet"',
    "clean_loader = ...  # batches": "clean_loader = given  # batches",
    'method="rnp"': "method=quick, selector=amount",
}


def run(block: str, names: dict[str, Any]) -> None:
    for theirs, ours in STAND_INS.items():
        block = block.replace(theirs, ours)
    exec(compile(block, "README.md", "exec"), names)


def test_every_stand_in_stands_for_something() -> None:
    for theirs in STAND_INS:
        assert any(theirs in block for block in BLOCKS), theirs


@pytest.mark.slow
def test_the_block_runs(
    trained: nn.Module, clean: CleanData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(trained.state_dict(), "stranger.pth")
    names: dict[str, Any] = {
        "given": [(clean.images, clean.targets)],
        "quick": TAC(target=0, steps=10, min_success=0.0),
        "amount": LowestFraction(0.05),
    }
    (block,) = BLOCKS
    run(block, names)
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert (tmp_path / "purified" / "record.json").exists()
    wanted, got = (names[which] for which in ("purified", "again"))
    with torch.no_grad():
        assert torch.equal(wanted.model.eval()(clean.images), got(clean.images))
    assert size(got) < size(trained)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_first_call_is_the_default_one() -> None:
    (block,) = BLOCKS
    assert 'purify(model, clean_loader, method="rnp")' in block
    assert signature(purify).parameters["method"].default == "rnp"
