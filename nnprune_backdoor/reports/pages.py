"""Reports as pages, in Markdown or HTML.

Names of layers, settings and reasons may come from anybody, so every string is escaped: by Jinja's
autoescaping in HTML, by `escape_markdown` in Markdown.
"""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from .purify_page import headline, sections
from .report import Report
from .sections import Row, Section


def to_markdown(report: Report) -> str:
    """GitHub's Markdown, without pictures."""
    return markdown_page("Purification report", headline(report), sections(report))


def to_html(report: Report, pictures: Mapping[str, bytes], note: str = "") -> str:
    """A page that needs nothing else: no script, no network.

    Args:
        pictures: PNG files by name ("scores", "curve", "triggers", "evidence"); those absent are
            left out.
        note: said at the end, for example why there are no pictures.
    """
    return html_page(
        "Purification report",
        report.given["architecture"],
        headline(report),
        sections(report),
        pictures=pictures,
        note=note,
    )


def markdown_page(title: str, facts: Sequence[Row], parts: Sequence[Section]) -> str:
    """Title, headline, sections."""
    page = _template("report.md").render(title=title, headline=facts, sections=parts)
    return re.sub(r"\n{3,}", "\n\n", page).strip() + "\n"


def html_page(
    title: str,
    subject: str,
    facts: Sequence[Row],
    parts: Sequence[Section],
    *,
    pictures: Mapping[str, bytes],
    note: str = "",
) -> str:
    """Title, what it is about, headline, sections with those of their pictures that are given."""
    sources = {
        name: "data:image/png;base64," + base64.b64encode(png).decode()
        for name, png in pictures.items()
    }
    return _template("report.html").render(
        title=title,
        subject=subject,
        headline=facts,
        sections=parts,
        pictures=sources,
        note=note,
    )


# A comparison stays readable: no tag begins with "<" and a space or "=", and no quotation with ">"
# after a word. Every other "<" becomes an entity, since not every renderer takes "\<" for text.
_MARKUP = re.compile(r"(<=?(?= )|(?<=\w )>=?(?= ))|[\\`*_\[\]<>|~&$]")


def escape_markdown(value: Any) -> Any:
    """Text that stays text, in a table cell too: one line, no markup, no HTML."""
    if not isinstance(value, str):
        return value
    return _MARKUP.sub(_inert, " ".join(value.split()))


def _inert(found: re.Match[str]) -> str:
    if found[1]:
        return found[1]
    return {"<": "&lt;", ">": "&gt;"}.get(found[0], "\\" + found[0])


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
