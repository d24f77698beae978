"""Parts of a page (text, tables, pictures), and how numbers are written."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Row = Sequence[str]  # cells of text


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        align: A letter for each column: l(eft), r(ight), c(ode).
        rows: Rows of cells.
        head: Names of the columns; empty if the first column names the rows.
    """

    align: str
    rows: Sequence[Row]
    head: Row = ()


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Attributes:
        title: Of the section.
        text: Paragraphs.
        points: Items of a list.
        table: A table below the text.
        folded: Titles and tables that the reader can unfold.
        picture: Name of a picture, which is shown if the page has it.
        caption: Of the picture.
    """

    title: str
    text: list[str] = field(default_factory=list)
    points: list[str] = field(default_factory=list)
    table: Table | None = None
    folded: list[tuple[str, Table]] = field(default_factory=list)
    picture: str = ""
    caption: str = ""


def sentence(text: str) -> str:
    """With a capital and a full stop; nothing of nothing."""
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def percent(share: float, digits: int = 1) -> str:
    """0.123 as "12.3%"."""
    return f"{share:.{digits}%}"


def points(share: float) -> str:
    """0.0123 as "+1.2", in percentage points."""
    return f"{100 * share:+.1f}"


def interval(ends: Sequence[float]) -> str:
    """The interval of a share, such as "[1.2%, 3.4%]"."""
    low, high = ends
    return f"[{percent(low)}, {percent(high)}]"


def spans(channels: Iterable[int]) -> str:
    """Ascending channels in short: [0, 3, 4, 5] as "0, 3-5"."""
    runs = itertools.groupby(enumerate(channels), lambda pair: pair[1] - pair[0])
    ends = [[channel for _, channel in run] for _, run in runs]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in ends)


def number(value: float | None) -> str:
    """A number with four digits; None stands for NaN or inf in JSON."""
    return "not finite" if value is None else f"{value:.4g}"
