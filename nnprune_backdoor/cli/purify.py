"""nnprune-backdoor purify: from a checkpoint and clean images to a smaller model and a report."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from pathlib import Path

from ..core.measures import Repair
from ..criteria.base import Criterion, create_criterion, criterion_class, list_criteria
from ..evidence.null import last_look
from ..files.saving import check_free, save_purified
from ..pipeline import purify
from ..reports.purified import Purified
from ..selectors.base import Selector, create_selector, list_selectors, selector_class
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
from .inputs import add_architecture, add_images, load, note, preprocessing_of, read_folder
from .name_value import read_settings
from .plugins import add_plugins

# options that are a selector's setting, and the selector that each of them implies
_IMPLIED = {"count": "count", "fraction": "fraction", "threshold": "below", "deviations": "outlier"}


def add(commands: Commands) -> None:
    """The parser."""
    parser = add_command(
        commands,
        "purify",
        run,
        does="silence neurons that look like a backdoor's, and save the model",
        usage="CHECKPOINT --clean DIR --out OUT",
        more="The checkpoint is read as tensors alone; no code in it runs, and it is left as it "
        "is. OUT becomes a folder with model.safetensors, record.json and report.json. "
        "Exit code 3: it is written, but --selector auto still found evidence in it.",
        example="purify stranger.pth --arch resnet18 --clean images/ \\\n"
        "      --out purified --report purified.html",
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help=".pth, .pt, .bin, .safetensors, ..."
    )
    parser.add_argument(
        "--clean", type=Path, required=True, metavar="DIR", help="clean images, or a data set"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder to write")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT, if a run of this wrote it"
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write a page: .html with pictures, .md, .json"
    )
    add_architecture(parser)
    add_images(parser, 500)
    _add_method(parser)
    add_running(parser)
    add_plugins(parser)


def _add_method(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what goes")
    group.add_argument(
        "--method", default="tac", metavar="NAME", help=f"{', '.join(list_criteria())} (tac)"
    )
    group.add_argument(
        "--paper", action="store_true", help="the method's published settings, not the defaults"
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a hyper-parameter of the method; may be repeated",
    )
    group.add_argument(
        "--selector",
        metavar="NAME",
        help=f"{', '.join(list_selectors())} (trigger, or what the next options imply)",
    )
    for name, kind, what in (
        (
            "max-drop",
            float,
            "accuracy, trigger, auto: clean accuracy that may go, 0.02 = 2 points (0.02)",
        ),
        ("count", int, "count: so many neurons"),
        ("fraction", float, "fraction: this share of the neurons"),
        ("threshold", float, "below: neurons whose score is at most X"),
        ("deviations", float, "outlier: so many deviations below the median"),
    ):
        metavar = "N" if kind is int else "X"
        group.add_argument(f"--{name}", type=kind, metavar=metavar, help=what)
    group.add_argument(
        "--silencing",
        choices=("zero", "constant"),
        help="zero: weight and bias off; constant: the bias stays (as the criterion means it: "
        "zero, or what trained masks meant)",
    )
    group.add_argument(
        "--removal",
        choices=("exact", "group", "none"),
        default="exact",
        help="exact: out of the tensors where that changes nothing; group: whole coupled groups; "
        "none: the shape stays (exact)",
    )
    group.add_argument(
        "--repair",
        choices=("none", "unlearn"),
        help="unlearn: after pruning, train all weights a little so that recovered triggers do "
        "nothing; none: neurons are silenced and nothing else changes (unlearn, where method or "
        "selector recovers a trigger and the images have labels)",
    )


def run(options: argparse.Namespace) -> Result:
    """Check all that can be checked, then purify, save, report."""
    criterion, selector = criterion_of(options), selector_of(options)
    out, page = options.out.resolve(), options.report
    recovers = criterion.recovers_triggers or selector.recovers_triggers
    if options.repair == "unlearn" and not recovers:
        raise MisuseError(
            "--repair unlearn needs a recovered trigger: take --method tac or cnp, or "
            "--selector trigger or auto"
        )
    if page is not None and page.resolve().is_relative_to(out):
        raise MisuseError(f"--report {page} lies in --out; give a name beside it: {out.name}.html")
    check_page(page)
    if options.checkpoint.is_dir():
        raise MisuseError(f"{options.checkpoint} is a folder; purify takes a checkpoint file")
    _check_apart(options, out)
    if not options.overwrite and out.is_dir() and any(out.iterdir()):
        raise MisuseError(f"--out {options.out} is not empty; give another folder, or --overwrite")
    check_free(out, overwrite=options.overwrite)
    model = load(options, options.checkpoint)
    with options.checkpoint.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    preprocessing = preprocessing_of(options, model)
    images = read_folder(options, options.clean, model, preprocessing)
    for who, name in ((criterion, "--method"), (selector, "--selector")):
        if images.data.labels is None and who.needs_labels:
            raise MisuseError(
                f"{name} {_name_of(options, name)} needs labels, and {options.clean} has no class "
                "folders; sort the images into one folder a class, or choose what needs none, "
                "such as: --method clp --threshold -3"
            )
    labelled = images.data.labels is not None
    if options.repair == "unlearn" and not labelled:
        raise MisuseError(
            f"--repair unlearn needs labels, and {options.clean} has no class folders; sort the "
            "images into one folder a class"
        )
    repair: Repair = options.repair or ("unlearn" if recovers and labelled else "none")
    note(options, f"purifying: {options.method}, selector {options.selector}, repair {repair}")
    purified = purify(
        model.network,
        images.data,
        criterion,
        selector=selector,
        silencing=options.silencing,
        removal=options.removal,
        repair=repair,
        seed=options.seed,
        progress=not options.quiet,
    )
    source = {
        "checkpoint": options.checkpoint.name,
        "checkpoint sha256": sha256,
        "images": options.clean.resolve().name,
        "classes": list(images.classes),
        "preprocessing": preprocessing.to_dict(),
        "skipped": len(images.skipped),
    }
    purified = dataclasses.replace(purified, source=source)
    save_purified(
        purified, out, arch=model.arch, model_args=model.arguments, overwrite=options.overwrite
    )
    if page is not None:
        write_page(
            page, html=purified.to_html, markdown=purified.to_markdown, data=purified.to_dict()
        )
    lines = [purified.summary(), "", f"saved      {options.out}"]
    lines += [f"report     {page}"] if page is not None else []
    data = {"out": str(options.out), "report": purified.to_dict()}
    return Result("\n".join(lines), data, EVIDENCE if _evidence_left(purified) else 0)


def _check_apart(options: argparse.Namespace, out: Path) -> None:
    """MisuseError where the next run would take OUT for a folder of images, or part of one."""
    clean = options.clean.resolve()
    if options.data_root is None and (out.is_relative_to(clean) or clean.is_relative_to(out)):
        raise MisuseError(
            f"--out {options.out} and --clean {options.clean} overlap, and the next run would take "
            "what is written for a class; give a folder beside the images"
        )


def criterion_of(options: argparse.Namespace) -> Criterion:
    """The method with its settings; UnknownNameError, MisuseError or DataError where they err."""
    cls = criterion_class(options.method)
    settings = read_settings(cls, options.set, f"criterion {options.method!r}")
    if options.paper:
        return dataclasses.replace(cls.paper(), **settings)
    return create_criterion(options.method, **settings)


def selector_of(options: argparse.Namespace) -> Selector:
    """The selector named, or implied by the settings that are given."""
    given = {
        name: getattr(options, name)
        for name in ("max_drop", *_IMPLIED)
        if getattr(options, name) is not None
    }
    implied = sorted({_IMPLIED[name] for name in given if name in _IMPLIED})
    if len(implied) > 1:
        raise MisuseError(f"--selector: {' or '.join(implied)}? give the options of one of them")
    name = options.selector or (implied[0] if implied else "trigger")
    fields = {field.name: field for field in dataclasses.fields(selector_class(name))}  # type: ignore[arg-type]
    for setting in given:
        if setting not in fields:
            raise MisuseError(
                f"--{setting.replace('_', '-')} is no setting of the selector {name!r}"
            )
    for setting, field in fields.items():
        if setting in _IMPLIED and field.default is dataclasses.MISSING and setting not in given:
            raise MisuseError(f"--selector {name} needs --{setting}")
    options.selector = name
    return create_selector(name, **given)


def _evidence_left(purified: Purified) -> bool:
    """Whether the selector looked for evidence in what is written, and found some."""
    look = last_look(purified.selection.details, len(purified.selection))
    return look is not None and look["alarm"]


def _name_of(options: argparse.Namespace, option: str) -> str:
    return str(getattr(options, option.removeprefix("--")))
