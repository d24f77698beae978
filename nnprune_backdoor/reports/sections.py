"""Parts of a report for people: text, tables, pictures, and how numbers are written."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Row = Sequence[str]  # cells of text


@dataclass(frozen=True)
class Table:
    """`align` has a letter a column: l(eft), r(ight), c(ode)."""

    align: str
    rows: Sequence[Row]
    head: Row = ()  # none: the first column names what the second says


@dataclass(frozen=True)
class Section:
    """A part of the page; `picture` names one of the pictures that the page may be given."""

    title: str
    text: list[str] = field(default_factory=list)
    points: list[str] = field(default_factory=list)
    table: Table | None = None
    folded: list[tuple[str, Table]] = field(default_factory=list)  # title, for those who want it
    picture: str = ""
    caption: str = ""


def percent(share: float, digits: int = 1) -> str:
    """0.123 -> 12.3%."""
    return f"{share:.{digits}%}"


def points(share: float) -> str:
    """0.0123 -> +1.2, percentage points."""
    return f"{100 * share:+.1f}"


def interval(ends: Sequence[float]) -> str:
    """Of a share."""
    low, high = ends
    return f"[{percent(low)}, {percent(high)}]"


def spans(channels: Iterable[int]) -> str:
    """[0, 3, 4, 5] -> 0, 3-5. Ascending."""
    runs = itertools.groupby(enumerate(channels), lambda pair: pair[1] - pair[0])
    ends = [[channel for _, channel in run] for _, run in runs]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in ends)


def number(value: float | None) -> str:
    """Four digits; None is what JSON has in place of NaN and inf."""
    return "not finite" if value is None else f"{value:.4g}"
