"""Warnings that point at the line of the user's script, however deep they were noticed."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch


def warn_caller(message: str, *between: ModuleType) -> None:
    """Warn at the nearest line that is neither in this package nor in torch nor in these packages.

    Args:
        between: packages through which the user's script got here.
    """
    here = __name__.partition(".")[0]
    packages = [sys.modules[here], torch, *between]
    inside = tuple(str(Path(str(p.__file__)).parent) + os.sep for p in packages)
    level, frame = 1, sys._getframe()
    while frame.f_code.co_filename.startswith(inside) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
