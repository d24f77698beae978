"""Parts of a page (text, tables, pictures), and how numbers are written."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = Sequence[str]  # cells of text


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        align: A letter for each column: l(eft), r(ight), c(ode).
        rows: Rows of cells.
        head: Names of the columns; empty if there is nothing to name.
        shades: Of each cell, from 0 (none) to 4; empty: no cell has any.

    Where the first column has no name, it names the rows.
    """

    align: str
    rows: Sequence[Row]
    head: Row = ()
    shades: Sequence[Sequence[int]] = ()

    @property
    def named(self) -> bool:
        """Whether the first column names the rows."""
        return not self.head or not self.head[0]


@dataclass(frozen=True)
class Picture:
    """A small picture.

    Attributes:
        png: The file.
        alt: What it shows, for those who cannot see it.
        caption: Below it.
    """

    png: bytes
    alt: str
    caption: str

    @property
    def source(self) -> str:
        """The file as an address."""
        return data_url(self.png)


@dataclass(frozen=True)
class Shelf:
    """Small pictures side by side.

    Attributes:
        title: Above them.
        pictures: In order.
    """

    title: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Attributes:
        title: Of the section.
        text: Paragraphs.
        points: Items of a list.
        table: A table below the text.
        beside: Titles and tables that stand side by side.
        folded: Titles and tables that the reader can unfold.
        picture: Name of a picture, which is shown if the page has it.
        caption: Of the picture.
        shelves: Small pictures, which pages in Markdown lack.
    """

    title: str
    text: list[str] = field(default_factory=list)
    points: list[str] = field(default_factory=list)
    table: Table | None = None
    beside: list[tuple[str, Table]] = field(default_factory=list)
    folded: list[tuple[str, Table]] = field(default_factory=list)
    picture: str = ""
    caption: str = ""
    shelves: Sequence[Shelf] = ()


def data_url(png: bytes) -> str:
    """A PNG file as an address, so that nothing is loaded."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


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


def settings_table(title: str, settings: Mapping[str, Any]) -> tuple[str, Table]:
    """A title and a table of names and values, for `Section.folded`."""
    rows = [[name, json_of(value)] for name, value in settings.items()]
    return title, Table("lc", rows or [["none", ""]])


def json_of(value: Any) -> str:
    """As JSON in one line."""
    return json.dumps(value, ensure_ascii=False)
