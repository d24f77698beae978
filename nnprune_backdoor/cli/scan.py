"""nnprune-backdoor scan: is there evidence of a backdoor, and for which label?"""

from __future__ import annotations

import argparse
from pathlib import Path

from .base import OF_SCAN, Commands, MisuseError, Result, add_command, check_pages
from .options import add_architecture, add_images, add_results, add_running


def add(commands: Commands) -> None:
    """Add the command's options."""
    parser = add_command(
        commands,
        "scan MODEL --clean DIR",
        run,
        does="look for evidence of a backdoor, with clean images alone",
        more="Exit code 3: a backdoor is probable (from .7); 4: that cannot be told; 0: no "
        "evidence (up to .3), and another kind of backdoor is still possible. "
        "Class folders are not needed.",
        example="scan stranger.pth --arch resnet18 --clean images/",
        formats=("text", *OF_SCAN),
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
    add_results(parser)
    add_architecture(parser)
    add_images(parser, 300)
    add_running(parser)


def run(options: argparse.Namespace) -> Result:
    """Read the model and the images, scan, print the diagnosis."""
    check_pages(options.report, OF_SCAN)

    from ..core.recovered import PixelRange
    from ..evidence.scanning import scan
    from ..files.images import shown
    from .inputs import classes_of, label_of, load, read_folder
    from .preprocessing import preprocessing_of
    from .results import scan_result
    from .source import source_of

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
    source = source_of(options, options.model, model, images, preprocessing)
    return scan_result(options, diagnosis, text, source)
