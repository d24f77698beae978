"""README's Python is run as it stands, but for the network, which is a small one here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nnprune_backdoor import CleanData
from nnprune_backdoor.criteria import TAC
from nnprune_backdoor.selectors import LowestFraction

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)
# what stands for a newcomer's own things, and what a test can wait for
STAND_INS = {
    '"resnet18"': '"test_resnet"',
    "clean_loader = ...  # batches": "clean_loader = given  # batches",
    'method="tac", selector="trigger"': "method=quick, selector=amount",
    "RNPImportance(model, clean_loader)": "RNPImportance(model, clean_loader, **brief)",
}


def run(block: str, names: dict[str, Any]) -> None:
    for theirs, ours in STAND_INS.items():
        block = block.replace(theirs, ours)
    exec(compile(block, "README.md", "exec"), names)


def test_every_stand_in_stands_for_something() -> None:
    for theirs in STAND_INS:
        assert any(theirs in block for block in BLOCKS), theirs


@pytest.mark.filterwarnings("ignore:no neuron:UserWarning")  # of groups that are left alone
def test_the_blocks_run_in_order(
    trained: nn.Module, clean: CleanData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(trained.state_dict(), "stranger.pth")
    names: dict[str, Any] = {
        "given": [(clean.images, clean.targets)],
        "quick": TAC(target=0, steps=10, min_success=0.0),
        "brief": {"unlearn_epochs": 2, "unlearn_missed": "flag"},
        "amount": LowestFraction(0.05),
    }
    purify_block, load_block, *others = BLOCKS
    run(purify_block, names)
    assert (tmp_path / "report.html").stat().st_size > 10_000
    run(load_block, names)
    wanted, got = (names[which] for which in ("purified", "again"))
    with torch.no_grad():
        assert torch.equal(wanted.model.eval()(clean.images), got(clean.images))
    names |= {"model": trained, "clean_loader": names["given"], "example": clean.images[:1]}
    before = sum(parameter.numel() for parameter in trained.parameters())
    for block in others:
        run(block, names)
    assert sum(parameter.numel() for parameter in trained.parameters()) < before
