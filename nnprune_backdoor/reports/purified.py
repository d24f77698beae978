"""What `purify` gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import PurifyError
from ..removal.recipe import Recipe
from ..training.repair import triggers_of
from . import plots
from .pages import to_html, to_markdown
from .record import Record
from .report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Purified(Record):
    """What `purify` gives back: a record of all it did, and ways to look at it.

    The `plot_` methods give matplotlib figures; without the extra `plots` they raise PurifyError.
    """

    @property
    def recipe(self) -> Recipe:
        """How the original architecture becomes that of `model`; empty if it is the same."""
        return Recipe() if self.removal is None else self.removal.recipe

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, fit for strict JSON (`report.Report` says what is where)."""
        return Report.of(self).to_dict()

    def to_markdown(self) -> str:
        """The report as a Markdown text, without pictures."""
        return to_markdown(Report.of(self))

    def to_html(self, *, pictures: bool = True) -> str:
        """The report as one HTML page that needs no script and no network.

        Args:
            pictures: with plots, where matplotlib is installed, else the page says why there are
                none. Where a trigger was recovered they show one of the clean images.
        """
        drawn, note = dict[str, bytes](), "Pictures were not asked for."
        if pictures:
            try:
                drawn, note = plots.pngs(self), ""
            except PurifyError as missing:
                note = f"No pictures: {missing}"
        return to_html(Report.of(self), drawn, note)

    def plot_scores(self, size: plots.Size | None = None) -> Figure:
        """Every neuron by its score, a layer a row; `size` is width, height in inches."""
        return plots.scores(self, size)

    def plot_curve(self, size: plots.Size | None = None) -> Figure:
        """What the amounts that were tried did; DataError if the selector tries none."""
        return plots.curve(self, size)

    def plot_triggers(self, size: plots.Size | None = None) -> Figure:
        """The recovered triggers, on one of the clean images; DataError if there are none."""
        return plots.triggers(self, size)

    def plot_evidence(self, size: plots.Size | None = None) -> Figure:
        """Evidence among what benign networks gave; DataError if the selector looks for none."""
        return plots.evidence(self, size)

    def summary(self) -> str:
        """A few lines for people: what was done, what it cost, what it does not say."""
        total = len(self.scores.flat)
        share = len(self.selection) / total
        lines = [
            f"criterion  {self.scores.criterion}",
            f"neurons    {len(self.selection)} of {total} silenced ({share:.2%}), meaning "
            f"'{self.silencing}', in {len(self.selection.by_site())} of "
            f"{len(self.scores.sites)} layers",
            f"because    {self.selection.reason}",
            *self._removal(),
            *self._repair(),
            f"accuracy   {self.accuracy or 'not measured: the clean images have no labels'}",
            *([f"caution    {self.guessing}"] if self.guessing else []),
            *(f"proxy      {proxy}" for proxy in self.triggers),
            f"seconds    {sum(self.seconds.values()):.1f} ("
            + ", ".join(f"{stage} {taken:.1f}" for stage, taken in self.seconds.items())
            + ")",
            "limits     silencing lowers the success of backdoors that use these neurons; it is "
            "no proof that none is left",
        ]
        return "\n".join(lines)

    def _repair(self) -> list[str]:
        if self.repair_rejected:
            return [f"repair     undone: {self.repair_rejected}"]
        if not self.repaired:
            return []
        count = len(triggers_of(self.scores, self.selection))
        return [
            f"repair     all weights trained further to unlearn {count} recovered trigger(s), and "
            "one recovered from the silenced network"
        ]

    def _removal(self) -> list[str]:
        if self.removal is None:
            return ["removal    none: the model has its original shape"]
        first, *rest = str(self.removal).splitlines()
        return [f"removal    {first}", *(f"           {line}" for line in rest)]
