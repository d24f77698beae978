"""The table of a fleet, the model with the strongest evidence first."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from .jobs import Data

State = Literal["evidence", "cannot tell", "done", "failed", "missing"]

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet runs text that begins so

_LIMITS = [
    "A model without evidence may have a backdoor: triggers that the searches cannot find leave "
    "none.",
    "A model that failed, or has no result yet, was not looked at.",
]


@dataclass(frozen=True)
class Row:
    """A model in the table.

    Attributes:
        name: Of the model.
        file: Name of its result; None: there is none yet.
        failed: Why is in `says`.
        says: In a line.
        evidence: By which it is sorted; None: it cannot be told.
        alarm: There is evidence of a backdoor.
        facts: Further columns.
        seconds: That it took.
        unknown: Evidence was sought, and nothing can be told.
    """

    name: str
    file: str | None = None
    failed: bool = False
    says: str = "no result yet"
    evidence: float | None = None
    alarm: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    unknown: bool = False

    @classmethod
    def of(cls, name: str, key: str, result: Data) -> Self:
        """From the file of a result."""
        return cls(
            name,
            f"{key}.json",
            result["state"] == "failed",
            result["says"],
            result["evidence"],
            result["alarm"],
            result["facts"],
            result["seconds"],
            result["unknown"],
        )

    @property
    def order(self) -> tuple[bool, bool, bool, float, str]:
        """Alarms, then the others by evidence; then failures, then what is missing."""
        evidence = -math.inf if self.evidence is None else self.evidence
        return (self.file is None, self.failed, not self.alarm, -evidence, self.name)

    @property
    def state(self) -> State:
        """In a word or two."""
        if self.file is None:
            return "missing"
        if self.failed:
            return "failed"
        return "evidence" if self.alarm else "cannot tell" if self.unknown else "done"


def counted(rows: Sequence[Row]) -> str:
    """How many models of which kind."""
    states = [row.state for row in rows]
    counts = [f"{states.count('evidence')} with evidence of a backdoor"]
    others: tuple[State, ...] = ("cannot tell", "failed", "missing")
    counts += [f"{n} {state}" for state in others if (n := states.count(state))]
    return f"{len(rows)} models: {', '.join(counts)}"


def to_csv(rows: Sequence[Row]) -> str:
    """A line a model, with a head."""
    text = io.StringIO()
    writer = csv.writer(text)
    facts = _facts(rows)
    writer.writerow(["model", "state", "evidence", "says", *facts, "seconds", "result"])
    for row in rows:
        own = [row.facts.get(name) for name in facts]
        cells = [row.name, row.state, row.evidence, row.says, *own, round(row.seconds, 2), row.file]
        writer.writerow([_cell(cell) for cell in cells])
    return text.getvalue()


def to_html(rows: Sequence[Row], subject: str) -> str:
    """A page without scripts and links; `subject` stands below its title."""
    from ..reports.pages import html_page
    from ..reports.sections import Section, Table

    states = [row.state for row in rows]
    seconds = sum(row.seconds for row in rows)
    facts = [
        ("models", str(len(rows)), "a line each below"),
        ("evidence of a backdoor", str(states.count("evidence")), "of the kinds looked for"),
        ("cannot tell", str(states.count("cannot tell")), "evidence was sought"),
        ("failed", str(states.count("failed")), f"no result yet: {states.count('missing')}"),
        ("seconds", f"{seconds:.0f}", "of all models, one after the other"),
    ]
    names = _facts(rows)
    head = ["model", "evidence", "says", *names, "seconds", "result"]
    cells = [
        [
            row.name,
            _shown(row.evidence),
            row.says,
            *(_shown(row.facts.get(name)) for name in names),
            f"{row.seconds:.1f}",
            row.file or "",
        ]
        for row in rows
    ]
    table = Table("lrl" + "l" * len(names) + "rc", cells, head)
    parts = [Section("What this does not say", points=_LIMITS), Section("Models", table=table)]
    return html_page("Many models", subject, counted(rows), facts, parts, pictures={})


def _facts(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.facts))


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
