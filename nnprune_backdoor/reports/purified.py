"""The result of `purify`."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..removal.recipe import Recipe
from . import gallery, pages, plots, summary
from .cautions import cautions_of
from .record import Record
from .report import Report
from .sections import Shelf

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Purified(Record):
    """The result of `purify`: the purified model and a record of how it was made.

    The `plot_` methods return matplotlib figures of `size` (width, height) inches. Without the
    extra `plots` they raise PurifyError.
    """

    @property
    def recipe(self) -> Recipe:
        """What was cut out of the original architecture; empty if the shape is unchanged."""
        return Recipe() if self.removal is None else self.removal.recipe

    @property
    def cautions(self) -> tuple[str, ...]:
        """What contradicts or weakens the outcome, in sentences, the gravest first."""
        return cautions_of(self)

    def __repr__(self) -> str:
        return summary.headline(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"

    def summary(self) -> str:
        """What was done, what it cost, and what it does not say, a line each."""
        return summary.summarise(self)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for strict JSON; see `reports.Report`."""
        return Report.of(self).to_dict()

    def to_markdown(self) -> str:
        """The report as Markdown, without pictures."""
        return pages.to_markdown(Report.of(self))

    def to_html(self, *, pictures: bool = True, examples: bool = True) -> str:
        """The report as one HTML page, without scripts and links.

        Args:
            pictures: include pictures; plots need matplotlib.
            examples: show a few of the clean images among them.
        """
        report = Report.of(self)
        shelves = self._shelves(report, examples) if pictures else {}
        return pages.to_html(report, *pages.draw(lambda: plots.pngs(self), pictures), shelves)

    def _shelves(self, report: Report, examples: bool) -> dict[str, list[Shelf]]:
        """Small pictures for the page."""
        if self.answers is None:
            return {}
        pixels, name = self.given.pixels, report.label
        triggers = [stamped.trigger for stamped in self.answers.stamped]
        shelves = {"triggers": gallery.trigger_shelf(triggers, pixels, name)}
        if examples:
            shelves["examples"] = gallery.example_shelves(self.answers, pixels, name)
        return shelves

    def plot_scores(self, size: plots.Size | None = None) -> Figure:
        """The score of every neuron, a row for each layer."""
        return plots.scores(self, size)

    def plot_curve(self, size: plots.Size | None = None) -> Figure:
        """Accuracy drop and proxy success by number of neurons; DataError if there is no curve."""
        return plots.curve(self, size)

    def plot_triggers(self, size: plots.Size | None = None) -> Figure:
        """The recovered triggers on one of the clean images; DataError if there are none."""
        return plots.triggers(self, size)

    def plot_evidence(self, size: plots.Size | None = None) -> Figure:
        """Evidence beside that of benign networks; DataError if the selector looks for none."""
        return plots.evidence(self, size)
