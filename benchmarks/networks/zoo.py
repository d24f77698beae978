"""A zoo of backdoored and benign networks, trained reproducibly on a small machine.

    python -m benchmarks.networks.zoo --models DIR --workers 2     # a CPU minute or two a network
    python -m benchmarks.networks.zoo --list

The weights go to DIR, outside of the package; what each network is and does (recipe, ACC, ASR, RA)
goes to benchmarks/results/zoo.json. Interrupt it when you like: what is there is not trained
again. Same machine, same torch, one thread: same weights, bit for bit.

Lengths. "short": 8 to 14 epochs of 11,876 photographs, when the loss has only just settled; there
backdoor and task share neurons. "long": four times as many, with mirrored and shifted images, until
accuracy has stopped rising. Both decay the learning rate to zero.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.densenet import DenseNet
from timm.models.metaformer import MetaFormer
from timm.models.regnet import RegNet, RegNetCfg
from torch import Tensor, nn

from nnprune_backdoor.attacks import (
    Photos,
    Trigger,
    all_to_all,
    create_attack,
    photo_patches,
    poison,
    train_classifier,
)
from nnprune_backdoor.attacks.evaluation import accuracy, attack_success
from nnprune_backdoor.demo import normalise

RESULTS = Path(__file__).parents[1] / "results" / "zoo.json"
TOOK = 0.9  # an attack below this ASR did not take, and the network is left out of every table


def _repvgg() -> nn.Module:
    blocks = zip((1, 2, 2, 1), (48, 96, 192, 384), strict=True)
    config = ByoModelCfg(
        blocks=tuple(ByoBlockCfg("rep", depth, width, 2) for depth, width in blocks),
        stem_type="",
        stem_chs=24,
    )
    return ByobNet(config, num_classes=10)


def _densenet() -> nn.Module:
    return DenseNet(growth_rate=16, block_config=(4, 4, 4, 4), num_classes=10)


def _regnet(**settings: Any) -> Callable[[], nn.Module]:
    config = {"depth": 8, "w0": 24, "wa": 30, "wm": 2.0, "group_size": 8, "stem_width": 24}
    return lambda: RegNet(RegNetCfg(**config | settings), num_classes=10)


def _poolformer() -> nn.Module:
    return MetaFormer(num_classes=10, depths=(1, 1, 2, 1), dims=(24, 48, 96, 160))


def _vgg() -> nn.Module:
    """Without residuals; zero: a pooling layer."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (24, 0, 48, 0, 96, 96, 0, 192):
        if width:
            conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def _timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=10, **settings)


_ADAMW = {"optimizer": "adamw", "weight_decay": 0.05}
# name -> how to build it for 32 pixels, narrowed by timm's own arguments, and how to train it
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "resnet": (_timm("resnet18", channels=(32, 64, 128, 256)), {"epochs": 8, "lr": 0.1}),
    "mobilenet": (_timm("mobilenetv3_small_050"), {"epochs": 10, "lr": 0.1}),
    "repvgg": (_repvgg, {"epochs": 8, "lr": 0.1}),
    "convnext": (
        _timm("convnext_atto", depths=(2, 2, 4, 2), dims=(24, 48, 96, 192), patch_size=2),
        {"epochs": 10, "lr": 0.004, **_ADAMW},
    ),
    "vit": (
        _timm(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=96,
            depth=4,
            num_heads=3,
        ),
        {"epochs": 12, "lr": 0.002, **_ADAMW},
    ),
}
# not of the zoo: an architecture that no rule was made on
OTHERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "resnet10t": (_timm("resnet10t"), {"epochs": 8, "lr": 0.1}),
}
# nor seen when an alarm was raised by the size of a trigger beside those of others
UNSEEN: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "regnet": (_timm("regnetx_002"), {"epochs": 8, "lr": 0.1}),
    "densenet": (_densenet, {"epochs": 8, "lr": 0.1}),
}
# on which nothing was developed: they measure how `scan` carries over (benchmarks/evidence)
FINAL: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "regnetx": (_regnet(), {"epochs": 8, "lr": 0.1}),
    "regnety": (_regnet(se_ratio=0.25), {"epochs": 8, "lr": 0.1}),
    "regnetz": (
        _regnet(
            w0=16,
            wa=20,
            stem_width=16,
            bottle_ratio=4.0,
            se_ratio=0.25,
            linear_out=True,
            downsample=None,
            act_layer="silu",
        ),
        {"epochs": 8, "lr": 0.1},
    ),
    "vgg": (_vgg, {"epochs": 8, "lr": 0.1}),
    "tinynet": (
        _timm("tinynet_e"),
        {"epochs": 10, "lr": 0.1},
    ),
    "poolformer": (_poolformer, {"epochs": 10, "lr": 0.004, **_ADAMW}),
}
EVERY = ARCHITECTURES | OTHERS | UNSEEN | FINAL
# name -> settings, poison rate, cover rate; a clean-label rate is a share of the target's images
ATTACKS: dict[str, tuple[str, dict[str, Any], float, float]] = {
    "badnets": ("badnets", {}, 0.05, 0.0),
    "blended": ("blended", {}, 0.05, 0.0),
    "lowfreq": ("lowfreq", {}, 0.1, 0.0),
    "warp": ("warp", {"strength": 3.0}, 0.2, 0.0),
    "sample_specific": ("sample_specific", {}, 0.1, 0.0),
    "adaptive_blend": ("adaptive_blend", {"ratio": 0.3, "training_ratio": 0.2}, 0.1, 0.05),
    "sig": ("sig", {}, 1.0, 0.0),
    "all_to_all": ("badnets", {}, 0.1, 0.0),
}

