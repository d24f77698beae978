"""nnprune-backdoor report: pages from a folder that purify wrote."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import CheckpointError
from ..utils.whole_file import write_whole
from .base import Commands, Result, add_command, check_writable

_NO_PICTURES = (
    "No pictures: they are drawn while a model is purified (nnprune-backdoor purify --report)."
)


def add(commands: Commands) -> None:
    """Add the command's options."""
    parser = add_command(
        commands,
        "report",
        run,
        does="show how a model was purified, from the folder that purify wrote",
        usage="FOLDER",
        more="Prints Markdown. For a page with pictures, use purify --report FILE.html.",
        example="report purified --html purified.html",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a folder that purify wrote")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write an HTML page")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write Markdown to a file")


def run(options: argparse.Namespace) -> Result:
    """Read report.json and make pages of it."""
    from ..files.record_file import REPORT, read_report
    from ..reports.pages import to_html, to_markdown

    for option in ("html", "markdown"):
        check_writable(getattr(options, option), f"--{option}")
    report = read_report(options.folder)
    try:
        texts = {"html": to_html(report, {}, _NO_PICTURES), "markdown": to_markdown(report)}
    except Exception as error:  # the file may hold anything; only its outline was checked
        raise CheckpointError(
            f"{options.folder / REPORT}: damaged, no page can be made of it ({error}); purify the "
            "model again"
        ) from error
    written = []
    for kind, text in texts.items():
        path: Path | None = getattr(options, kind)
        if path is not None:
            write_whole(path, text.encode(errors="backslashreplace"))
            written.append(f"written: {path}")
    return Result("\n".join(written) or texts["markdown"].rstrip(), report.to_dict())
