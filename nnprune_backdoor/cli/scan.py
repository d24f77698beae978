"""nnprune-backdoor scan: is there evidence of a backdoor, and for which label?"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from ..core.recovered import PixelRange
from ..evidence.scanning import scan
from ..files.images import FolderImages, shown
from ..reports.scan_page import scan_to_html, scan_to_markdown
from .base import (
    EVIDENCE,
    Commands,
    MisuseError,
    Result,
    add_command,
    add_running,
    check_page,
    write_page,
)
from .inputs import (
    add_architecture,
    add_images,
    classes_of,
    label_of,
    load,
    preprocessing_of,
    read_folder,
)


def add(commands: Commands) -> None:
    """The parser."""
    parser = add_command(
        commands,
        "scan",
        run,
        does="look for evidence of a backdoor, with clean images alone",
        usage="MODEL --clean DIR",
        more="Exit code 3: evidence of a kind that benign networks did not show. 0: no evidence "
        "of the kinds tested, which excludes no other backdoor. Class folders are not needed.",
        example="scan stranger.pth --arch resnet18 --clean images/",
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="a checkpoint, or a folder that purify wrote"
    )
    parser.add_argument(
        "--clean", type=Path, metavar="DIR", required=True, help="clean images, or a data set"
    )
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="LABEL",
        help="look for this target only, number or name; may be repeated (all labels)",
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write a page: .html with pictures, .md, .json"
    )
    add_architecture(parser)
    add_images(parser, 300)
    add_running(parser)


def run(options: argparse.Namespace) -> Result:
    """Read, scan, say what came out."""
    check_page(options.report)
    model = load(options, options.model)
    preprocessing = preprocessing_of(options, model)
    images = read_folder(options, options.clean, model, preprocessing)
    if len(images.data) < 2:
        raise MisuseError(f"{options.clean}: expected a few hundred images")
    count = classes_of(model, preprocessing)
    labels = [label_of(text, images.classes, count) for text in options.label]
    diagnosis = scan(
        model.network,
        images.data,
        labels=labels or None,
        pixels=PixelRange.normalised(preprocessing.mean, preprocessing.std),
        seed=options.seed,
        progress=not options.quiet,
    )
    text = diagnosis.summary() + _named(diagnosis.target, images)
    if options.report is not None:
        write_page(
            options.report,
            html=partial(scan_to_html, diagnosis),
            markdown=partial(scan_to_markdown, diagnosis),
            data=diagnosis.to_dict(),
        )
        text += f"\nreport     {options.report}"
    return Result(text, diagnosis.to_dict(), EVIDENCE if diagnosis.alarm else 0)


def _named(target: int | None, images: FolderImages) -> str:
    if target is None or target >= len(images.classes):
        return ""
    return f"\nlabel {target} is the folder {shown(images.classes[target])}"