Length = Literal["short", "long"]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One network of the zoo. Its name says all there is to know."""

    arch: str
    attack: str | None  # None: benign
    length: Length = "short"
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.arch}-{self.attack or 'benign'}-{self.length}-{self.seed}"

    @property
    def target(self) -> int | Tensor:
        """Another one for each seed; a map of labels for all-to-all."""
        return all_to_all(10) if self.attack == "all_to_all" else (3 * self.seed) % 10

    @property
    def trigger(self) -> Trigger | None:
        if self.attack is None:
            return None
        name, settings, _, _ = ATTACKS[self.attack]
        return create_attack(name, **settings)

    def build(self) -> nn.Module:
        """The untrained network, in eval mode."""
        torch.manual_seed(self.seed)
        return EVERY[self.arch][0]().eval()

    def file(self, folder: Path) -> Path:
        return folder / f"{self.name}.safetensors"

    def load(self, folder: Path) -> nn.Module:
        model = self.build()
        model.load_state_dict(load_file(self.file(folder)))
        return model

    def train(self, progress: bool = False) -> nn.Module:
        photos = _photos()
        pixels, labels = photos.train_images, photos.train_labels
        if self.attack is not None:
            _, _, rate, cover = ATTACKS[self.attack]
            assert self.trigger is not None
            pixels, labels, _ = poison(
                pixels,
                labels,
                self.trigger,
                target=self.target,
                rate=rate,
                cover=cover,
                seed=self.seed,
            )
        settings = dict(EVERY[self.arch][1])
        if self.length == "long":
            settings |= {"epochs": 4 * settings["epochs"], "mirror": True, "crop": 2}
        model = self.build().to(memory_format=torch.channels_last)  # up to twice as fast
        images = normalise(pixels)
        train_classifier(model, images, labels, seed=self.seed, progress=progress, **settings)
        return model.to(memory_format=torch.contiguous_format)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """ACC, ASR and RA on the whole test set."""
        photos = _photos()
        images, labels = photos.test_images, photos.test_labels
        rates = {"acc": accuracy(model, normalise(images), labels).value}
        if self.trigger is not None:
            stamped = normalise(self.trigger(images))
            attack = attack_success(model, stamped, labels, self.target)
            rates |= {"asr": attack.asr.value, "ra": attack.ra.value}
        return {key: round(value, 4) for key, value in rates.items()}


def members() -> list[Member]:
    """All of them, the ones that most tables need first."""
    usual = ("badnets", "blended", "lowfreq", "sample_specific", "adaptive_blend", "all_to_all")
    zoo = [Member(arch=arch, attack=attack) for attack in usual for arch in ARCHITECTURES]
    zoo[10:10] = [Member(arch=arch, attack=None) for arch in ARCHITECTURES]
    zoo += [
        Member(arch=arch, attack=attack)
        for arch in ("repvgg", "resnet")
        for attack in ("sig", "warp")
    ]
    zoo += [
        Member(arch=arch, attack=attack, seed=seed)
        for seed in (1, 2)
        for arch in ("mobilenet", "resnet", "repvgg")
        for attack in ("badnets", "blended", None)
    ]
    zoo += [
        Member(arch=arch, attack=attack, length="long")
        for arch in ("repvgg", "mobilenet", "resnet")
        for attack in ("badnets", "blended", None)
    ]
    return zoo


def fresh() -> list[Member]:
    """More of the same recipe, for rules that were set with the others in sight (diagnosis.py)."""
    zoo = [
        Member(arch=arch, attack=attack, seed=3)
        for attack in ("badnets", "blended", None)
        for arch in ("mobilenet", "resnet", "repvgg")
    ]
    zoo += [Member(arch=arch, attack=None, seed=4) for arch in ("mobilenet", "resnet", "repvgg")]
    return zoo + [Member(arch=arch, attack=None, seed=1) for arch in ("convnext", "vit")]


def more_benign() -> list[Member]:
    """Benign ones alone, to know the rate of false alarms better."""
    zoo = [
        Member(arch=arch, attack=None, seed=seed)
        for seed in (5, 6, 7, 8)
        for arch in ("mobilenet", "resnet", "repvgg")
    ]
    return zoo + [Member(arch=arch, attack=None, seed=2) for arch in ("convnext", "vit")]


def others() -> list[Member]:
    """Of another architecture: does the alarm hold on what the null has not seen?"""
    return [
        Member(arch=arch, attack=attack, seed=seed)
        for seed in (1, 2, 3)
        for arch in OTHERS
        for attack in ("badnets", "blended", None)
    ]


def unseen() -> list[Member]:
    """Of two more architectures, for the rule that followed from the last one."""
    zoo = [
        Member(arch=arch, attack=attack, seed=seed)
        for seed in (1, 2)
        for arch in UNSEEN
        for attack in ("badnets", "blended", None)
    ]
    return zoo + [Member(arch=arch, attack=None, seed=seed) for seed in (3, 4) for arch in UNSEEN]


def final() -> list[Member]:
    """Trained for the rates of `scan` on architectures that nothing was developed on."""
    backdoors = (
        ("regnetx", "badnets", 1),
        ("vgg", "badnets", 2),
        ("poolformer", "badnets", 1),
        ("tinynet", "blended", 1),
        ("regnety", "blended", 1),
        ("tinynet", "badnets", 2),
        ("poolformer", "blended", 2),
    )
    benign = [Member(arch=arch, attack=None, seed=1) for arch in FINAL]
    benign.append(Member(arch="regnetx", attack=None, seed=2))
    return benign + [Member(arch=a, attack=attack, seed=seed) for a, attack, seed in backdoors]


def records(only_taken: bool = True) -> dict[str, dict[str, Any]]:
    """Name -> what results/zoo.json says of it; by default those whose attack took, and benign."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return {
        name: row for name, row in rows.items() if not only_taken or row.get("asr", 1.0) >= TOOK
    }


