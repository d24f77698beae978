"""The report as a page, in Markdown or HTML.

Names of layers, settings and reasons may come from anybody, so every string is escaped: by Jinja's
autoescaping in HTML, by `escape_markdown` in Markdown.
"""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Mapping
from typing import Any

import jinja2

from .layout import headline, sections
from .report import Report


def to_markdown(report: Report) -> str:
    """GitHub's Markdown, without pictures."""
    page = _template("report.md").render(headline=headline(report), sections=sections(report))
    return re.sub(r"\n{3,}", "\n\n", page).strip() + "\n"


def to_html(report: Report, pictures: Mapping[str, bytes], note: str = "") -> str:
    """A page that needs nothing else: no script, no network.

    Args:
        pictures: PNG files by name ("scores", "curve", "triggers", "evidence"); those absent are
            left out.
        note: said at the end, for example why there are no pictures.
    """
    sources = {
        name: "data:image/png;base64," + base64.b64encode(png).decode()
        for name, png in pictures.items()
    }
    return _template("report.html").render(
        headline=headline(report),
        sections=sections(report),
        pictures=sources,
        note=note,
        architecture=report.given["architecture"],
    )


_MARKUP = re.compile(r"[\\`*_\[\]<>|~&$]")


def escape_markdown(value: Any) -> Any:
    """Text that stays text, in a table cell too: one line, no markup, no HTML."""
    if not isinstance(value, str):
        return value
    return _MARKUP.sub(_inert, " ".join(value.split()))


def _inert(found: re.Match[str]) -> str:
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
