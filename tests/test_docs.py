"""The documentation: its Python runs, and no public name is missing from the reference."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import nnprune_backdoor
from nnprune_backdoor import TAC, CleanData, LowestFraction
from nnprune_backdoor.criteria import base

DOCS = Path(__file__).parents[1] / "docs"
# what stands for a reader's own things, and what a test can wait for
STAND_INS = {
    '"vit_base_patch16_224"': '"test_vit"',
    '"tac", selector="trigger", target=3': 'selector=amount, method="tac", target=3, **short',
    '"tac", selector="trigger"': "quick, selector=amount",
    '"tac", selector=': "quick, selector=",
    '"rnp", selector=strict': "quick, selector=strict",
    "TriggerGone(max_drop=0.01)": "AccuracyBudget(points=3)",
    "RNPImportance(model, clean_loader)": "RNPImportance(model, clean_loader, **brief)",
    "epochs=10": "epochs=1",
    "Inversion(steps=150": "Inversion(steps=5",
}


def blocks(page: str) -> dict[str, list[str]]:
    """Title of a section -> its Python, block by block."""
    found: dict[str, list[str]] = {}
    for section in (DOCS / page).read_text(encoding="utf-8").split("\n## ")[1:]:
        title, _, rest = section.partition("\n")
        found[title] = re.findall(r"^```python\n(.*?)^```$", rest, re.M | re.S)
    return found


def run(block: str, names: dict[str, Any]) -> None:
    for theirs, ours in STAND_INS.items():
        block = block.replace(theirs, ours)
    exec(compile(block, "how_to.md", "exec"), names)


HOW_TO = blocks("how_to.md")


def test_every_stand_in_stands_for_something() -> None:
    for theirs in STAND_INS:
        assert any(theirs in block for section in HOW_TO.values() for block in section), theirs


@pytest.fixture
def folder(tmp_path: Path, trained: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a ViT checkpoint, a folder of images and another checkpoint."""
    monkeypatch.chdir(tmp_path)
    vit = nnprune_backdoor.architecture.create("test_vit", {"num_classes": 2})
    torch.save(vit.state_dict(), "vit.pth")
    torch.save(trained.state_dict(), "stranger.pth")
    for i in range(16):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), 20 + i).convert("RGB").save(path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:no neuron:UserWarning")  # of groups that are left alone
def test_what_how_to_says_can_be_done(
    folder: Path, trained: nn.Module, clean: CleanData, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered = dict(base._CRITERIA._classes)
    monkeypatch.setattr(base._CRITERIA, "_classes", registered)  # not for the other tests
    loader = [(clean.images, clean.targets)]
    names: dict[str, Any] = {
        "MyNet": lambda: copy.deepcopy(trained),
        "short": (short := {"steps": 10, "min_success": 0.0}),
        "quick": TAC(target=1, **short),
        "brief": {"unlearn_epochs": 2, "unlearn_missed": "flag"},
        "amount": LowestFraction(0.05),
    }
    for title, section in HOW_TO.items():
        if title != "A ViT checkpoint and a folder of images":  # has its own
            names |= {"model": copy.deepcopy(trained), "clean_loader": loader}
        for block in section:
            run(block, names)
    assert (folder / "purified" / "model.safetensors").exists()
    assert len(names["tuned"](clean.images)) == len(clean)
    assert "idle" in registered
    assert names["purified"].selection.reason


def test_the_reference_has_every_public_name() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    shown = {line.rsplit(".", 1)[-1] for line in re.findall(r"^::: (\S+)$", pages, re.M)}
    missing = set(nnprune_backdoor.__all__) - shown - {"__version__"}
    assert not missing, f"add to docs/api: {sorted(missing)}"


def test_readme_links_to_pages_that_exist() -> None:
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    links = set(re.findall(r"\]\((docs/[^)#]+)", readme))
    assert links
    assert not [link for link in links if not (DOCS.parent / link).exists()]
