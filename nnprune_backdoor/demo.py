"""The demonstration: plant a backdoor in a real network, purify it, measure. For the CLI."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .attacks.base import Trigger, create_attack
from .attacks.evaluation import Attack, accuracy, attack_success, defense_effectiveness
from .attacks.photos import Photos, photo_patches
from .attacks.poisoning import poison
from .attacks.training import train_classifier
from .core.data import CleanData
from .core.measures import Repair
from .core.predictions import predict
from .criteria.base import Criterion
from .errors import DataError, PurifyError
from .pipeline import purify
from .reports.purified import Purified
from .selectors.base import Selector
from .utils.statistics import Rate

_MEAN, _STD = 0.5, 0.5


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What the attacker does. The defaults embed the trigger in about a minute on two cores.

    Half of a ResNet-18's width (`width=0.5`) is enough for ten classes of 32-pixel photographs and
    trains twice as fast. How far the backdoor shares neurons with everything else differs from
    seed to seed, and with it how well it can be purified (docs/demo_seeds.md).
    """

    arch: str = "resnet18"  # any timm name
    width: float = 0.5  # times the usual channels; ResNets of basic blocks only, else 1
    settings: Mapping[str, Any] = field(default_factory=dict)  # more of timm.create_model
    attack: str = "badnets"
    target: int = 0
    rate: float = 0.05  # share of the training images that is poisoned
    images: int | None = None  # of the training photographs, at random; None: all
    epochs: int = 8
    batch_size: int = 128
    lr: float = 0.1
    optimizer: str = "sgd"  # or "adamw"
    weight_decay: float = 5e-4
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """Of timm.create_model, beside the name: what a saved model is built from again."""
        settings = {"num_classes": 10, **self.settings}
        if self.width != 1:
            if self.arch not in ("resnet10t", "resnet14t", "resnet18", "resnet34"):
                raise DataError(
                    f"width can be set for small ResNets only; give width 1 for {self.arch}"
                )
            settings["channels"] = tuple(round(self.width * c) for c in (64, 128, 256, 512))
        return settings

    def model(self) -> nn.Module:
        """The untrained network, ten classes."""
        torch.manual_seed(self.seed)
        model: nn.Module = timm.create_model(self.arch, **self.arguments())
        return model

    def train(self, photos: Photos, progress: bool = False) -> nn.Module:
        """A backdoored network, in eval mode."""
        generator = torch.Generator().manual_seed(self.seed)
        some = slice(None) if self.images is None else slice(self.images)
        order = torch.randperm(len(photos.train_labels), generator=generator)[some].sort().values
        pixels, labels, _ = poison(
            photos.train_images[order],
            photos.train_labels[order],
            create_attack(self.attack),
            target=self.target,
            rate=self.rate,
            seed=self.seed,
        )
        return train_classifier(
            self.model(),
            normalise(pixels),
            labels,
            epochs=self.epochs,
            lr=self.lr,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            batch_size=self.batch_size,
            seed=self.seed,
            progress=progress,
        )


@dataclass(frozen=True)
class Measured:
    """ACC, ASR and RA of one model on images that the defence never saw."""

    acc: Rate
    attack: Attack


@dataclass(frozen=True)
class Outcome:
    """A demo from both sides."""

    before: Measured
    after: Measured
    purified: Purified
    training_seconds: float

    def table(self) -> str:
        """Markdown: rates with 95 % intervals, before and after."""
        old, new = self.before, self.after
        rows = [
            ("ACC: clean images right", old.acc, new.acc),
            ("ASR: triggered images sent to the target", old.attack.asr, new.attack.asr),
            ("RA: triggered images still right", old.attack.ra, new.attack.ra),
        ]
        der = defense_effectiveness(
            old.acc.value, old.attack.asr.value, new.acc.value, new.attack.asr.value
        )
        count, total = len(self.purified.selection), len(self.purified.scores.flat)
        taken = sum(self.purified.seconds.values())
        cells = [
            ("", "before", "after"),
            *((name, str(was), str(now)) for name, was, now in rows),
            ("neurons silenced", "", f"{count} of {total} ({count / total:.1%})"),
            *self._sizes(),
            ("DER (0.5 = nothing gained, 1 = best)", "", f"{der:.3f}"),
            ("seconds", f"{self.training_seconds:.1f} (training)", f"{taken:.1f} (purifying)"),
        ]
        lines = [f"| {a:40} | {b:22} | {c:22} |" for a, b, c in cells]
        lines.insert(1, f"|{'-' * 42}|{'-' * 24}|{'-' * 24}|")
        return "\n".join(lines)

    def _sizes(self) -> list[tuple[str, str, str]]:
        removal = self.purified.removal
        if removal is None:
            return []
        old, new = (f"{size.parameters:,}" for size in (removal.before, removal.after))
        gone = f"{len(removal.removed)} (logits differ by {removal.drift:.0e})"
        return [("of these removed from the tensors", "", gone), ("parameters", old, new)]


