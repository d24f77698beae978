"""The page about a scan, in Markdown or HTML."""

from __future__ import annotations

from ..evidence.diagnosis import Diagnosis
from . import scan_plots
from .evidence_section import evidence_section
from .pages import draw, html_page, markdown_page
from .sections import Row, Section, Table, number, percent

_TITLE = "Scan for a backdoor"

_LIMITS = [
    "Finding no evidence is no proof that there is no backdoor: triggers that these searches "
    "cannot find leave none.",
    "The benign networks that the evidence is compared with are few, small, and of one task.",
    "In every network, some small picture sends images to a label. A trigger shown here is what "
    "this network reacts to; it need not look like an attacker's.",
]


def scan_to_markdown(diagnosis: Diagnosis) -> str:
    """The diagnosis in GitHub's Markdown, without pictures."""
    return markdown_page(_TITLE, _headline(diagnosis), _sections(diagnosis, False))


def scan_to_html(diagnosis: Diagnosis, pictures: bool = True) -> str:
    """The diagnosis as one HTML page, without scripts and links.

    Args:
        pictures: include plots, if matplotlib is installed.
    """
    files, note = draw(lambda: scan_plots.pngs(diagnosis), pictures)
    subject = f"{type(diagnosis.model).__name__}, {diagnosis.classes} classes"
    sections = _sections(diagnosis, bool(files))
    return html_page(_TITLE, subject, _headline(diagnosis), sections, pictures=files, note=note)


def _headline(diagnosis: Diagnosis) -> list[Row]:
    kinds = [item.kind for item in diagnosis.evidence if item.alarm]
    tested = [item.kind for item in diagnosis.evidence if item.threshold is not None]
    none = "none of the kinds tested" if tested else "no kind could be tested"
    verdict = f"label {diagnosis.target}" if kinds else none
    searched = f"{len(diagnosis.triggers)} of {diagnosis.classes}"
    return [
        ("evidence of a backdoor", verdict, ", ".join(kinds or tested)),
        ("labels searched", searched, "for a trigger"),
        ("clean images", f"{diagnosis.images:,}", "their labels are not used"),
        ("seconds", f"{sum(diagnosis.seconds.values()):.0f}", f"seed {diagnosis.seed}"),
    ]


def _sections(diagnosis: Diagnosis, pictures: bool) -> list[Section]:
    """The whole page; without pictures, the section that is only a picture is left out."""
    labels = Section(
        "Label by label",
        [
            "Shares of images. Restoration: triggered images that get their true label back when "
            "a few neurons are silenced. Universal: images that one perturbation sends to the "
            "label. Exposure: images that get the label after the clean task was unlearned."
        ],
        picture="labels",
        caption="Red: the suspected label; dotted: the alarm.",
    )
    times = [[stage, f"{seconds:.1f} s"] for stage, seconds in diagnosis.seconds.items()]
    return [
        Section("What this does not say", points=_limits(diagnosis)),
        evidence_section(diagnosis.to_dict(), None),
        *([labels] if pictures else []),
        _triggers(diagnosis),
        *_universal(diagnosis),
        _exposed(diagnosis),
        Section("Time", table=Table("lr", times)),
    ]


def _limits(diagnosis: Diagnosis) -> list[str]:
    return [*(f"{text[:1].upper()}{text[1:]}." for text in diagnosis.cautions), *_LIMITS]


def _triggers(diagnosis: Diagnosis) -> Section:
    rows = [
        [
            str(t.target),
            f"{number(t.norm)} of {t.mask.numel():,}",
            percent(t.success),
            str(t.tested),
        ]
        for t in diagnosis.triggers
    ]
    head = ["label", "mask norm (pixels)", "success", "images"]
    folded = [(f"All {len(rows)}", Table("rrrr", rows, head))] if rows else []
    text = (
        "One for each label, recovered by inversion from clean images; success on images that the "
        "inversion did not use."
    )
    return Section(
        "Recovered triggers",
        [text],
        folded=folded,
        picture="trigger",
        caption="A clean image, the mask, the pattern under the mask, the image with the trigger.",
    )


def _universal(diagnosis: Diagnosis) -> list[Section]:
    """The perturbation for the suspected label, if there is one."""
    perturbation = diagnosis.perturbation
    if perturbation is None:
        return []
    text = (
        f"One picture, added to any image (root mean square {percent(perturbation.rms)} of the "
        f"valid range, at most {percent(perturbation.largest)}), sends "
        f"{percent(perturbation.success)} of {perturbation.tested} images that it was not made "
        f"from to label {perturbation.target}."
    )
    return [
        Section(
            "A universal perturbation",
            [text],
            picture="universal",
            caption="A clean image, the perturbation (amplified), the image with the perturbation.",
        )
    ]


def _exposed(diagnosis: Diagnosis) -> Section:
    rows = [
        [str(point.steps), percent(point.accuracy), str(_most_frequent(point.predicted))]
        for point in diagnosis.exposed.trajectory
    ]
    unlearned = (
        "The clean task was unlearned by gradient ascent."
        if diagnosis.exposed.reached
        else "Gradient ascent did not unlearn the clean task within its epochs, so that the labels "
        "below are those of a model that still knows it in part."
    )
    text = (
        f"{unlearned} Most frequent label of the clean images afterwards: "
        f"{diagnosis.exposed.label}."
    )
    table = Table("rrr", rows, ["steps", "agreement with the model", "most frequent label"])
    return Section("The exposed model", [text], folded=[("Epoch by epoch", table)])


def _most_frequent(predicted: tuple[float, ...]) -> int:
    return max(range(len(predicted)), key=predicted.__getitem__)
