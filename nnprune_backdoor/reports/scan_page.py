"""What a scan found, as a page in Markdown or HTML."""

from __future__ import annotations

from ..errors import PurifyError
from ..evidence.diagnosis import REACHABLE, Diagnosis
from . import scan_plots
from .evidence_section import evidence_section
from .pages import html_page, markdown_page
from .sections import Row, Section, Table, number, percent

_TITLE = "Scan for a backdoor"

_LIMITS = [
    "No evidence of these kinds is no proof that there is no backdoor: other triggers than these "
    "searches can find leave none.",
    "The benign networks that the evidence is held against are few, small, and of one task.",
    "Every network has some picture that sends images to a label. A trigger shown here is what "
    "this network reacts to; it need not look like an attacker's.",
]


def scan_to_markdown(diagnosis: Diagnosis) -> str:
    """GitHub's Markdown, without pictures."""
    return markdown_page(_TITLE, _headline(diagnosis), _sections(diagnosis, False))


def scan_to_html(diagnosis: Diagnosis, pictures: bool = True) -> str:
    """A page that needs nothing else: no script, no network; without matplotlib, no pictures."""
    drawn, note = dict[str, bytes](), ""
    if pictures:
        try:
            drawn = scan_plots.pngs(diagnosis)
        except PurifyError as missing:
            note = f"No pictures: {missing}"
    subject = f"{type(diagnosis.model).__name__}, {diagnosis.classes} classes"
    sections = _sections(diagnosis, bool(drawn))
    return html_page(_TITLE, subject, _headline(diagnosis), sections, pictures=drawn, note=note)


def _headline(diagnosis: Diagnosis) -> list[Row]:
    kinds = [item.kind for item in diagnosis.evidence if item.alarm]
    tested = [item.kind for item in diagnosis.evidence if item.threshold is not None]
    verdict = f"label {diagnosis.target}" if kinds else "none of the kinds tested"
    looked = f"{len(diagnosis.triggers)} of {diagnosis.classes}"
    return [
        ("evidence of a backdoor", verdict, ", ".join(kinds or tested)),
        ("labels searched", looked, "for a trigger"),
        ("clean images", f"{diagnosis.images:,}", "their labels are not looked at"),
        ("seconds", f"{sum(diagnosis.seconds.values()):.0f}", f"seed {diagnosis.seed}"),
    ]


def _sections(diagnosis: Diagnosis, pictures: bool) -> list[Section]:
    """Without pictures, what is nothing but one is left out."""
    labels = Section(
        "Label by label",
        [
            "Shares of images. Restoration: that get their own label back once few neurons "
            "are silent. Universal: that one small picture sends to the label. Exposure: that "
            "get the label once the clean task is unlearned."
        ],
        picture="labels",
        caption="Red: the suspected label; dotted: the alarm.",
    )
    seconds = [[stage, f"{took:.1f} s"] for stage, took in diagnosis.seconds.items()]
    return [
        Section("What this does not say", points=_limits(diagnosis)),
        evidence_section(diagnosis.to_dict(), None),
        *([labels] if pictures else []),
        _triggers(diagnosis),
        *_universal(diagnosis),
        _exposed(diagnosis),
        Section("Time", table=Table("lr", seconds)),
    ]


def _limits(diagnosis: Diagnosis) -> list[str]:
    caution = (
        [f"{REACHABLE[0].upper()}{REACHABLE[1:]}."] if diagnosis.reachable_by_most_labels else []
    )
    return [*caution, *_LIMITS]


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
    text = "One a label, found by inversion on clean images; success on images held out of that."
    return Section(
        "Recovered triggers",
        [text],
        folded=folded,
        picture="trigger",
        caption="A clean image, the mask, the pattern under the mask, the image stamped.",
    )


def _universal(diagnosis: Diagnosis) -> list[Section]:
    """The suspected label's; nothing where none is suspected."""
    found = diagnosis.perturbation
    if found is None:
        return []
    text = (
        f"One picture, added to any image (root mean square {percent(found.rms)} of the valid "
        f"range, at most {percent(found.largest)}), sends {percent(found.success)} of "
        f"{found.tested} images that it was not made from to label {found.target}."
    )
    return [
        Section(
            "A universal perturbation",
            [text],
            picture="universal",
            caption="A clean image, what is added (made stronger), the image with it.",
        )
    ]


def _exposed(diagnosis: Diagnosis) -> Section:
    looks = diagnosis.exposed.trajectory
    rows = [[str(look.steps), percent(look.accuracy), str(_most(look.predicted))] for look in looks]
    text = (
        "The clean task was unlearned by gradient ascent; what is left is what the clean images "
        f"did not need. Most frequent label in the end: {diagnosis.exposed.label}."
    )
    table = Table("rrr", rows, ["steps", "agreement with the model", "most frequent label"])
    return Section("The exposed model", [text], folded=[("Epoch by epoch", table)])


def _most(predicted: tuple[float, ...]) -> int:
    return max(range(len(predicted)), key=predicted.__getitem__)
