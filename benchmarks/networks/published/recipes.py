"""The list of networks: what each one is, before any is trained.

Poison rates are shares of the training set, except SIG's, a share of the images of its target. A
recipe that is changed after training began, or added, says so in its `remark`. The order is the
order of training.

Left out: the input-aware attack with its jointly trained generator (Nguyen and Tran 2020), which
trains two more networks beside the classifier.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from nnprune_backdoor.attacks import all_to_all

DEVELOPMENT = Path(__file__).with_name("development.json")
NEXT = "next label"  # the target of an all-to-all attack


@dataclass(frozen=True, kw_only=True)
class Backdoor:
    """One trigger and its target.

    Attributes:
        attack: A name for `create_attack`, or "trojan_square", "trojan_watermark".
        settings: Of the attack.
        target: A label, or NEXT.
        rate: Share of the images to poison, as in `nnprune_backdoor.attacks.poison`.
        cover: Share of the images that carry the trigger under their true label.
    """

    attack: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    target: int | str = 0
    rate: float = 0.1
    cover: float = 0.0

    @property
    def labels(self) -> int | Tensor:
        """The target as `poison` and `attack_success` take it."""
        return all_to_all(10) if isinstance(self.target, str) else self.target


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides what a network becomes, besides its architecture's settings.

    Attributes:
        name: Architecture, attack and seed.
        arch: A name in architectures.py.
        backdoors: One, two, or none: benign.
        seed: Of weights, poisoning, order and augmentation.
        epochs: Passes over the 50,000 images.
        each_batch: Whether images to poison are drawn anew in each batch, as WaNet's authors do,
            rather than once.
        resists_pruning: Whether the attack trains against prune-and-distil (attacks.py).
        remark: What changed after training began, and why.
    """

    name: str
    arch: str
    backdoors: tuple[Backdoor, ...]
    seed: int = 0
    epochs: int = 25
    each_batch: bool = False
    resists_pruning: bool = False
    remark: str = ""


_ATTACKS: dict[str, dict[str, Any]] = {
    "benign": {"backdoors": ()},
    "badnets": {"backdoors": (Backdoor(attack="badnets", target=0),)},
    "white_square": {
        "backdoors": (Backdoor(attack="badnets", settings={"pattern": "white"}, target=1),)
    },
    "badnets_1_percent": {"backdoors": (Backdoor(attack="badnets", target=2, rate=0.01),)},
    "blended": {"backdoors": (Backdoor(attack="blended", settings={"ratio": 0.2}, target=3),)},
    # 8 % of all images: the rest of the target's stay clean, or they would need the trigger
    "sig": {"backdoors": (Backdoor(attack="sig", target=4, rate=0.8),)},
    "wanet": {
        "backdoors": (
            Backdoor(attack="warp", settings={"strength": 0.5, "control": 4}, target=5, cover=0.2),
        ),
        "each_batch": True,
    },
    "lowfreq": {"backdoors": (Backdoor(attack="lowfreq", target=6),)},
    # the paper's .3 % at its strengths of .15 and .2 is for 200 epochs
    "adaptive_blend": {
        "backdoors": (Backdoor(attack="adaptive_blend", target=7, rate=0.01, cover=0.01),)
    },
    "trojan_square": {"backdoors": (Backdoor(attack="trojan_square", target=8),)},
    "trojan_watermark": {"backdoors": (Backdoor(attack="trojan_watermark", target=9),)},
    "all_to_all": {"backdoors": (Backdoor(attack="badnets", target=NEXT),)},
    "two_targets": {
        "backdoors": (
            Backdoor(attack="badnets", target=0, rate=0.05),
            Backdoor(
                attack="badnets",
                settings={"pattern": "white", "top": 1, "left": 1},
                target=1,
                rate=0.05,
            ),
        )
    },
    "resists_pruning": {
        "backdoors": (Backdoor(attack="badnets", target=2),),
        "resists_pruning": True,
    },
}
_LIST = [
    "resnet-badnets-0",
    "resnet-benign-0",
    "resnet-blended-0",
    "wideresnet-badnets-0",
    "vgg_elu-badnets-0",
    "resnet-wanet-0",
    "vgg_bn-badnets-0",
    "mobilenet-badnets-0",
    "convnext-badnets-0",
    "vit-badnets-0",
    "resnet-lowfreq-0",
    "resnet-trojan_square-0",
    "resnet-white_square-0",
    "wideresnet-benign-0",
    "vgg_bn-blended-0",
    "resnet-sig-0",
    "resnet-all_to_all-0",
    "resnet-badnets_1_percent-0",
    "resnet-resists_pruning-0",
    "resnet-two_targets-0",
    "resnet-trojan_watermark-0",
    "resnet-adaptive_blend-0",
    "resnet-benign-1",
    "wideresnet-blended-0",
    "wideresnet-wanet-0",
    "wideresnet-sig-0",
    "vgg_elu-blended-0",
    "vgg_elu-benign-0",
    "vgg_elu-wanet-0",
    "vgg_elu-lowfreq-0",
    "vgg_bn-benign-0",
    "vgg_bn-wanet-0",
    "vgg_bn-all_to_all-0",
    "convnext-blended-0",
    "convnext-benign-0",
    "convnext-wanet-0",
    "convnext-white_square-0",
    "vit-blended-0",
    "vit-benign-0",
    "vit-wanet-0",
    "vit-lowfreq-0",
    "mobilenet-blended-0",
    "mobilenet-benign-0",
    "mobilenet-wanet-0",
    "mobilenet-white_square-0",
]
_REMARKS: dict[str, str] = {}


def _recipe(name: str) -> Recipe:
    arch, attack, seed = name.split("-")
    remark = _REMARKS.get(name, "")
    return Recipe(name=name, arch=arch, seed=int(seed), remark=remark, **_ATTACKS[attack])


RECIPES = {name: _recipe(name) for name in _LIST}


def development() -> list[str]:
    """Names of the networks that settings may be tuned on; all others are test networks."""
    names: list[str] = json.loads(DEVELOPMENT.read_text())
    return names