def run_demo(
    demo: Demo,
    *,
    method: str | Criterion = "tac",
    selector: str | Selector = "accuracy",
    repair: Repair = "none",
    clean_images: int = 500,
    measured_images: int | None = None,
    progress: bool = False,
    save: Path | None = None,
    trained: nn.Module | None = None,
    **hyperparameters: Any,
) -> Outcome:
    """Train a backdoored network, purify it with `clean_images` clean images, measure both.

    The clean images and the images it is measured on are disjoint parts of the test set; the
    trigger is shown to nothing but the measurement.

    Args:
        measured_images: how many of the hidden images to measure on; None: all, about 2,400.
        trained: what `demo.train` gave before, to spare training it again.
    """
    photos = photo_patches()
    order = torch.randperm(len(photos.test_labels), generator=torch.Generator().manual_seed(1))
    if not 50 <= clean_images <= len(order) - 500:
        raise DataError(f"expected 50 to {len(order) - 500} clean images, got {clean_images}")
    given, hidden = order[:clean_images], order[clean_images:][:measured_images]
    start = time.perf_counter()
    model = demo.train(photos, progress) if trained is None else trained
    training_seconds = time.perf_counter() - start
    clean = CleanData(normalise(photos.test_images[given]), photos.test_labels[given])
    purified = purify(
        model,
        clean,
        method,
        selector=selector,
        repair=repair,
        seed=demo.seed,
        progress=progress,
        **hyperparameters,
    )
    trigger = create_attack(demo.attack)
    pixels, labels = photos.test_images[hidden], photos.test_labels[hidden]
    before = _measure(model, pixels, labels, trigger, demo.target)
    after = _measure(purified.model, pixels, labels, trigger, demo.target)
    if save is not None:
        which = int((labels != demo.target).nonzero()[0])
        pair = torch.stack([pixels[which], trigger(pixels[which : which + 1])[0]])
        _picture(save, pair, int(labels[which]), (model, purified.model), photos.class_names)
    return Outcome(before, after, purified, training_seconds)


def normalise(pixels: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1], what the demonstration's networks are trained on."""
    return (pixels - _MEAN) / _STD


def _measure(
    model: nn.Module, pixels: Tensor, labels: Tensor, trigger: Trigger, target: int
) -> Measured:
    return Measured(
        accuracy(model, normalise(pixels), labels),
        attack_success(model, normalise(trigger(pixels)), labels, target),
    )


def _picture(
    path: Path, pair: Tensor, truth: int, models: tuple[nn.Module, nn.Module], names: Sequence[str]
) -> None:
    """A clean image and its triggered twin (2, 3, H, W), with both models' predictions."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PurifyError(
            "--save needs matplotlib; run: pip install 'nnprune-backdoor[plots]'"
        ) from error
    before, after = (predict(model, normalise(pair)).tolist() for model in models)
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    for axis, image, kind, old, new in zip(
        figure.subplots(1, 2), pair, ("clean", "triggered"), before, after, strict=True
    ):
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.set_title(f"{kind}\nbefore: {names[old]}\nafter: {names[new]}", fontsize=9)
        axis.axis("off")
    figure.suptitle(f"truth: {names[truth]}", fontsize=10)
    figure.savefig(path, dpi=120)
