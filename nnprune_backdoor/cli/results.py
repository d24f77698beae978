"""From a scan or a purification to what is printed, written and told the shell."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..evidence.diagnosis import Diagnosis
from ..evidence.probability import Outcome
from ..files.record_file import hashes_in
from ..reports.cyclonedx import cyclonedx
from ..reports.document import document
from ..reports.in_toto import in_toto
from ..reports.purified import Purified
from ..reports.report import Data, Report
from ..reports.sarif import sarif
from ..reports.scan_page import scan_to_html, scan_to_markdown
from .base import ExitCode, Result, write_page
from .source import shown_path

_CODES = {
    Outcome.EVIDENCE: ExitCode.EVIDENCE,
    Outcome.NONE: ExitCode.DONE,
    Outcome.UNKNOWN: ExitCode.UNKNOWN,
    Outcome.NOT_SOUGHT: ExitCode.DONE,
}

Pages = Mapping[str, Callable[[], str]]  # format -> what makes the text


def scan_result(
    options: argparse.Namespace, diagnosis: Diagnosis, text: str, source: Mapping[str, Any]
) -> Result:
    """The result of `scan`; the reports asked for are written."""
    pages = {
        "html": lambda: scan_to_html(diagnosis, examples=not options.no_examples),
        "markdown": lambda: scan_to_markdown(diagnosis),
    }
    return _written(options, text, document(diagnosis, source), pages)


def purify_result(
    options: argparse.Namespace, purified: Purified | Report, folder: Path, pages: Pages, text: str
) -> Result:
    """The result of `purify`, or of `report`; the reports asked for are written.

    Args:
        folder: that holds the purified model.
        pages: "html" and "markdown".
    """
    data = document(purified, output={"folder": shown_path(folder), "files": hashes_in(folder)})
    made = {"cyclonedx": lambda: _json(cyclonedx(data)), "in-toto": lambda: _json(in_toto(data))}
    return _written(options, text, data, {**pages, **made})


def _written(options: argparse.Namespace, text: str, data: Data, pages: Pages) -> Result:
    documents = {**pages, "json": lambda: _json(data), "sarif": lambda: _json(sarif(data))}
    for page in options.report:
        write_page(page, documents)
        text += f"\nreport     {page}"
    return Result(text, data, _CODES[Outcome(data["outcome"])], documents)


def _json(data: Data) -> str:
    return json.dumps(data, indent=1, allow_nan=False) + "\n"
