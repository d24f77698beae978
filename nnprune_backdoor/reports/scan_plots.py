"""Plots of a scan, as matplotlib figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import DataError
from ..evidence.diagnosis import Diagnosis
from .plots import (
    BLUE,
    GREY,
    RED,
    Size,
    as_pngs,
    draw_evidence,
    draw_perturbation,
    draw_trigger,
    figure_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_BY_LABEL = ("restoration", "universal", "exposure")  # kinds that are shares of images


def evidence(diagnosis: Diagnosis, size: Size | None = None) -> Figure:
    """Each kind of evidence beside that of benign networks; see `plots.evidence`."""
    return draw_evidence(diagnosis.to_dict()["evidence"], {}, size)


def labels(diagnosis: Diagnosis, size: Size | None = None) -> Figure:
    """Restoration, universal perturbation and exposure of each label."""
    shown = [item for item in diagnosis.evidence if item.kind in _BY_LABEL]
    figure, axes = figure_of(size or (7.0, 0.5 + 1.4 * len(shown)), len(shown))
    for axis, item in zip(axes, shown, strict=True):
        names, values = zip(*sorted(item.by_label.items()), strict=True)
        colours = [RED if label == diagnosis.target else BLUE for label in names]
        axis.bar(names, values, color=colours, width=0.8)
        if item.threshold is not None:
            axis.axhline(item.threshold, color=GREY, linestyle=":", linewidth=1.2)
        axis.set_ylabel(item.kind)
        axis.set_ylim(0, 1.03)
        axis.set_xlim(-0.6, diagnosis.classes - 0.4)
        if diagnosis.classes <= 20:
            axis.set_xticks(range(diagnosis.classes))
    axes[-1].set_xlabel("label; red: the suspected one; dotted: the alarm")
    return figure


def trigger(diagnosis: Diagnosis, size: Size | None = None) -> Figure:
    """The trigger of the suspected label, or else the smallest that works; see `draw_trigger`.

    The trigger of the suspected label may work on few images only, if other evidence raised the
    alarm.

    Raises:
        DataError: there is neither.
    """
    shown = diagnosis.trigger or diagnosis.smallest
    if shown is None:
        raise DataError("there is no trigger to show: none that was recovered works")
    figure, axes = figure_of(size or (7.0, 2.1), 1, columns=4)
    draw_trigger(axes, shown, diagnosis.example, diagnosis.pixels)
    return figure


def universal(diagnosis: Diagnosis, size: Size | None = None) -> Figure:
    """The universal perturbation for the suspected label; see `draw_perturbation`.

    Raises:
        DataError: no label is suspected.
    """
    perturbation = diagnosis.perturbation
    if perturbation is None:
        raise DataError("there is no perturbation to show: no label is suspected")
    figure, axes = figure_of(size or (5.5, 2.1), 1, columns=3)
    draw_perturbation(axes, perturbation, diagnosis.example, diagnosis.pixels)
    return figure


def pngs(diagnosis: Diagnosis, dpi: int = 160) -> dict[str, bytes]:
    """All plots that the diagnosis has data for, as PNG files: name of the plot -> file."""
    figures = {"evidence": evidence(diagnosis), "labels": labels(diagnosis)}
    if diagnosis.trigger or diagnosis.smallest:
        figures["trigger"] = trigger(diagnosis)
    if diagnosis.perturbation:
        figures["universal"] = universal(diagnosis)
    return as_pngs(figures, dpi)
