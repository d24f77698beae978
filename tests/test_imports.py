"""Who imports whom: folders stand on floors, and imports run down, never up.

So a leak of the attacker's answer into the defence cannot be expressed. The files are parsed, not
run, so that imports inside functions and under `if` count too.
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
# from the ground up; a folder imports from floors below its own, and from itself
FLOORS = (
    ("errors", "version"),
    ("utils",),
    ("core",),
    ("triggers", "removal", "attacks"),
    ("training", "criteria"),
    ("evidence", "importance"),
    ("selectors",),
    ("reports",),
    ("pipeline", "files", "fleets"),
    ("demo", ""),  # "": the package's own __init__
    ("cli",),
    ("__main__",),
)
FLOOR = {folder: floor for floor, folders in enumerate(FLOORS) for folder in folders}
ATTACKER = {"attacks", "demo", "cli"}  # know the trigger, or run something that does
DEFENCE = [folder for folder in FLOOR if folder not in ATTACKER | {"__main__"}]
# who may import a heavy package; all others do without
DOORS = {
    "timm": {"files", "demo"},
    "transformers": {"files"},
    "torch_pruning": {"importance"},
    "matplotlib": {"reports", "demo"},
}


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


def folder(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def folders(modules: set[str]) -> set[str]:
    return {folder(module) for module in modules}


def modules_in(name: str) -> list[str]:
    return [module for module in IMPORTS.files if folder(module) == name]


def test_every_folder_has_a_floor_and_the_top_is_small() -> None:
    assert folders(set(IMPORTS.files)) == set(FLOOR)
    assert len(list(ROOT.glob("*.py"))) <= 6
    assert IMPORTS.reach("criteria.rnp") >= {"criteria.base", "core.data", "core.masks", "errors"}


@pytest.mark.parametrize("name", FLOOR)
def test_imports_run_down(name: str) -> None:
    own = FLOOR[name]
    taken = {below for module in modules_in(name) for below in IMPORTS.own[module]}
    up = {other for other in taken if folder(other) != name and FLOOR[folder(other)] >= own}
    assert not up, f"{name} imports {sorted(up)}"


@pytest.mark.parametrize("name", DEFENCE)
def test_the_defence_cannot_see_an_attack_nor_its_measurement(name: str) -> None:
    for module in modules_in(name):
        assert not folders(IMPORTS.reach(module)) & ATTACKER, module


def test_a_command_sees_an_attack_only_where_it_is_about_one() -> None:
    about = {f"cli.{name}" for name in ("attack", "demo", "evaluate", "listing", "rates")}
    sees = {m for m in modules_in("cli") if "attacks" in folders(IMPORTS.reach(m))}
    assert sees - {"cli.main"} == about


def test_attacks_do_not_know_the_defence() -> None:
    reached = set().union(*(IMPORTS.reach(module) for module in modules_in("attacks")))
    assert folders(reached) <= {"attacks", "core", "errors", "utils"}


def test_a_report_is_read_from_the_record_alone() -> None:
    for module in modules_in("reports"):
        assert "pipeline" not in IMPORTS.reach(module)


@pytest.mark.parametrize("package", DOORS)
def test_heavy_packages_have_few_doors(package: str) -> None:
    assert folders(IMPORTS.importers(package)) <= DOORS[package]


def test_there_is_no_import_cycle() -> None:
    order = list(graphlib.TopologicalSorter(IMPORTS.own).static_order())  # raises CycleError
    assert order.index("errors") < order.index("core.data") < order.index("pipeline")


def test_nothing_is_imported_by_a_computed_name() -> None:
    """But for the package's own lazy names, commands, and a user's modules (--plugin)."""
    dynamic = {m for m, names in IMPORTS.others.items() for n in names if n.startswith("<")}
    assert dynamic <= {"", "cli.main", "cli.plugins"}, "this file could not see such an import"


def test_lazy_names_are_those_that_type_checkers_see() -> None:
    """The homes of lazy names are imported under TYPE_CHECKING too, so this file sees them."""
    assert set(nnprune_backdoor.__all__) == set(dir(nnprune_backdoor))
    for name in nnprune_backdoor.__all__:
        assert getattr(nnprune_backdoor, name) is not None
    lazy = set(nnprune_backdoor._HOMES)
    typed = {name for (m, _), names in IMPORTS.names.items() if m == "" for name in names}
    assert lazy == typed - {"PurifyError", "__version__"}
    assert lazy | {"PurifyError", "__version__"} == set(nnprune_backdoor.__all__)
    assert len(nnprune_backdoor.__all__) <= 30


def loaded_by(code: str) -> set[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    code = f"import sys; {code}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.slow
def test_importing_purify_loads_no_attack_and_no_timm() -> None:
    loaded = loaded_by("from nnprune_backdoor import purify")
    assert "nnprune_backdoor.pipeline" in loaded
    unwanted = {"timm", "torch_pruning", *(f"nnprune_backdoor.{name}" for name in ATTACKER)}
    assert not loaded & unwanted


def test_importing_the_package_loads_no_torch() -> None:
    assert not loaded_by("import nnprune_backdoor") & {"torch", "numpy", "timm"}


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
