"""The command line: nnprune-backdoor demo | list."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .attacks import create_attack, list_attacks
from .criteria import Criterion, create_criterion, criterion_class, list_criteria
from .errors import PurifyError
from .selection import create_selector


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0 when it is done, 1 on failure; argparse exits with 2 on misuse."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except PurifyError as error:
        print(f"nnprune-backdoor: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnprune-backdoor",
        description="Purify backdoored image classifiers by pruning, with clean images alone.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="plant a backdoor in a timm network trained on photographs, and purify it",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--method", default="tac", help="criterion; see: nnprune-backdoor list")
    demo.add_argument("--arch", default="resnet18", help="timm architecture")
    demo.add_argument(
        "--width", type=float, default=None, help="times the usual channels; ResNets only, 0.5"
    )
    demo.add_argument("--attack", default="badnets", help=f"one of {', '.join(list_attacks())}")
    demo.add_argument("--poison-rate", type=float, default=0.05, help="share of training images")
    demo.add_argument("--epochs", type=int, default=8, help="training epochs of the attacker")
    demo.add_argument("--clean-images", type=int, default=500, help="given to the defender")
    demo.add_argument(
        "--selector",
        choices=("trigger", "auto", "accuracy"),
        default="trigger",
        help="how much goes: until recovered triggers fail, until the evidence of a backdoor has "
        "gone, or as much as accuracy allows",
    )
    demo.add_argument(
        "--max-drop", type=float, default=0.02, help="clean accuracy that may go, 0.02 = 2 points"
    )
    demo.add_argument("--seed", type=int, default=0, help="of training and defence")
    demo.add_argument("--save", type=Path, metavar="FILE.png", help="write a picture")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    demo.set_defaults(run=_demo)

    listing = commands.add_parser("list", help="criteria with their papers and needs")
    listing.set_defaults(run=_list)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from .demo import Drill, run_drill  # noqa: PLC0415 - timm takes seconds to import

    create_criterion(options.method)  # a bad name fails before a minute of training
    create_attack(options.attack)
    width = options.width
    if width is None:
        width = 0.5 if options.arch == "resnet18" else 1.0
    drill = Drill(
        arch=options.arch,
        width=width,
        attack=options.attack,
        rate=options.poison_rate,
        epochs=options.epochs,
        seed=options.seed,
    )
    print(
        f"Training {drill.arch} (width {drill.width:g}) on photo-patches, {drill.rate:.0%} of the "
        f"images poisoned by {drill.attack}, {drill.epochs} epochs ...",
        flush=True,
    )
    outcome = run_drill(
        drill,
        method=options.method,
        selector=create_selector(options.selector, max_drop=options.max_drop),
        clean_images=options.clean_images,
        progress=not options.quiet,
        save=options.save,
    )
    print(f"\n{outcome.purified.summary()}\n\n{outcome.table()}")
    if outcome.before.attack.asr.value < 0.9:
        print("\nNote: the attack itself did not take (ASR < 90 % before); train for longer.")
    if options.save:
        print(f"\npicture: {options.save}")
    return 0


def _list(options: argparse.Namespace) -> int:
    for name in list_criteria():
        cls = criterion_class(name)
        print(f"{name:9} {cls.reference}; needs {_needs(cls)}")
    return 0


def _needs(cls: type[Criterion]) -> str:
    needs = "labelled clean images" if cls.needs_labels else "clean images, no labels"
    if not cls.needs_images:
        needs = "no images"
    return f"{needs}, BatchNorm" if cls.needs_batchnorm else needs


if __name__ == "__main__":
    sys.exit(main())
