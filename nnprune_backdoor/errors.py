"""What can go wrong, by kind. Every message says what was expected, what was found, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PurifyError(Exception):
    """Base of every error that this library raises on purpose."""


class DataError(PurifyError, ValueError):
    """The clean images or labels cannot be used."""


class UnsupportedModelError(PurifyError, ValueError):
    """The model cannot be scored or silenced as it is."""


class UnknownNameError(PurifyError, ValueError):
    """No criterion, selector, attack or hyper-parameter has that name."""


class ScoringError(PurifyError, RuntimeError):
    """A criterion ran but did not reach a usable result (divergence, a stop that never came)."""


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> UnknownNameError:
    """The error for a misspelt `name`: names the close ones, then all valid ones."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    return UnknownNameError(
        f"unknown {kind} {name!r}{hint} Available: {', '.join(names) or 'none'}."
    )
