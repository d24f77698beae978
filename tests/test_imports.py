"""Who imports whom: a leak of the attacker's answer into the defence must not be expressible.

The files are parsed, not run, so that imports inside functions and under `if` count too.
"""

from __future__ import annotations

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nnprune_backdoor

ROOT = Path(nnprune_backdoor.__file__).parent
CORE = (
    "auto",
    "checkpoint",
    "compute",
    "data",
    "diagnosis",
    "evidence",
    "exposure",
    "fingerprint",
    "finetuning",
    "guard",
    "inversion",
    "masking",
    "norms",
    "parallel",
    "progress",
    "relearning",
    "restoration",
    "saliency",
    "scanning",
    "scores",
    "selection",
    "sites",
    "trigger_selection",
    "universal",
)
CUTTING = ("cutting", "liveness", "passes", "recipe", "removal")
ATTACKER = {"attacks", "demo", "cli", "commands"}  # know the trigger, or run something that does


class Imports:
    """Modules of a package ("" is the package itself, "a.b" a submodule) and what each imports."""

    def __init__(self, root: Path) -> None:
        self.package = root.name
        self.files = {self._name(file, root): file for file in sorted(root.rglob("*.py"))}
        self.own: dict[str, set[str]] = {}  # module -> modules of the package
        self.others: dict[str, set[str]] = {}  # module -> top-level names of other packages
        self.names: dict[tuple[str, str], set[str]] = {}  # (importer, imported) -> names taken
        for module, file in self.files.items():
            self.own[module], self.others[module] = set(), set()
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                self._read(module, file, node)

    @staticmethod
    def _name(file: Path, root: Path) -> str:
        parts = file.relative_to(root).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def _read(self, module: str, file: Path, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                self._add(module, alias.name, "")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = [self.package, *(module.split(".") if module else [])]
                up = node.level - (file.stem == "__init__")
                base = ".".join([*here[: len(here) - up], *([base] if base else [])])
            for alias in node.names:
                self._add(module, base, alias.name)
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__"):
                self.others[module].add(f"<dynamic import, line {node.lineno}>")

    def _add(self, module: str, base: str, name: str) -> None:
        top, _, inside = base.partition(".")
        if top != self.package:
            self.others[module].add(top)
            return
        submodule = f"{inside}.{name}".strip(".")
        found = submodule if submodule in self.files else inside
        if found != module:
            self.own[module].add(found)
            self.names.setdefault((module, found), set()).add(name)

    def reach(self, module: str) -> set[str]:
        """Every module of the package that `module` brings in, itself included."""
        seen, todo = set(), [module]
        while todo:
            here = todo.pop()
            if here not in seen:
                seen.add(here)
                todo += self.own[here]
        return seen

    def packages(self, module: str) -> set[str]:
        """Top-level names of all other packages that `module` brings in."""
        return set().union(*(self.others[reached] for reached in self.reach(module)))

    def importers(self, package: str) -> set[str]:
        """Modules that import another package themselves."""
        return {module for module, names in self.others.items() if package in names}


IMPORTS = Imports(ROOT)
CRITERIA = [name for name in IMPORTS.files if name.split(".")[0] == "criteria"]


def top(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


def test_the_modules_that_are_guarded_exist() -> None:
    assert set(CORE) | {"errors", "evaluation", "purify", "demo", "cli"} <= set(IMPORTS.files)
    names = ("base", "layers", "unlearning", "rnp", "anp", "cnp", "mnp", "tac", "clp", "bnp", "fp")
    assert {"criteria", *(f"criteria.{name}" for name in names)} <= set(CRITERIA)
    assert {"attacks", "attacks.base", "attacks.training"} <= set(IMPORTS.files)
    assert IMPORTS.reach("criteria.rnp") >= {"criteria.base", "data", "sites", "masking", "errors"}


@pytest.mark.parametrize("module", [*CORE, *CUTTING, *CRITERIA])
def test_the_core_cannot_see_an_attack_nor_its_measurement(module: str) -> None:
    assert not top(IMPORTS.reach(module)) & (ATTACKER | {"evaluation", "purify"})
    assert not IMPORTS.packages(module) & {"timm", "torch_pruning"}


@pytest.mark.parametrize(
    "module", ["", "purify", "architecture", "images", "preprocessing", "record_file", "saving"]
)
def test_the_front_door_cannot_see_an_attack(module: str) -> None:
    assert not top(IMPORTS.reach(module)) & ATTACKER


def test_purify_takes_nothing_from_evaluation_that_knows_a_target() -> None:
    importers = {module for module, taken in IMPORTS.names if taken == "evaluation"}
    assert importers & IMPORTS.reach("purify") == {"record", "report"}
    assert IMPORTS.names["record", "evaluation"] | IMPORTS.names["report", "evaluation"] <= {
        "Rate",
        "predict",
    }


def test_a_command_sees_an_attack_only_where_it_is_about_one() -> None:
    about = {f"commands.{name}" for name in ("attack", "demo", "evaluate", "listing", "rates")}
    sees = {m for m in IMPORTS.files if "attacks" in top(IMPORTS.reach(m))}
    assert {m for m in sees if m.startswith("commands.")} == about


def test_a_report_is_read_from_the_record_alone() -> None:
    for module in ("record", "report", "layout", "pages", "plots"):
        assert not top(IMPORTS.reach(module)) & (ATTACKER | {"purify"})


def test_evaluation_does_not_make_attacks() -> None:
    assert not top(IMPORTS.reach("evaluation")) & ATTACKER


def test_attacks_do_not_know_the_defence() -> None:
    reached = set().union(*(IMPORTS.reach(m) for m in IMPORTS.files if top({m}) == {"attacks"}))
    assert top(reached) == {"attacks", "errors", "registry", "targets"}


def test_timm_is_imported_where_architectures_are_built_by_name() -> None:
    """And where images are made what such an architecture expects."""
    doors = {"architecture", "demo", "preprocessing"}
    assert IMPORTS.importers("timm") == doors
    above = {
        "",
        "datasets",
        "images",
        "saving",
        "cli",
        "commands",
    }  # "": only when called, see below
    reached = {m for m in IMPORTS.files if "timm" in IMPORTS.packages(m)}
    assert top(reached) <= doors | above


def test_purified_models_are_saved_above_all_else() -> None:
    """The way from a result to a file is one way: what computes results cannot reach it."""
    assert IMPORTS.reach("saving") >= {"architecture", "checkpoint", "record_file", "purify"}
    assert IMPORTS.own["checkpoint"] == {"errors"}
    assert not IMPORTS.reach("purify") & {"architecture", "checkpoint", "record_file", "saving"}


def test_torch_pruning_has_few_doors() -> None:
    assert IMPORTS.importers("torch_pruning") == {"graph", "importance", "ledger", "mending"}


@pytest.mark.parametrize("module", ["graph", "importance", "ledger", "mending", "wrapping"])
def test_the_adapter_cannot_see_an_attack(module: str) -> None:
    assert not top(IMPORTS.reach(module)) & (ATTACKER | {"evaluation", "purify"})
    assert "timm" not in IMPORTS.packages(module)


def test_errors_import_nothing_of_the_package() -> None:
    assert IMPORTS.own["errors"] == set()


def test_there_is_no_import_cycle() -> None:
    order = list(graphlib.TopologicalSorter(IMPORTS.own).static_order())  # raises CycleError
    assert order.index("errors") < order.index("data") < order.index("purify")


def test_nothing_is_imported_by_a_computed_name() -> None:
    """But for a user's own modules (--plugin), which nothing below the command line can reach."""
    dynamic = {m for m, names in IMPORTS.others.items() for n in names if n.startswith("<")}
    assert dynamic == {"commands.plugins"}, "this file could not see such an import"
    reaches = {m for m in IMPORTS.files if "commands.plugins" in IMPORTS.reach(m)}
    assert top(reaches) == {"cli", "commands"}


def test_importing_the_package_loads_no_attack_and_no_timm() -> None:
    code = "import sys, nnprune_backdoor; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "nnprune_backdoor.purify" in loaded
    unwanted = {"timm", "torch_pruning", *(f"nnprune_backdoor.{name}" for name in ATTACKER)}
    assert not loaded & unwanted


# --- the reader itself: it must see every way in ---

LEAKS = {
    "from .attacks import BadNets": {"attacks"},
    "from . import attacks": {"attacks"},
    "from .attacks.badnets import BadNets": {"attacks.badnets"},
    "from .attacks import badnets": {"attacks.badnets"},
    "import pkg.attacks": {"attacks"},
    "import pkg.attacks.badnets as b": {"attacks.badnets"},
    "from pkg.attacks import BadNets": {"attacks"},
    "def f():\n    from .attacks import BadNets": {"attacks"},
    "if False:\n    from .attacks import BadNets": {"attacks"},
    "from .middle import x": {"middle", "attacks"},
    "from .deep import x": {"deep", "deep.one", "middle", "attacks"},
    "import attacks": set(),  # some other package of that name
}


@pytest.mark.parametrize("source", LEAKS)
def test_the_reader_finds_a_leak(tmp_path: Path, source: str) -> None:
    files = {
        "__init__.py": "",
        "attacks/__init__.py": "",
        "attacks/badnets.py": "",
        "middle.py": "from .attacks import x",
        "deep/__init__.py": "from .one import x",
        "deep/one.py": "from ..middle import x",
        "core.py": source,
    }
    for name, text in files.items():
        file = tmp_path / "pkg" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert Imports(tmp_path / "pkg").reach("core") - {"core"} == LEAKS[source]


def test_the_reader_finds_cycles_and_computed_imports(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "a.py").write_text("from .b import x")
    (tmp_path / "pkg" / "b.py").write_text(
        "from importlib import import_module as i\nfrom . import a"
    )
    found = Imports(tmp_path / "pkg")
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter(found.own).static_order())
    (tmp_path / "pkg" / "b.py").write_text("import importlib\nimportlib.import_module('timm')")
    assert Imports(tmp_path / "pkg").packages("a") == {"importlib", "<dynamic import, line 2>"}
