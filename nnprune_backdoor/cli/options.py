"""Options that several commands take. What they are read into is in `inputs`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .names import DATASETS


def add_running(parser: argparse.ArgumentParser) -> None:
    """Options of commands that compute something."""
    parser.add_argument(
        "--seed",
        type=seed_of,
        default=0,
        metavar="N",
        help="seed of all random choices; the same seed gives the same result (default: 0)",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="NAME",
        help="device to run on: cpu, cuda, cuda:1, mps (default: cpu)",
    )
    add_quiet(parser)


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """--quiet."""
    parser.add_argument(
        "--quiet", action="store_true", help="print no progress, no estimates of time and no notes"
    )


def seed_of(text: str) -> int:
    """A seed that every random generator takes; ArgumentTypeError for another."""
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number in [0, 2^63), got {text!r}")
    return seed


def add_results(parser: argparse.ArgumentParser) -> None:
    """How a result is given; see `results`."""
    parser.add_argument(
        "--report",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="also write a report, which its name chooses: .html (with pictures), .md, .json, "
        ".sarif, of purify also .cdx.json, .intoto.json; may be repeated",
    )
    parser.add_argument(
        "--no-examples", action="store_true", help="show none of the clean images in reports"
    )
    add_exit_codes(parser)


def add_exit_codes(parser: argparse.ArgumentParser) -> None:
    """Whose codes the shell is told; `main` looks at it."""
    parser.add_argument(
        "--exit-codes",
        choices=("own", "modelscan"),
        default="own",
        help="modelscan: exit as ModelScan does: 0 no findings, 1 findings, 2 failure, 3 not "
        "supported or cannot tell, 4 misuse (default: own)",
    )


def add_architecture(parser: argparse.ArgumentParser) -> None:
    """How a checkpoint is read."""
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--arch",
        metavar="NAME",
        help="name of the architecture in timm, such as resnet18; torchvision:resnet18 is "
        "torchvision's; hf: a folder of transformers, with config.json and weights",
    )
    group.add_argument(
        "--arch-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of timm.create_model, such as img_size=64; may be repeated. The numbers "
        "of classes and of input channels are read from the weights",
    )
    group.add_argument(
        "--key",
        metavar="NAME",
        help="entry of the checkpoint that holds the weights, such as model_ema",
    )
    group.add_argument(
        "--weights",
        choices=("plain", "ema"),
        help="where the checkpoint holds both: the weights as they were trained, or their moving "
        "average (default: plain)",
    )
    group.add_argument(
        "--prefix",
        metavar="TEXT",
        help="take the tensors whose names begin with TEXT, such as encoder_q. (default: found by "
        "the names of the network)",
    )
    group.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out tensors of such names, such as 'head_dist.*'; may be repeated",
    )


def add_images(parser: argparse.ArgumentParser, most: int | None) -> None:
    """How images are read.

    Args:
        most: how many are used unless --images says otherwise; None: all.
    """
    group = parser.add_argument_group("the images")
    group.add_argument(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="folder where torchvision keeps its data sets; in place of a folder of images, give "
        f"the name of one: {', '.join(DATASETS)}. Nothing is downloaded",
    )
    group.add_argument(
        "--split",
        choices=("test", "train"),
        help="part of that data set to read, with --data-root (default: test)",
    )
    group.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="file with the names of the class folders in the model's order, one per line "
        "(default: the names of the folders, sorted, by value where all are numbers)",
    )
    group.add_argument(
        "--images",
        type=int,
        default=most,
        metavar="N",
        help=f"use N images, drawn at random and balanced over classes (default: {most or 'all'})",
    )
    _add_preprocessing(group)


def _add_preprocessing(group: Any) -> None:
    group.add_argument(
        "--size",
        type=int,
        nargs="+",
        metavar="PX",
        help="size of the model's input: one side, or height and width (default: that of the image "
        "files if all have the same, it is no larger than timm's, and the model takes it; else "
        "timm's)",
    )
    for name in ("mean", "std"):
        group.add_argument(
            f"--{name}",
            type=float,
            nargs="+",
            metavar="X",
            help=f"{name} of each channel, to normalise pixels in [0, 1] (default: timm's)",
        )
    group.add_argument(
        "--interpolation",
        choices=("bilinear", "bicubic", "nearest"),
        help="how images are resized (default: timm's)",
    )
    group.add_argument(
        "--crop-pct",
        type=float,
        metavar="X",
        help="part of the resized image that the centre crop keeps (default: timm's)",
    )


def add_trigger_settings(group: Any) -> None:
    """--trigger-set; `group` is a parser or a group of arguments."""
    group.add_argument(
        "--trigger-set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the trigger, such as size=4; may be repeated",
    )
