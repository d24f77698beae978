"""Pictures of a purification, as matplotlib figures; pyplot and its state stay out of it.

Greys and two colours that can be read on light and on dark pages; PNGs for the report have no
background of their own.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..core.recovered import PixelRange, RecoveredTrigger
from ..errors import DataError, PurifyError
from ..evidence.null import last_look
from ..selectors.accuracy import AccuracyBudget
from ..selectors.trigger import TriggerGone
from ..triggers.perturbation import RecoveredPerturbation
from .record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Size = tuple[float, float]  # inches: width, height


GREY, BLUE, RED = "#7d858d", "#3f8fd2", "#d9622b"

_ROW = 0.22  # inches of a layer in the plot of the scores

_TALLEST = 20.0  # inches


def scores(record: Record, size: Size | None = None) -> Figure:
    """Every neuron by its score, a layer a row; silenced ones stand out."""
    sites = record.scores.sites
    tall = min(_TALLEST, 0.9 + _ROW * len(sites))
    figure, (axis,) = figure_of(size or (7.0, tall), 1)
    chosen = record.selection.by_site()
    for row, (name, piece) in enumerate(record.scores.by_site().items()):
        silent = chosen.get(name, [])
        others = sorted(set(range(len(piece))) - set(silent))
        for which, colour, alpha in ((others, GREY, 0.35), (silent, RED, 0.9)):
            values = piece[which].tolist()
            axis.plot(values, [row] * len(values), "|", color=colour, alpha=alpha, markersize=7)
    every = -(-len(sites) * _ROW // (tall - 0.9)) if tall == _TALLEST else 1
    rows = range(0, len(sites), int(every))
    labels = [_label(sites[row].name) for row in rows]
    axis.set_yticks(rows, labels, fontsize=7, parse_math=False)
    axis.set_ylim(len(sites) - 0.4, -0.6)  # the first layer on top
    axis.set_xlabel("score (low goes first); red: silenced")
    return figure


def curve(record: Record, size: Size | None = None) -> Figure:
    """Accuracy drop, and proxy success where it decided, over the amounts that were tried.

    The dashed line is the amount chosen, the dotted one the drop that the selector allows.

    Raises:
        DataError: the selector tried no amounts.
    """
    points, chosen = record.selection.curve, len(record.selection)
    if not points:
        raise DataError("there is no curve: this selector does not try several amounts")
    amounts = [point.neurons for point in points]
    shown = [("accuracy drop, points", [100 * point.drop for point in points], BLUE)]
    if any(point.success is not None for point in points):
        success = [float("nan") if p.success is None else 100 * p.success for p in points]
        shown.append(("proxy success, %", success, RED))
    figure, axes = figure_of(size or (7.0, 0.6 + 2.0 * len(shown)), len(shown))
    for axis, (name, values, colour) in zip(axes, shown, strict=True):
        axis.plot(amounts, values, "o-", color=colour, markersize=3, linewidth=1.2)
        axis.axvline(chosen, color=GREY, linestyle="--", linewidth=1)
        axis.set_ylabel(name)
        axis.set_xscale("symlog", linthresh=1, linscale=0.3)
        axis.set_xlim(0, max(1, *amounts, chosen) * 1.05)
        axis.tick_params(labelbottom=axis is axes[-1])
    selector = record.given.selector
    if isinstance(selector, AccuracyBudget | TriggerGone):
        axes[0].axhline(100 * selector.max_drop, color=GREY, linestyle=":", linewidth=1)
    if len(axes) > 1:
        axes[1].set_ylim(-3, 103)
    axes[-1].xaxis.set_major_formatter("{x:.0f}")
    axes[-1].set_xlabel(f"neurons silenced (logarithmic); dashed: chosen, {chosen:,}")
    return figure


def triggers(record: Record, size: Size | None = None) -> Figure:
    """Each recovered trigger: a clean image, the mask, the pattern under the mask, the stamp.

    Raises:
        DataError: no trigger was recovered.
    """
    if not record.triggers:
        raise DataError("there is no trigger to show: neither criterion nor selector recovered one")
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
    """Into four axes: the image (C, H, W), mask, pattern under the mask, the image stamped."""
    blank = pixels.low + 0 * trigger.pattern
    pictures = {
        "clean image": _visible(example, pixels),
        f"mask, norm {trigger.norm:.3g}": trigger.mask[0].numpy(),
        "pattern under mask": _visible(
            trigger.mask * trigger.pattern + (1 - trigger.mask) * blank, pixels
        ),
        f"stamped: label {trigger.target}": _visible(trigger(example[None])[0], pixels),
    }
    _draw_pictures(row, pictures)


def draw_perturbation(
    row: Sequence[Axes], added: RecoveredPerturbation, example: Tensor, pixels: PixelRange
) -> None:
    """Into three axes: the image (C, H, W), the perturbation made strong, the image with it."""
    strength = 0.5 / max(added.largest, 1e-12)
    middle = (pixels.low + pixels.high) / 2
    pictures = {
        "clean image": _visible(example, pixels),
        f"added, {strength:.3g} times as strong": _visible(
            middle + strength * added.pattern, pixels
        ),
        f"with it: label {added.target}": _visible(added(example[None])[0], pixels),
    }
    _draw_pictures(row, pictures)


def _draw_pictures(row: Sequence[Axes], pictures: Mapping[str, Any]) -> None:
    """Titles and pictures (H, W) or (H, W, 3) of values in [0, 1], one an axis."""
    for axis, (title, picture) in zip(row, pictures.items(), strict=True):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=8, color=GREY)
        axis.set_xticks([])
        axis.set_yticks([])


def evidence(record: Record, size: Size | None = None) -> Figure:
    """Each kind of evidence among what benign networks gave; a kind a row, each on its own scale.

    Grey ticks are benign networks, the dotted line is where the alarm is, the circle is the model
    as given, the cross the model that was written, where evidence was sought again.

    Raises:
        DataError: the selector looked for no evidence.
    """
    diagnosis = record.selection.details.get("diagnosis")
    if diagnosis is None:
        raise DataError("there is no evidence to show: this selector looks for none")
    after = last_look(record.selection.details, len(record.selection)) or {}
    return draw_evidence(diagnosis["evidence"], after, size)


def draw_evidence(
    items: Sequence[Mapping[str, Any]], after: Mapping[str, Any], size: Size | None = None
) -> Figure:
    """What `Diagnosis.to_dict` says of each kind, and values by kind of another network."""
    figure, axes = figure_of(size or (7.0, 0.5 + 0.55 * len(items)), len(items))
    for axis, item in zip(axes, items, strict=True):
        null = list(item["null"].values())
        axis.plot(null, [0] * len(null), "|", color=GREY, markersize=14, markeredgewidth=1.5)
        axis.plot(item["value"], 0, "o", color=RED, markersize=7)
        if item["kind"] in after:
            axis.plot(after[item["kind"]], 0, "X", color=BLUE, markersize=8)
        if item["threshold"] is not None:
            axis.axvline(item["threshold"], color=GREY, linestyle=":", linewidth=1.2)
        axis.set_yticks([0], [item["kind"]])
        axis.spines["left"].set_visible(False)
        axis.margins(x=0.06)
    return figure


def pngs(record: Record, dpi: int = 160) -> dict[str, bytes]:
    """All that there is to show, by name: "scores", "curve", "triggers", "evidence"."""
    drawn = {"scores": scores(record)}
    if record.selection.curve:
        drawn["curve"] = curve(record)
    if record.triggers:
        drawn["triggers"] = triggers(record)
    if "diagnosis" in record.selection.details:
        drawn["evidence"] = evidence(record)
    return as_pngs(drawn, dpi)


def as_pngs(drawn: Mapping[str, Figure], dpi: int) -> dict[str, bytes]:
    """The figures as files, without a background."""
    files = {}
    for name, figure in drawn.items():
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=dpi, transparent=True)
        files[name] = file.getvalue()
    return files


def figure_of(size: Size, rows: int, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure and its axes, row by row; PurifyError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PurifyError(
            "plots need matplotlib; run: pip install 'nnprune-backdoor[plots]'"
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    axes: list[Any] = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis in axes:
        axis.tick_params(colors=GREY, labelsize=8)
        axis.xaxis.label.set(color=GREY, fontsize=8)
        axis.yaxis.label.set(color=GREY, fontsize=8)
        axis.spines[:].set(color=GREY, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(columns > 1)
    return figure, axes


def _label(name: str, longest: int = 40) -> str:
    """A name that any font can draw."""
    drawn = name.encode("ascii", "backslashreplace").decode()
    return drawn if len(drawn) <= longest else "..." + drawn[3 - longest :]


def _visible(image: Tensor, pixels: PixelRange) -> Any:
    """(C, H, W), normalised -> colours (H, W, 3) or grey (H, W) in [0, 1].

    Values between the least and the greatest seen in the clean images, channel by channel; of
    other than three channels the mean is shown.
    """
    low, high = pixels.low, pixels.high
    unit = ((image - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return (unit.permute(1, 2, 0) if len(unit) == 3 else unit.mean(0)).numpy()
