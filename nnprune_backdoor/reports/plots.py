"""Plots of a purification, as matplotlib figures without pyplot.

The colours can be read on light and dark pages; the PNG files for the report are transparent.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..core.recovered import PixelRange, RecoveredTrigger
from ..core.sites import Neuron
from ..errors import DataError, PurifyError
from ..evidence.probability import KINDS, last_look
from ..selectors.accuracy import AccuracyBudget
from ..selectors.agreement import Agreeing
from ..selectors.trigger import TriggerGone
from .record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Size = tuple[float, float]  # inches: width, height


GREY, BLUE, RED = "#6b737b", "#2f7fc2", "#c9521b"

_OUT, _STILL = "removed", "only silenced"  # what became of a silent neuron

_FATES = {"kept": (GREY, "|"), _STILL: (BLUE, "x"), _OUT: (RED, "d")}  # colour and mark

_ROW_HEIGHT = 0.22  # inches a layer, in the plot of the scores

_MAX_HEIGHT = 20.0  # inches


def scores(record: Record, size: Size | None = None) -> Figure:
    """A row for each layer: the score of every neuron, and how many were kept and removed."""
    sites = record.scores.sites
    height = min(_MAX_HEIGHT, 1.2 + _ROW_HEIGHT * len(sites))
    figure, (axis, counts) = figure_of(size or (7.0, height), 1, columns=2, widths=(5, 2))
    gone = set(record.selection.neurons)
    removed = set() if record.removal is None else set(record.removal.removed)
    for row, (name, layer) in enumerate(record.scores.by_site().items()):
        neurons = [Neuron(name, channel) for channel in range(len(layer))]
        fates = ["kept" if n not in gone else _OUT if n in removed else _STILL for n in neurons]
        left = 0
        for fate, (colour, marker) in _FATES.items():
            values = [s for s, own in zip(layer.tolist(), fates, strict=True) if own == fate]
            alpha = 0.35 if fate == "kept" else 1
            axis.plot(values, [row] * len(values), marker, color=colour, alpha=alpha, markersize=6)
            counts.barh(row, len(values), left=left, color=colour, height=0.7)
            left += len(values)
    step = -(-len(sites) * _ROW_HEIGHT // (height - 1.2)) if height == _MAX_HEIGHT else 1
    rows = range(0, len(sites), int(step))
    labels = [_label(sites[row].name) for row in rows]
    axis.set_yticks(rows, labels, fontsize=7, parse_math=False)
    counts.set_yticks([])
    for each in (axis, counts):
        each.set_ylim(len(sites) - 0.4, -0.6)  # the first layer on top
    axis.set_xlabel("score (low: silenced first)")
    counts.set_xlabel("neurons")
    _legend(figure)
    return figure


def _legend(figure: Figure) -> None:
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], color=c, marker=m, linestyle="") for c, m in _FATES.values()]
    figure.legend(
        marks,
        [*_FATES],
        loc="outside upper right",
        ncols=3,
        frameon=False,
        fontsize=8,
        labelcolor=GREY,
    )


def curve(record: Record, size: Size | None = None) -> Figure:
    """Accuracy drop, agreement and proxy success by number of neurons, as far as they are known.

    Dashed: the amount chosen. Dotted: the limit that the selector keeps to. Diamond: the
    purified model, after its repair if there was one, on the images that measured it.

    Raises:
        DataError: the selector tried no amounts.
    """
    points, chosen = record.selection.curve, len(record.selection)
    if not points:
        raise DataError(
            "there is no curve: this selector does not try several amounts; take 'accuracy', "
            "'trigger' or 'auto'"
        )
    amounts = [point.neurons for point in points]
    shown = _measured(record)
    figure, axes = figure_of(size or (7.0, 0.6 + 1.7 * len(shown)), len(shown))
    for axis, (name, values, colour, final) in zip(axes, shown, strict=True):
        axis.plot(amounts, values, "o-", color=colour, markersize=3, linewidth=1.2)
        if final is not None:
            axis.plot(chosen, final, "D", color=RED, markersize=7)
        axis.axvline(chosen, color=GREY, linestyle="--", linewidth=1)
        axis.set_ylabel(name)
        axis.set_xscale("symlog", linthresh=1, linscale=0.3)
        axis.set_xlim(0, max(1, *amounts, chosen) * 1.05)
        axis.tick_params(labelbottom=axis is axes[-1])
    selector = record.given.selector
    if isinstance(selector, AccuracyBudget | TriggerGone):
        axes[0].axhline(100 * selector.max_drop, color=GREY, linestyle=":", linewidth=1)
    if isinstance(selector, Agreeing):
        axes[-1].axhline(100 * (1 - selector.max_changed), color=GREY, linestyle=":", linewidth=1)
    if shown[-1][0].startswith("proxy"):
        axes[-1].set_ylim(-3, 103)
    axes[-1].xaxis.set_major_formatter("{x:.0f}")
    axes[-1].set_xlabel(f"neurons silenced (logarithmic); dashed: chosen, {chosen:,}")
    return figure


def _measured(record: Record) -> list[tuple[str, list[float], str, float | None]]:
    """What is known of each amount: name, values in %, colour, and of the purified model."""
    points, accuracy, agreement = record.selection.curve, record.accuracy, record.agreement
    drop = None if accuracy is None else 100 * accuracy.drop
    same = None if agreement is None else 100 * agreement.same.value
    known: list[tuple[str, list[float | None], str, float | None]] = [
        ("accuracy drop, points", [p.drop for p in points], BLUE, drop),
        ("same label, %", [p.same for p in points], BLUE, same),
        ("proxy success, %", [p.success for p in points], RED, None),
    ]
    return [
        (name, [math.nan if v is None else 100 * v for v in values], colour, final)
        for name, values, colour, final in known
        if any(v is not None and not math.isnan(v) for v in values)
    ]


def triggers(record: Record, size: Size | None = None) -> Figure:
    """Recovered triggers, a row for each, with columns as in `draw_trigger`.

    Raises:
        DataError: no trigger was recovered.
    """
    if not record.triggers:
        raise DataError(
            "there is no trigger to show: neither criterion nor selector recovered one; take the "
            "selector 'trigger' or 'auto'"
        )
    rows = len(record.triggers)
    figure, axes = figure_of(size or (7.0, 2.1 * rows), rows, columns=4)
    example = record.given.example
    for number, proxy in enumerate(record.triggers):
        row = axes[4 * number : 4 * number + 4]
        draw_trigger(row, proxy.trigger, example, record.given.pixels)
        row[0].set_ylabel(f"by the {proxy.source}", fontsize=8)
    return figure


def draw_trigger(
    row: Sequence[Axes], trigger: RecoveredTrigger, example: Tensor, pixels: PixelRange
) -> None:
    """Draw an image (C, H, W), the mask, the pattern under it, and the image with the trigger."""
    blank = pixels.low + 0 * trigger.pattern
    pictures = {
        "clean image": visible(example, pixels),
        f"mask, norm {trigger.norm:.3g}": trigger.mask[0].numpy(),
        "pattern under mask": visible(
            trigger.mask * trigger.pattern + (1 - trigger.mask) * blank, pixels
        ),
        f"with trigger: label {trigger.target}": visible(trigger(example[None])[0], pixels),
    }
    _draw_pictures(row, pictures)


def _draw_pictures(row: Sequence[Axes], pictures: Mapping[str, Any]) -> None:
    """Draw title -> picture, (H, W) or (H, W, 3) of values in [0, 1], one into each axis."""
    for axis, (title, picture) in zip(row, pictures.items(), strict=True):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=8, color=GREY)
        axis.set_xticks([])
        axis.set_yticks([])


def evidence(record: Record, size: Size | None = None) -> Figure:
    """What each kind of evidence for the most suspicious label adds to the log-odds of a backdoor.

    Circle: the model as given. Cross: the purified model, if evidence was searched there. Left of
    the dotted line: it speaks against a backdoor.

    Raises:
        DataError: the selector does not look for evidence.
    """
    diagnosis = record.selection.details.get("diagnosis")
    if diagnosis is None:
        raise DataError(
            "there is no evidence to show: this selector looks for none; take the selector 'auto'"
        )
    after = last_look(record.selection.details, len(record.selection)) or {}
    return draw_evidence(diagnosis["suspicions"][0]["evidence"], after, size)


def draw_evidence(
    items: Mapping[str, Mapping[str, float]], after: Mapping[str, Any], size: Size | None = None
) -> Figure:
    """Draw evidence as for `evidence`.

    Args:
        items: kind -> "value" and "log_odds", as in `Diagnosis.to_dict()`.
        after: kind -> value in the purified model.
        size: width and height in inches.
    """
    figure, (axis,) = figure_of(size or (7.0, 0.6 + 0.4 * len(items)), 1)
    upward = [*items.items()][::-1]
    for row, (kind, item) in enumerate(upward):
        axis.plot(item["log_odds"], row, "o", color=RED, markersize=7)
        if kind in after:
            axis.plot(KINDS[kind].log_odds(after[kind]), row, "X", color=BLUE, markersize=8)
    axis.axvline(0, color=GREY, linestyle=":", linewidth=1.2)
    axis.set_yticks(range(len(items)), [kind for kind, _ in upward])
    axis.set_xlabel("against a backdoor / for one (log-odds)")
    axis.spines["left"].set_visible(False)
    axis.margins(x=0.06, y=0.2)
    return figure


def pngs(record: Record, dpi: int = 160) -> dict[str, bytes]:
    """The plots that a page shows and the record has data for: name of the plot -> PNG file."""
    figures = {"scores": scores(record)}
    if record.selection.curve:
        figures["curve"] = curve(record)
    if "diagnosis" in record.selection.details:
        figures["evidence"] = evidence(record)
    return as_pngs(figures, dpi)


def as_pngs(figures: Mapping[str, Figure], dpi: int) -> dict[str, bytes]:
    """The figures as transparent PNG files."""
    files = {}
    for name, figure in figures.items():
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=dpi, transparent=True)
        files[name] = file.getvalue()
    return files


def figure_of(
    size: Size, rows: int, columns: int = 1, widths: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """An empty figure and its axes, row by row; raises PurifyError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PurifyError(
            "plots need matplotlib; run: pip install 'nnprune-backdoor[plots]'"
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    found = figure.subplots(rows, columns, squeeze=False, width_ratios=widths)
    axes: list[Any] = found.flatten().tolist()
    for axis in axes:
        axis.tick_params(colors=GREY, labelsize=8)
        axis.xaxis.label.set(color=GREY, fontsize=8)
        axis.yaxis.label.set(color=GREY, fontsize=8)
        axis.spines[:].set(color=GREY, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(columns > 2)
    return figure, axes


def _label(name: str, longest: int = 40) -> str:
    """The end of a name, in ASCII, which any font can draw."""
    text = name.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= longest else "..." + text[3 - longest :]


def visible(image: Tensor, pixels: PixelRange) -> Any:
    """An image (C, H, W), scaled by its valid range to [0, 1] in each channel.

    Returns:
        (H, W, 3) for three channels, else their mean (H, W).
    """
    low, high = pixels.low, pixels.high
    scaled = ((image - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return (scaled.permute(1, 2, 0) if len(scaled) == 3 else scaled.mean(0)).numpy()
