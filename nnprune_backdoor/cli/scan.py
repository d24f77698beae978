"""nnprune-backdoor scan: is there evidence of a backdoor, and for which label?"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from .base import EVIDENCE, Commands, MisuseError, Result, add_command, check_page, write_page
from .options import add_architecture, add_images, add_report, add_running


def add(commands: Commands) -> None:
    """Add the command's options."""
    parser = add_command(
        commands,
        "scan",
        run,
        does="look for evidence of a backdoor, with clean images alone",
        usage="MODEL --clean DIR",
        more="Exit code 3: a backdoor is probable (from .7). Exit code 0: it is not, or that "
        "cannot be told; another kind of backdoor is still possible. "
        "Class folders are not needed.",
        example="scan stranger.pth --arch resnet18 --clean images/",
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="a checkpoint, or a folder that purify wrote"
    )
    parser.add_argument(
        "--clean",
        type=Path,
        metavar="DIR",
        required=True,
        help="folder of clean images, or with --data-root the name of a data set",
    )
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="LABEL",
        help="test this target label only, a number or the name of a class; may be repeated "
        "(default: all)",
    )
    add_report(parser)
    add_architecture(parser)
    add_images(parser, 300)
    add_running(parser)


def run(options: argparse.Namespace) -> Result:
    """Read the model and the images, scan, print the diagnosis."""
    check_page(options.report)

    from ..core.recovered import PixelRange
    from ..evidence.scanning import scan
    from ..files.images import shown
    from ..reports.scan_page import scan_to_html, scan_to_markdown
    from .inputs import classes_of, label_of, load, read_folder
    from .preprocessing import preprocessing_of

    model = load(options, options.model)
    preprocessing = preprocessing_of(options, model, options.clean)
    images = read_folder(options, options.clean, model, preprocessing)
    if len(images.data) < 2:
        raise MisuseError(f"{options.clean} has one image to use; give a few hundred")
    count = classes_of(model, preprocessing)
    labels = [label_of(text, images.classes, count, "--label") for text in options.label]
    diagnosis = scan(
        model.network,
        images.data,
        labels=labels or None,
        pixels=PixelRange.normalised(preprocessing.mean, preprocessing.std),
        seed=options.seed,
        progress=not options.quiet,
    )
    text, target = diagnosis.summary(), diagnosis.target
    if target is not None and target < len(images.classes):
        text += f"\nlabel {target} is the folder {shown(images.classes[target])}"
    if options.report is not None:
        write_page(
            options.report,
            html=partial(scan_to_html, diagnosis),
            markdown=partial(scan_to_markdown, diagnosis),
            data=diagnosis.to_dict(),
        )
        text += f"\nreport     {options.report}"
    return Result(text, diagnosis.to_dict(), EVIDENCE if diagnosis.alarm else 0)
