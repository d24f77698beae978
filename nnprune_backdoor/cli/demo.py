"""nnprune-backdoor demo: plant, purify, measure, on photographs that come with the install."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..attacks.base import create_attack, list_attacks
from ..criteria.base import create_criterion
from ..selectors.base import create_selector
from .base import Commands, MisuseError, Result, add_command, check_writable, seed_of
from .inputs import note
from .plugins import add_plugins
from .rates import rates_as_data


def add(commands: Commands) -> None:
    """The parser."""
    demo = add_command(
        commands,
        "demo",
        run,
        does="plant a backdoor in a timm network trained on photographs, and purify it",
        example="demo --save pair.png",
    )
    demo.add_argument("--method", default="tac", help="see: nnprune-backdoor list (tac)")
    demo.add_argument("--arch", default="resnet18", help="timm architecture (resnet18)")
    demo.add_argument(
        "--width", type=float, metavar="X", help="times the usual channels; ResNets only (0.5)"
    )
    demo.add_argument(
        "--attack", default="badnets", help=f"one of {', '.join(list_attacks())} (badnets)"
    )
    demo.add_argument(
        "--poison-rate",
        type=float,
        default=0.05,
        metavar="X",
        help="share of training images (0.05)",
    )
    demo.add_argument(
        "--epochs", type=int, default=8, metavar="N", help="training epochs of the attacker (8)"
    )
    demo.add_argument(
        "--clean-images", type=int, default=500, metavar="N", help="given to the defender (500)"
    )
    demo.add_argument(
        "--selector",
        choices=("trigger", "auto", "accuracy"),
        default="trigger",
        help="how much goes: until recovered triggers fail (trigger), until the evidence of a "
        "backdoor has gone (auto), or as much as accuracy allows",
    )
    demo.add_argument(
        "--max-drop",
        type=float,
        default=0.02,
        metavar="X",
        help="clean accuracy that may go, 0.02 = 2 points (0.02)",
    )
    demo.add_argument(
        "--repair",
        choices=("none", "unlearn"),
        help="unlearn: after pruning, train a little so that recovered triggers do nothing "
        "(unlearn, where method or selector recovers one)",
    )
    demo.add_argument("--seed", type=seed_of, default=0, help="of training and defence (0)")
    demo.add_argument("--save", type=Path, metavar="FILE.png", help="write a picture")
    demo.add_argument("--quiet", action="store_true", help="no progress bars and no notes")
    add_plugins(demo)


def run(options: argparse.Namespace) -> Result:
    """Run the demo."""
    from ..demo import (
        Demo,
        run_demo,
    )

    check_writable(options.save, "--save")
    criterion = create_criterion(options.method)  # bad names fail before a minute of training
    selector = create_selector(options.selector, max_drop=options.max_drop)
    create_attack(options.attack)
    recovers = criterion.recovers_triggers or selector.recovers_triggers
    if options.repair == "unlearn" and not recovers:
        raise MisuseError(
            "--repair unlearn needs --selector trigger or auto, or --method tac or cnp"
        )
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
        repair=options.repair or ("unlearn" if recovers else "none"),
        clean_images=options.clean_images,
        progress=not options.quiet,
        save=options.save,
    )
    text = f"{outcome.purified.summary()}\n\n{outcome.table()}"
    if outcome.before.attack.asr.value < 0.9:
        text += "\n\nNote: the attack itself did not take (ASR < 90 % before); train for longer."
    if options.save:
        text += f"\n\npicture: {options.save}"
    data = {
        when: rates_as_data({"ACC": m.acc, "ASR": m.attack.asr, "RA": m.attack.ra}, demo.target)
        for when, m in (("before", outcome.before), ("after", outcome.after))
    }
    return Result(text, {**data, "report": outcome.purified.to_dict()})
