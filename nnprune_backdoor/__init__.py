"""Purify backdoored image classifiers by pruning, with clean images alone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import PurifyError
from .version import __version__

if TYPE_CHECKING:
    from .core.compute import Compute
    from .core.data import CleanData
    from .criteria.base import Criterion, create_criterion, list_criteria, register_criterion
    from .evidence.diagnosis import Diagnosis
    from .evidence.scanning import scan
    from .files.architecture import load_model
    from .files.checkpoint import load_weights
    from .files.images import read_images
    from .files.preprocessing import Preprocessing
    from .files.record_file import read_report
    from .files.saving import load_purified, save_purified
    from .pipeline import purify
    from .reports.purified import Purified
    from .selectors.base import Selector, create_selector, list_selectors, register_selector

# name -> where it is defined; loaded when first asked for, so that `--help` needs no torch
_HOMES = {
    "CleanData": "core.data",
    "Compute": "core.compute",
    "Criterion": "criteria",
    "Diagnosis": "evidence",
    "Preprocessing": "files",
    "Purified": "reports",
    "Selector": "selectors",
    "create_criterion": "criteria",
    "create_selector": "selectors",
    "list_criteria": "criteria",
    "list_selectors": "selectors",
    "load_model": "files",
    "load_purified": "files",
    "load_weights": "files",
    "purify": "pipeline",
    "read_images": "files",
    "read_report": "files",
    "register_criterion": "criteria",
    "register_selector": "selectors",
    "save_purified": "files",
    "scan": "evidence",
}

__all__ = [
    "CleanData",
    "Compute",
    "Criterion",
    "Diagnosis",
    "Preprocessing",
    "Purified",
    "PurifyError",
    "Selector",
    "__version__",
    "create_criterion",
    "create_selector",
    "list_criteria",
    "list_selectors",
    "load_model",
    "load_purified",
    "load_weights",
    "purify",
    "read_images",
    "read_report",
    "register_criterion",
    "register_selector",
    "save_purified",
    "scan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = found  # the next time it is there
    return found


def __dir__() -> list[str]:
    return __all__
