"""nnprune-backdoor purify: from a checkpoint and clean images to a smaller model and a report."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from .base import (
    OF_PURIFICATION,
    Commands,
    MisuseError,
    Result,
    add_command,
    check_pages,
    check_writable,
    note,
)
from .names import CRITERIA, SELECTORS
from .options import add_architecture, add_images, add_results, add_running
from .plugins import add_plugins

if TYPE_CHECKING:
    from ..selectors.base import Selector


def add(commands: Commands) -> None:
    """Add the command's options."""
    parser = add_command(
        commands,
        "purify MODEL --clean DIR --out OUT",
        run,
        does="silence the neurons that a backdoor seems to use, and save the model",
        more="Only tensors are read from the checkpoint: no code in it runs, and the file is not "
        "changed. OUT becomes a folder with model.safetensors, record.json, report.json and "
        "README.md. Exit code 3: the model was written, but --selector auto still found evidence "
        "of a backdoor in it; 4: the same, and auto cannot tell.",
        example="purify stranger.pth --arch resnet18 --clean images/ \\\n"
        "      --out purified --report purified.html",
        formats=("text", *OF_PURIFICATION),
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="MODEL",
        help="a checkpoint: a file of PyTorch's or safetensors, or a hub's folder; or a folder "
        "that purify wrote",
    )
    parser.add_argument(
        "--clean",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of clean images, or with --data-root the name of a data set",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder to write")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT if purify wrote it before"
    )
    add_results(parser)
    add_architecture(parser)
    add_images(parser, 500)
    _add_method(parser)
    _add_selector(parser)
    _add_pruning(parser)
    _add_keeping(parser)
    add_running(parser)
    add_plugins(parser)


def _add_method(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which neurons are pruned first")
    group.add_argument(
        "--method",
        default="rnp",
        metavar="NAME",
        help=f"{', '.join(CRITERIA)} (default: rnp); see: nnprune-backdoor list",
    )
    group.add_argument("--paper", action="store_true", help="use the method's published settings")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a hyper-parameter of the method, such as ranking.stages=3; may be repeated",
    )


