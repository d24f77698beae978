"""Errors that this library raises. Each message says what is wrong and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PurifyError(Exception):
    """Base class of the errors of this library."""


class DataError(PurifyError, ValueError):
    """Images, labels or settings cannot be used."""


class UnsupportedModelError(PurifyError, ValueError):
    """The model cannot be scored, silenced or pruned as it is."""


class UnknownNameError(PurifyError, ValueError):
    """No criterion, selector, attack or hyper-parameter has that name."""


class CheckpointError(PurifyError, ValueError):
    """A file is not loaded: it is damaged, too large, does not fit the model, or could run code."""


class OutputError(PurifyError, OSError):
    """A file cannot be written."""


class ScoringError(PurifyError, RuntimeError):
    """A criterion ran without a usable result; its training diverged, for example."""


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> UnknownNameError:
    """The error for a name that is not valid; it lists similar names, then all valid ones."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    return UnknownNameError(
        f"unknown {kind} {name!r}{hint} Available: {', '.join(names) or 'none'}."
    )
