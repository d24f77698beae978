"""--plugin: import a user's modules, so that what they register can be used by name."""

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
        help="first import this module, given by name or as a path to a .py file, so that what it "
        "registers (@register_criterion, ...) can be used by name; may be repeated. Its code "
        "runs, so give only modules that you trust",
    )


def load_plugins(modules: Iterable[str]) -> None:
    """Import each module once, by its name, or from the file where it ends in .py.

    Raises:
        MisuseError: there is no such module, or its code raises something.
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
                f"--plugin {module}: cannot be imported ({type(error).__name__}: {what}); give the "
                "name of a module that Python finds, or a path that ends in .py"
            ) from error


def _load_file(path: Path) -> None:
    """Import a file under a name that no other module has: it may be called random.py."""
    name = str(path).replace(".", "_")  # a dot would make it a part of a package
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # holds for every name ending in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up their annotations
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