def _add_selector(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how many neurons are pruned")
    group.add_argument(
        "--selector",
        metavar="NAME",
        help=f"{', '.join(SELECTORS)} (default: at most the lowest 5%% of the neurons, or the "
        "selector that an option below belongs to)",
    )
    for name, kind, what in (
        (
            "max-drop",
            float,
            "trigger, auto, accuracy: largest drop of clean accuracy allowed, 0.02 = 2 points "
            "(default: 0.02)",
        ),
        ("count", int, "count: this many neurons"),
        ("fraction", float, "fraction: this share of all neurons"),
        ("threshold", float, "below: neurons whose score is at most X"),
        (
            "deviations",
            float,
            "outlier: neurons whose score is more than X robust standard deviations below the "
            "median",
        ),
    ):
        metavar = "N" if kind is int else "X"
        group.add_argument(f"--{name}", type=kind, metavar=metavar, help=what)


def _add_pruning(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how they are pruned")
    group.add_argument(
        "--silencing",
        choices=("zero", "constant"),
        help="zero: set weight and bias of a neuron to 0; constant: keep the bias (default: the "
        "method's own)",
    )
    group.add_argument(
        "--removal",
        choices=("exact", "group", "none"),
        default="exact",
        help="exact: remove neurons from the tensors where the outputs stay the same; group: "
        "remove whole groups of coupled channels; none: keep all shapes (default: exact)",
    )
    group.add_argument(
        "--repair",
        choices=("none", "unlearn", "distil"),
        help="distil: after pruning, train all weights towards the given model's answers; unlearn: "
        "train them so that recovered triggers have no effect; none: prune only (default: distil "
        "unless a selector is given, then none)",
    )


def _add_keeping(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("if it is interrupted, or run again")
    for name, what in (
        ("scores", "scores of the neurons"),
        ("selection", "selection of the neurons that go"),
    ):
        group.add_argument(
            f"--{name}",
            type=Path,
            metavar="FILE",
            help=f"keep the {what} in FILE: taken from there if it is there, else written. It is "
            "refused where model, images, seed or settings are others",
        )


def run(options: argparse.Namespace) -> Result:
    """Check all that can be checked, then purify, save, report."""
    from ..files.saving import save_purified
    from ..pipeline import purify
    from .choices import check_repair, criterion_of, selector_of
    from .inputs import load, read_folder
    from .preprocessing import preprocessing_of
    from .results import purify_result
    from .source import source_of

    criterion, selector = criterion_of(options), selector_of(options)
    out = options.out.resolve()
    check_repair(options, criterion, selector)
    _check_paths(options, out)
    model = load(options, options.checkpoint)
    preprocessing = preprocessing_of(options, model, options.clean)
    images = read_folder(options, options.clean, model, preprocessing)
    if images.data.labels is None:
        _check_needs_no_labels(options, selector)
    source = source_of(options, options.checkpoint, model, images, preprocessing)
    note(options, f"method: {options.method}")
    purified = purify(
        model.network,
        images.data,
        criterion,
        selector=selector,
        silencing=options.silencing,
        removal=options.removal,
        repair=options.repair,
        seed=options.seed,
        progress=not options.quiet,
        scores=options.scores,
        selection=options.selection,
    )
    purified = dataclasses.replace(purified, source=source)
    save_purified(
        purified,
        out,
        arch=model.arch,
        model_args=model.arguments,
        earlier=model.earlier,
        overwrite=options.overwrite,
    )
    text = f"{purified.summary()}\n\nsaved      {options.out}"
    pages = {
        "html": lambda: purified.to_html(examples=not options.no_examples),
        "markdown": purified.to_markdown,
    }
    return purify_result(options, purified, options.out, pages, text)


def _check_paths(options: argparse.Namespace, out: Path) -> None:
    """Raise MisuseError, or what `check_free` raises, for paths that would fail after the work."""
    from ..files.saving import check_free

    for page in options.report:
        if page.resolve().is_relative_to(out):
            raise MisuseError(
                f"--report {page} lies in --out; give a name beside it, such as {out.name}.html"
            )
    check_pages(options.report, OF_PURIFICATION)
    for option, kept in (("--scores", options.scores), ("--selection", options.selection)):
        if kept is not None and kept.resolve().is_relative_to(out):
            raise MisuseError(f"{option} {kept} lies in --out; give a name beside it")
        if kept is not None and not kept.exists():
            check_writable(kept, option)
    if options.scores is not None and options.scores == options.selection:
        raise MisuseError("--scores and --selection name the same file; give two")
    clean = options.clean.resolve()
    if options.data_root is None and (out.is_relative_to(clean) or clean.is_relative_to(out)):
        raise MisuseError(
            f"--out {options.out} and --clean {options.clean} overlap, so that the next run would "
            "read the output as a class of images; give a folder beside the images"
        )
    if out in (options.checkpoint.resolve(), options.checkpoint.resolve().parent):
        raise MisuseError(f"--out {options.out} holds the model itself; give another folder")
    if not options.overwrite and out.is_dir() and any(out.iterdir()):
        raise MisuseError(f"--out {options.out} is not empty; give another folder, or --overwrite")
    check_free(out, overwrite=options.overwrite)


def _check_needs_no_labels(options: argparse.Namespace, selector: Selector | None) -> None:
    """Raise MisuseError where something needs labels; the images have none."""
    for needs, option in (
        (selector and selector.needs_labels, f"--selector {options.selector}"),
        (options.repair == "unlearn", "--repair unlearn"),
    ):
        if needs:
            raise MisuseError(
                f"{option} needs labels, and {options.clean} has no class folders; sort the images "
                f"into one folder per class, or leave {option} out"
            )
