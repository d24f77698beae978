"""--plugin: modules of one's own, imported so that what they register can be named."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

from .base import MisuseError


def add_plugins(parser: argparse.ArgumentParser) -> None:
    """The option, for commands that take the name of something registered."""
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this module first, by its name or as a path to a .py file, so that what it "
        "registers can be named (@register_criterion, ...); may be repeated. This runs its code: "
        "your own alone",
    )


def load_plugins(modules: Iterable[str]) -> None:
    """Import each by its name, or where it ends in .py from that file; each once.

    Raises:
        MisuseError: there is none, or its code raises something.
    """
    for module in modules:
        try:
            if module.endswith(".py"):
                _load_file(Path(module).resolve(strict=True))
            else:
                importlib.import_module(module)
        except (Exception, SystemExit) as error:  # whatever its code does
            what = str(error).splitlines()[0][:200] if str(error) else "no message"
            raise MisuseError(
                f"--plugin {module}: cannot be imported ({type(error).__name__}: {what}); expected "
                "the name of a module that Python finds, or a path that ends in .py"
            ) from error


def _load_file(path: Path) -> None:
    """As `import` does, under a name that no other module has: the file may be called random.py."""
    name = str(path).replace(".", "_")  # a dot would make it a part of a package
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # of every name that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up their annotations
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
