"""nnprune-backdoor demo: plant, purify, measure, on photographs that come with the install."""

from __future__ import annotations

import argparse
from pathlib import Path

from .base import Commands, Result, add_command, check_writable, note
from .names import ATTACKS, CRITERIA
from .options import add_quiet, seed_of
from .plugins import add_plugins


def add(commands: Commands) -> None:
    """Add the command's options."""
    parser = add_command(
        commands,
        "demo",
        run,
        does="plant a backdoor in a timm network trained on photographs, and purify it",
        example="demo --save pair.png",
    )
    _add_attack(parser)
    _add_purification(parser)
    parser.add_argument(
        "--seed",
        type=seed_of,
        default=0,
        metavar="N",
        help="seed of training and purification (default: 0)",
    )
    parser.add_argument(
        "--save",
        type=Path,
        metavar="FILE.png",
        help="write a picture of a clean and a triggered image, with predictions before and after",
    )
    add_quiet(parser)
    add_plugins(parser)


def _add_attack(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the attack")
    group.add_argument(
        "--arch",
        default="resnet18",
        metavar="NAME",
        help="name of the architecture in timm (default: resnet18)",
    )
    group.add_argument(
        "--width",
        type=float,
        metavar="X",
        help="multiply the number of channels by X; small ResNets only (default: 0.5 for resnet18, "
        "1 for others)",
    )
    group.add_argument(
        "--attack",
        default="badnets",
        metavar="NAME",
        help=f"{', '.join(ATTACKS)} (default: badnets)",
    )
    group.add_argument(
        "--poison-rate",
        type=float,
        default=0.05,
        metavar="X",
        help="share of the training images to poison (default: 0.05)",
    )
    group.add_argument(
        "--epochs",
        type=int,
        default=8,
        metavar="N",
        help="passes over the training images (default: 8)",
    )


def _add_purification(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the purification")
    group.add_argument(
        "--method",
        default="rnp",
        metavar="NAME",
        help=f"{', '.join(CRITERIA)} (default: rnp); see: nnprune-backdoor list",
    )
    group.add_argument(
        "--clean-images",
        type=int,
        default=500,
        metavar="N",
        help="number of clean images to purify with (default: 500)",
    )
    group.add_argument(
        "--selector",
        choices=("trigger", "auto", "accuracy"),
        help="how much is pruned. trigger: until recovered triggers fail; auto: until there is no "
        "evidence of a backdoor; accuracy: as much as --max-drop allows (default: at most the "
        "lowest 5%% of the neurons)",
    )
    group.add_argument(
        "--max-drop",
        type=float,
        metavar="X",
        help="trigger, auto, accuracy: largest drop of clean accuracy allowed, 0.02 = 2 points "
        "(default: 0.02)",
    )
    group.add_argument(
        "--repair",
        choices=("none", "unlearn", "distil"),
        help="distil: after pruning, train all weights towards the given model's answers; unlearn: "
        "train them so that recovered triggers have no effect; none: prune only (default: distil "
        "unless a selector is given, then none)",
    )


def run(options: argparse.Namespace) -> Result:
    """Run the demo."""
    from ..attacks.base import create_attack
    from ..criteria.base import create_criterion
    from .choices import check_repair, selector_of

    check_writable(options.save, "--save")
    criterion = create_criterion(options.method)  # bad names fail before a minute of training
    selector = selector_of(options)
    create_attack(options.attack)
    check_repair(options, criterion, selector)

    from ..demo import Demo, run_demo
    from .rates import rates_as_data

    width = options.width
    if width is None:
        width = 0.5 if options.arch == "resnet18" else 1.0
    demo = Demo(
        arch=options.arch,
        width=width,
        attack=options.attack,
        rate=options.poison_rate,
        epochs=options.epochs,
        seed=options.seed,
    )
    note(
        options,
        f"Training {demo.arch} (width {demo.width:g}) on photo-patches, {demo.rate:.0%} of the "
        f"images poisoned by {demo.attack}, {demo.epochs} epochs ...",
    )
    outcome = run_demo(
        demo,
        method=criterion,
        selector=selector,
        repair=options.repair,
        clean_images=options.clean_images,
        progress=not options.quiet,
        save=options.save,
    )
    text = f"{outcome.purified.summary()}\n\n{outcome.table()}"
    if outcome.before.attack.asr.value < 0.9:
        text += "\n\nNote: the attack failed (ASR before is below 90 %); give more --epochs."
    if options.save:
        text += f"\n\npicture: {options.save}"
    data = {
        when: rates_as_data({"ACC": m.acc, "ASR": m.attack.asr, "RA": m.attack.ra}, demo.target)
        for when, m in (("before", outcome.before), ("after", outcome.after))
    }
    return Result(text, {**data, "report": outcome.purified.to_dict()})
