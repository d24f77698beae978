"""The documentation: its Python runs, and no public name is missing from the reference."""

from __future__ import annotations

import copy
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import nnprune_backdoor
from helpers.settings import shorten_training
from nnprune_backdoor import CleanData
from nnprune_backdoor.criteria import TAC, Unlearning
from nnprune_backdoor.criteria.base import _CRITERIA
from nnprune_backdoor.files.architecture import create
from nnprune_backdoor.selectors import LowestFraction
from nnprune_backdoor.selectors.base import _SELECTORS
from nnprune_backdoor.training import Distillation

DOCS = Path(__file__).parents[1] / "docs"
PACKAGE = DOCS.parent / "nnprune_backdoor"
# what stands for a reader's own things, and what a test can wait for
STAND_INS = {
    '"vit_base_patch16_224"': '"test_vit"',
    '"tac", selector="trigger", target=3': 'selector=amount, method="tac", target=3, **short',
    'method="rnp"': "method=quick, selector=amount",
    '"tac", selector="trigger"': "quick, selector=amount",
    '"tac", selector=': "quick, selector=",
    '"rnp", selector=strict': "quick, selector=strict",
    "TriggerGone(max_drop=0.01)": "AccuracyBudget(points=3)",
    "RNPImportance(model, clean_loader)": "RNPImportance(model, clean_loader, **brief)",
    "RNP.paper()": "RNP(**brief)",
    "epochs=10": "epochs=1",
    "distil(pruned, model, clean_loader)": "distil(pruned, model, clean_loader, plain)",
    "Inversion(steps=150": "Inversion(steps=5",
}
SHORT: dict[str, Any] = {"steps": 10, "min_success": 0.0}
HELP = {  # names in the stand-ins
    "short": SHORT,
    "quick": TAC(target=1, **SHORT),
    "brief": {"unlearning": Unlearning(epochs=2, missed="flag")},
    "amount": LowestFraction(0.05),
    "plain": Distillation(epochs=1, stamped=0),
}
FROM_FILES = {"A ViT checkpoint and a folder of images"}  # has a model of its own


def blocks(page: str) -> dict[str, list[str]]:
    """Title of a section -> its Python, block by block; sections without any are left out."""
    found: dict[str, list[str]] = {}
    for section in (DOCS / page).read_text(encoding="utf-8").split("\n## ")[1:]:
        title, _, rest = section.partition("\n")
        if python := re.findall(r"^```python\n(.*?)^```$", rest, re.M | re.S):
            found[title] = python
    return found


def shortened(block: str) -> str:
    for theirs, ours in STAND_INS.items():
        block = block.replace(theirs, ours)
    return block


def run(section: list[str], own: dict[str, Any]) -> dict[str, Any]:
    """Run the blocks in a fresh namespace that has `own` alone; what it holds in the end."""
    names = HELP | own
    for block in section:
        exec(compile(shortened(block), "docs", "exec", dont_inherit=True), names)
    return names


PAGES = ("how_to.md", "extend.md", "../CONTRIBUTING.md")
HOW_TO = {  # by title, and page where it is not of how_to.md
    title if page == PAGES[0] else f"{title} ({page})": section
    for page in PAGES
    for title, section in blocks(page).items()
}


def test_every_stand_in_stands_for_something() -> None:
    for theirs in STAND_INS:
        assert any(theirs in block for section in HOW_TO.values() for block in section), theirs


