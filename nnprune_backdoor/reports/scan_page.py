"""The page about a scan, in Markdown or HTML."""

from __future__ import annotations

from dataclasses import replace

from ..evidence.diagnosis import Diagnosis
from . import scan_plots
from .evidence_section import evidence_section
from .gallery import shelf_of
from .pages import draw, html_page, markdown_page
from .sections import Row, Section, Table, number, percent, sentence

_TITLE = "Scan for a backdoor"
_TRIGGERS, _UNIVERSAL = "Recovered triggers", "A universal perturbation"

_LIMITS = [
    "Finding no evidence is no proof that there is no backdoor: triggers that these searches "
    "cannot find leave none.",
    "The probability was learned from small networks of one task, of which every second one had a "
    "backdoor.",
    "In every network, some small picture sends images to a label. A trigger shown here is what "
    "this network reacts to; it need not look like an attacker's.",
]


def scan_to_markdown(diagnosis: Diagnosis) -> str:
    """The diagnosis in GitHub's Markdown, without pictures."""
    return markdown_page(
        _TITLE, diagnosis.sentence, _headline(diagnosis), _sections(diagnosis, False)
    )


def scan_to_html(diagnosis: Diagnosis, pictures: bool = True, *, examples: bool = True) -> str:
    """The diagnosis as one HTML page, without scripts and links.

    Args:
        pictures: include pictures; plots need matplotlib.
        examples: show one of the clean images among them.
    """
    files, note = draw(lambda: scan_plots.pngs(diagnosis), pictures)
    subject = f"{type(diagnosis.model).__name__}, {diagnosis.classes} classes"
    sections = _sections(diagnosis, bool(files))
    if pictures:
        sections = [_with_shelf(section, diagnosis, examples) for section in sections]
    return html_page(
        _TITLE,
        subject,
        diagnosis.sentence,
        _headline(diagnosis),
        sections,
        pictures=files,
        note=note,
    )


def _headline(diagnosis: Diagnosis) -> list[Row]:
    probability = diagnosis.probability
    shown = "cannot tell" if probability is None else f"{probability:.2f}"
    label = f"label {diagnosis.suspicions[0].label} is the most suspicious"
    return [
        ("probability of a backdoor", shown, "no label" if probability is None else label),
        (
            "labels searched",
            f"{len(diagnosis.perturbations)} of {diagnosis.classes}",
            f"for a trigger: {len(diagnosis.triggers)}",
        ),
        ("clean images", f"{diagnosis.images:,}", "their labels are not used"),
        ("seconds", f"{sum(diagnosis.seconds.values()):.0f}", f"seed {diagnosis.seed}"),
    ]


def _sections(diagnosis: Diagnosis, pictures: bool) -> list[Section]:
    """The whole page; without pictures, the section that is only a picture is left out."""
    labels = Section(
        "Label by label",
        [
            "Universal: share of images that one perturbation sends to the label. Trigger: size of "
            "the recovered one as a share of the image, for the labels that it was sought for."
        ],
        picture="labels",
        caption="Red: the most suspicious label.",
    )
    times = [[stage, f"{seconds:.1f} s"] for stage, seconds in diagnosis.seconds.items()]
    return [
        Section("What this does not say", points=_limits(diagnosis)),
        evidence_section(diagnosis.to_dict(), None),
        *([labels] if pictures else []),
        _triggers(diagnosis),
        *_universal(diagnosis),
        Section("Time", table=Table("lr", times)),
    ]


def _with_shelf(section: Section, diagnosis: Diagnosis, examples: bool) -> Section:
    """The same section; those about a trigger of the most suspicious label get its pictures."""
    shown = {_TRIGGERS: diagnosis.trigger, _UNIVERSAL: diagnosis.perturbation}
    trigger = shown.get(section.title)
    if trigger is None:
        return section
    example = diagnosis.example if examples else None
    return replace(section, shelves=[shelf_of(trigger, example, diagnosis.pixels)])


def _limits(diagnosis: Diagnosis) -> list[str]:
    return [*map(sentence, diagnosis.cautions), *_LIMITS]


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
        "Recovered by inversion from clean images for the suspected labels and for those that they "
        "are compared with; success on images that the inversion did not use."
    )
    return Section(_TRIGGERS, [text], folded=folded)


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
    return [Section(_UNIVERSAL, [text])]
