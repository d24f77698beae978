"""Plots of a scan, as matplotlib figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..evidence.diagnosis import Diagnosis
from .plots import BLUE, RED, Size, as_pngs, draw_evidence, figure_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def evidence(diagnosis: Diagnosis, size: Size | None = None) -> Figure:
    """What each kind of evidence adds for the most suspicious label; see `plots.evidence`."""
    return draw_evidence(diagnosis.to_dict()["suspicions"][0]["evidence"], {}, size)


def labels(diagnosis: Diagnosis, size: Size | None = None) -> Figure:
    """Success of the universal perturbation, and size of the trigger, of each label searched."""
    shown = {
        "universal": {p.target: p.success for p in diagnosis.perturbations},
        "trigger": {t.target: t.norm / t.mask.numel() for t in diagnosis.triggers},
    }
    figure, axes = figure_of(size or (7.0, 0.5 + 1.4 * len(shown)), len(shown))
    for axis, (name, by_label) in zip(axes, shown.items(), strict=True):
        first = diagnosis.suspicions[0].label
        colours = [RED if label == first else BLUE for label in by_label]
        axis.bar(list(by_label), list(by_label.values()), color=colours, width=0.8)
        axis.set_ylabel(name)
        axis.set_ylim(0, 1.03)
        axis.set_xlim(-0.6, diagnosis.classes - 0.4)
        if diagnosis.classes <= 20:
            axis.set_xticks(range(diagnosis.classes))
    axes[-1].set_xlabel("label; red: the most suspicious one")
    return figure


def pngs(diagnosis: Diagnosis, dpi: int = 160) -> dict[str, bytes]:
    """All plots of the diagnosis as PNG files: name of the plot -> file."""
    return as_pngs({"evidence": evidence(diagnosis), "labels": labels(diagnosis)}, dpi)