@pytest.fixture
def folder(tmp_path: Path, trained: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a ViT checkpoint, a folder of images and another checkpoint."""
    monkeypatch.chdir(tmp_path)
    vit = create("test_vit", {"num_classes": 2})
    torch.save(vit.state_dict(), "vit.pth")
    torch.save(Answer(trained).state_dict(), "stranger.pth")
    for i in range(16):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), 20 + i).convert("RGB").save(path)
    return tmp_path


class Answer(nn.Module):
    """As models are whose output is an object."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = copy.deepcopy(body)

    def forward(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.body(images))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def smaller(names: dict[str, Any]) -> bool:
    return bool(names["smaller"](names["images"]).shape == (64, 10))


# title -> what must hold of the namespace once the section has run
PROMISED: dict[str, Callable[[dict[str, Any]], bool]] = {
    "A ViT checkpoint and a folder of images": lambda _: Path("purified/record.json").exists(),
    "How much to prune": smaller,
    "Keep the shape of the model": smaller,
    "Swap the criterion in a Torch-Pruning script (extend.md)": lambda names: (
        parameters(names["model"]) < names["size"]
    ),
    "Mask with `torch.nn.utils.prune` (extend.md)": lambda names: any(
        not mask.all() for mask in names["model"].buffers() if mask.dtype.is_floating_point
    ),
    "Give back what pruning cost (extend.md)": lambda names: (
        parameters(names["repaired"]) < parameters(names["model"])
    ),
    "Add a criterion (extend.md)": lambda _: "idle" in nnprune_backdoor.list_criteria(),
    "Add a selector (extend.md)": lambda _: "each_class" in nnprune_backdoor.list_selectors(),
    "Add a criterion (../CONTRIBUTING.md)": lambda names: (
        nnprune_backdoor.create_criterion("smallest")(names["model"], names["clean_loader"])
        .flat.isfinite()
        .all()
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*left unpruned:UserWarning")  # of groups that are left alone
@pytest.mark.parametrize("title", HOW_TO)
def test_each_section_of_how_to_runs_by_itself(
    title: str, folder: Path, trained: nn.Module, clean: CleanData, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_training(monkeypatch)
    for registry in (_CRITERIA, _SELECTORS):  # not for the other tests
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    mine = ModuleType("my_models")
    mine.MyNet = lambda: Answer(trained)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_models", mine)
    own = {"model": trained, "clean_loader": [(clean.images, clean.targets)]}
    own["size"] = parameters(trained)
    names = run(HOW_TO[title], {} if title in FROM_FILES else own)
    assert PROMISED.get(title, bool)(names)
    assert "purified" not in names or names["purified"].selection.reason


def test_every_promise_is_of_a_section() -> None:
    assert PROMISED.keys() | FROM_FILES <= HOW_TO.keys()


def shown(*pages: Path) -> set[str]:
    """Names that pages of the reference have an entry for."""
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    return {line.rsplit(".", 1)[-1] for line in re.findall(r"^::: (\S+)$", text, re.M)}


def test_the_reference_has_every_public_name() -> None:
    missing = set(nnprune_backdoor.__all__) - shown(*(DOCS / "api").glob("*.md")) - {"__version__"}
    assert not missing, f"add to docs/api: {sorted(missing)}"
    linked = set(re.findall(r"\[`(\w+)`\]", (DOCS / "api" / "top.md").read_text(encoding="utf-8")))
    assert linked | {"__version__"} == set(nnprune_backdoor.__all__)


FOLDERS = {init.parent.name for init in PACKAGE.glob("*/__init__.py")} - {"cli", "utils"}


def test_every_folder_has_a_page() -> None:
    assert {page.stem for page in (DOCS / "api").glob("*.md")} == FOLDERS | {"top"}


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_a_folders_page_has_every_name_that_it_exports(name: str) -> None:
    folder = importlib.import_module(f"nnprune_backdoor.{name}")
    missing = set(getattr(folder, "__all__", ())) - shown(DOCS / "api" / f"{name}.md")
    assert not missing, f"add to docs/api/{name}.md: {sorted(missing)}"


def test_what_pages_and_examples_import_is_in_the_reference() -> None:
    pages = [*DOCS.rglob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"]
    code = "\n".join(
        file.read_text(encoding="utf-8") for file in (*pages, *DOCS.parent.glob("examples/*"))
        if file.is_file()
    )  # fmt: skip
    imported = {
        name
        for names in re.findall(r"from nnprune_backdoor[\w.]* import ([\w, ]+)", code)
        for name in names.replace(" ", "").split(",")
        if not name.endswith("Importance")  # one for each criterion; their page says so
    }
    missing = imported - shown(*(DOCS / "api").glob("*.md"))
    assert not missing, f"add to docs/api: {sorted(missing)}"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_pages_outside_of_the_site_link_to_files_that_exist(name: str) -> None:
    text = (DOCS.parent / name).read_text(encoding="utf-8")
    links = set(re.findall(r"\]\((?!https?:)([^)#]+)", text))
    assert links
    assert not [link for link in links if not (DOCS.parent / link).exists()]


@pytest.mark.parametrize("page", ["../README.md", "how_to.md"])
def test_the_promise_of_same_results_is_for_one_number_of_threads(page: str) -> None:
    """Another number adds in another order, and a ranking can change where scores are close."""
    parts = (DOCS / page).read_text(encoding="utf-8").split("\n\n")
    (promise,) = [line for part in parts if "same machine" in (line := " ".join(part.split()))]
    assert "number of threads" in promise


def test_the_citation_is_of_this_version() -> None:
    citation = (DOCS.parent / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {nnprune_backdoor.__version__}\n" in citation


def test_pages_can_be_read_in_one_go() -> None:
    """Results may be long; all other pages, and README above all, are not."""
    pages = [p for p in DOCS.rglob("*.md") if "results" not in p.relative_to(DOCS).parts]
    words = {p.name: len(p.read_text(encoding="utf-8").split()) for p in pages}
    assert not {page: count for page, count in words.items() if count > 1500}
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert len(readme.split()) <= 700
    assert len(readme.splitlines()) <= 90


def test_the_package_names_pages_that_exist() -> None:
    """In docstrings, comments and messages: `docs/results/ranking.md`."""
    for file in (*PACKAGE.rglob("*.py"), *(DOCS.parent / "examples").glob("*.py")):
        named = set(re.findall(r"docs/[\w/]+\.md", file.read_text(encoding="utf-8")))
        assert not [page for page in named if not (DOCS.parent / page).exists()], file.name
