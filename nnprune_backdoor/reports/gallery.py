"""Pictures of recovered triggers, and of a few clean images with and without them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence

from PIL import Image
from torch import Tensor

from ..core.answers import Answers, Stamp
from ..core.recovered import PixelRange, RecoveredTrigger
from ..triggers.perturbation import RecoveredPerturbation
from .plots import visible
from .sections import Picture, Shelf
from .sections import number as written

_LARGEST = 96  # pixels of a side; a larger picture is made smaller, so that pages stay small
_TRIGGERS = 6  # shown on one page

Name = Callable[[int], str]  # a label in words


def trigger_shelf(triggers: Sequence[Stamp], pixels: PixelRange, name: Name = str) -> list[Shelf]:
    """The triggers alone, side by side; nothing where there is none.

    Args:
        triggers: the most important first; of many, a few are shown.
        pixels: range of valid pixels.
        name: of a label.
    """
    pictures = [_alone(trigger, pixels, name) for trigger in triggers[:_TRIGGERS]]
    title = "The triggers alone"
    if len(pictures) < len(triggers):
        title += f": {len(pictures)} of {len(triggers)}"
    return [Shelf(title, pictures)] if pictures else []


def example_shelves(answers: Answers, pixels: PixelRange, name: Name = str) -> list[Shelf]:
    """A few clean images with what both models answer: as they are, then with each trigger."""
    shown = list(answers.shown)
    said = _said(answers.before[shown].tolist(), answers.after[shown].tolist(), name)
    if answers.labels is not None:
        labels = answers.labels[shown].tolist()
        said = [f"label: {name(own)}\n{text}" for own, text in zip(labels, said, strict=True)]
    shelves = [Shelf("As they are", _pictures(answers.images, said, pixels))]
    for stamped in answers.stamped[:_TRIGGERS]:
        trigger = stamped.trigger
        title = f"With the {_kind(trigger)} of label {name(trigger.target)}"
        said = _said(stamped.before, stamped.after, name)
        shelves.append(Shelf(title, _pictures(trigger(answers.images), said, pixels)))
    return shelves


def _said(before: Iterable[int], after: Iterable[int], name: Name) -> list[str]:
    pairs = zip(before, after, strict=True)
    return [f"given model: {name(first)}\npurified: {name(second)}" for first, second in pairs]


def _pictures(images: Tensor, captions: Sequence[str], pixels: PixelRange) -> list[Picture]:
    return [
        Picture(_png(image, pixels), f"clean image {number}", caption)
        for number, (image, caption) in enumerate(zip(images, captions, strict=True), 1)
    ]


def shelf_of(trigger: Stamp, example: Tensor | None, pixels: PixelRange) -> Shelf:
    """A trigger alone, and an image (C, H, W) without and with it, if there is one to show."""
    kind = _kind(trigger)
    pictures = [_alone(trigger, pixels, str)]
    if example is not None:
        changed = trigger(example[None])[0]
        pictures += [
            Picture(_png(example, pixels), "a clean image", "a clean image"),
            Picture(_png(changed, pixels), f"the same image with the {kind}", f"with the {kind}"),
        ]
    return Shelf(f"The {kind} of label {trigger.target}", pictures)


def _kind(trigger: Stamp) -> str:
    if isinstance(trigger, RecoveredPerturbation):
        return "perturbation"
    assert isinstance(trigger, RecoveredTrigger)
    return "blend" if (trigger.mask == trigger.mask.max()).all() else "patch"


def _alone(trigger: Stamp, pixels: PixelRange, name: Name) -> Picture:
    """A perturbation around grey, amplified; a patch on grey, by its mask; a blend's picture."""
    middle, label = (pixels.low + pixels.high) / 2, name(trigger.target)
    if isinstance(trigger, RecoveredPerturbation):
        factor = 0.5 / max(trigger.largest, 1e-12)
        image, how = middle + factor * trigger.pattern, f"times {written(factor)}"
    elif _kind(trigger) == "blend":
        assert isinstance(trigger, RecoveredTrigger)
        image, how = trigger.pattern, f"shows through by {trigger.mask.max().item():.2g}"
    else:
        assert isinstance(trigger, RecoveredTrigger)
        image = trigger((middle + 0 * trigger.pattern)[None])[0]
        how = f"{written(trigger.norm)} of {trigger.mask.numel():,} pixels, on grey"
    alt = f"the recovered {_kind(trigger)} of label {label}, alone"
    return Picture(_png(image, pixels), alt, f"label {label}: {_kind(trigger)}, {how}")


def _png(image: Tensor, pixels: PixelRange) -> bytes:
    picture = Image.fromarray((255 * visible(image, pixels)).round().astype("uint8"))
    picture.thumbnail((_LARGEST, _LARGEST), Image.Resampling.BOX)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()
