"""nnprune-backdoor report: documents from a folder that purify wrote."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import CheckpointError
from .base import OF_PURIFICATION, Commands, ExitCode, Result, add_command

_NO_PICTURES = (
    "No pictures: they are drawn while a model is purified (nnprune-backdoor purify --report)."
)


def add(commands: Commands) -> None:
    """Add the command's options."""
    formats = ("markdown", *(name for name in OF_PURIFICATION if name != "markdown"))
    parser = add_command(
        commands,
        "report FOLDER",
        run,
        does="show how a model was purified, from the folder that purify wrote",
        more="For a page with pictures, use purify --report FILE.html.",
        example="report purified --format html",
        formats=formats,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a folder that purify wrote")
    parser.set_defaults(report=[])


def run(options: argparse.Namespace) -> Result:
    """Read report.json and make a document of it."""
    import dataclasses

    from ..files.record_file import REPORT, read_report
    from ..reports.pages import to_html, to_markdown
    from .results import purify_result

    report = read_report(options.folder)
    try:
        page = to_html(report, {}, _NO_PICTURES)
        pages = {"html": lambda: page, "markdown": lambda: to_markdown(report)}
        result = purify_result(options, report, options.folder, pages, "")
        result.documents[options.format]()
    except Exception as error:  # the file may hold anything; only its outline was checked
        raise CheckpointError(
            f"{options.folder / REPORT}: damaged, no page can be made of it ({error}); purify the "
            "model again"
        ) from error
    return dataclasses.replace(result, code=ExitCode.DONE)  # it tells nothing new
