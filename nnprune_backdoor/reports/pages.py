"""Pages in Markdown or HTML.

Names of layers, settings and reasons are not trusted. Every string is escaped: by Jinja's
autoescaping in HTML, by `escape_markdown` in Markdown.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jinja2

from ..errors import PurifyError
from .purify_page import headline, sections
from .report import Report
from .sections import Row, Section, Shelf, data_url, sentence


def to_markdown(report: Report) -> str:
    """The report in GitHub's Markdown, without pictures."""
    return markdown_page("Purification report", report.verdict, headline(report), sections(report))


def to_html(
    report: Report,
    pictures: Mapping[str, bytes],
    note: str = "",
    shelves: Mapping[str, Sequence[Shelf]] = MappingProxyType({}),
) -> str:
    """The report as one HTML page, without scripts and links.

    Args:
        pictures: "scores", "curve", "evidence" -> PNG file; all are optional.
        note: text at the end of the page, for example why there are no pictures.
        shelves: "triggers", "examples" -> small pictures; both are optional.
    """
    return html_page(
        "Purification report",
        report.given["architecture"],
        report.verdict,
        headline(report),
        sections(report, shelves),
        pictures=pictures,
        note=note,
    )


def draw(
    pngs: Callable[[], dict[str, bytes]], pictures: bool = True
) -> tuple[dict[str, bytes], str]:
    """Pictures, and a note why there are none: not asked for, or matplotlib is missing."""
    if not pictures:
        return {}, "Pictures were not asked for."
    try:
        return pngs(), ""
    except PurifyError as error:
        return {}, f"No pictures: {error}"


def markdown_page(title: str, verdict: str, facts: Sequence[Row], parts: Sequence[Section]) -> str:
    """A page in GitHub's Markdown.

    Args:
        title: of the page.
        verdict: the first sentence, without a full stop.
        facts: name, value and note of the most important numbers.
        parts: sections, in order.
    """
    page = _template("report.md").render(
        title=title, verdict=sentence(verdict), headline=facts, sections=parts
    )
    return re.sub(r"\n{3,}", "\n\n", page).strip() + "\n"


def html_page(
    title: str,
    subject: str,
    verdict: str,
    facts: Sequence[Row],
    parts: Sequence[Section],
    *,
    pictures: Mapping[str, bytes],
    note: str = "",
) -> str:
    """An HTML page.

    Args:
        title: of the page.
        subject: what the page is about, shown below the title.
        verdict: the first sentence, without a full stop.
        facts: name, value and note of the most important numbers.
        parts: sections, in order.
        pictures: name -> PNG file, for sections with a picture of that name.
        note: text at the end of the page.
    """
    sources = {name: data_url(png) for name, png in pictures.items()}
    return _template("report.html").render(
        title=title,
        subject=subject,
        verdict=sentence(verdict),
        headline=facts,
        sections=parts,
        pictures=sources,
        note=note,
    )


# Comparisons are not escaped: no tag begins with "<" and a space or "=", and no quotation with ">"
# after a word. Every other "<" becomes an entity, since not every renderer knows "\<".
_MARKUP = re.compile(r"(<=?(?= )|(?<=\w )>=?(?= ))|[\\`*_\[\]<>|~&$]")


def escape_markdown(value: Any) -> Any:
    """Text in one line in which markup and HTML are escaped; other values are not changed."""
    if not isinstance(value, str):
        return value
    return _MARKUP.sub(_escaped, " ".join(value.split()))


def _escaped(match: re.Match[str]) -> str:
    if match[1]:
        return match[1]
    return {"<": "&lt;", ">": "&gt;"}.get(match[0], "\\" + match[0])


@functools.cache
def _template(name: str) -> jinja2.Template:
    html = name.endswith(".html")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        autoescape=html,
        finalize=None if html else escape_markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