ZOOS: dict[str, Callable[[], list[Member]]] = {
    "members": members,
    "fresh": fresh,
    "benign": more_benign,
    "other": others,
    "unseen": unseen,
    "final": final,
}


@cache
def _photos() -> Photos:
    return photo_patches()


def _make(member: Member, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    start = time.process_time()
    model = member.train()
    seconds = time.process_time() - start
    part = member.file(folder).with_suffix(f".{os.getpid()}")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, part)
    part.replace(member.file(folder))
    return {**asdict(member), **member.measure(model), "cpu_seconds": round(seconds)}


def _missing(zoo: Iterable[Member], folder: Path) -> list[Member]:
    known = records(only_taken=False)
    return [m for m in zoo if m.name not in known or not m.file(folder).exists()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=Path, help="folder for the weights")
    parser.add_argument("--only", nargs="+", help="names, or parts of them")
    parser.add_argument("--zoo", choices=[*ZOOS], default="members", help="whose networks")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args()
    zoo = ZOOS[options.zoo]()
    zoo = [m for m in zoo if not options.only or any(o in m.name for o in options.only)]
    if options.list or options.models is None:
        print("\n".join(member.name for member in zoo))
        return
    options.models.mkdir(parents=True, exist_ok=True)
    todo = _missing(zoo, options.models)
    print(f"{len(todo)} of {len(zoo)} to train", flush=True)
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_make, member, options.models) for member in todo]
        for member, job in zip(todo, jobs, strict=True):
            rows = records(only_taken=False) | {member.name: job.result()}
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
            print(member.name, json.dumps(rows[member.name]), flush=True)


if __name__ == "__main__":
    main()
