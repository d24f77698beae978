"""The demo: train a network with a backdoor, purify it, and measure both."""

from __future__ import annotations

import io
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
from .errors import DataError, OutputError, PurifyError
from .pipeline import purify
from .reports.purified import Purified
from .selectors.base import Selector
from .utils.randomness import private_randomness
from .utils.statistics import Rate

_MEAN, _STD = 0.5, 0.5


@dataclass(frozen=True, kw_only=True)
class Demo:
    """A network, an attack on it, and how it is trained.

    The defaults embed the trigger in about a minute on two cores: half the width of a ResNet-18 is
    enough for ten classes of 32-pixel photographs, and trains twice as fast. How many neurons the
    backdoor shares with the clean task, and so how well it can be removed, differs from seed to
    seed (docs/results/demo_seeds.md).

    Attributes:
        arch: timm name of the architecture.
        width: Factor on the number of channels; 1 for all but small ResNets of basic blocks.
        settings: Other arguments of `timm.create_model`.
        attack: Name of the attack (`list_attacks()`).
        target: Label that triggered images are to get.
        rate: Share of the training images to poison.
        images: Number of training photographs, drawn at random; None for all.
        epochs: Passes over the training photographs.
        lr: Highest learning rate.
        optimizer: "sgd" or "adamw"; see `Training`.
        weight_decay: Of the optimizer.
        seed: Of the weights, poisoning and training, and of the purification.
    """

    arch: str = "resnet18"
    width: float = 0.5
    settings: Mapping[str, Any] = field(default_factory=dict)
    attack: str = "badnets"
    target: int = 0
    rate: float = 0.05
    images: int | None = None
    epochs: int = 8
    lr: float = 0.1
    optimizer: str = "sgd"
    weight_decay: float = 5e-4
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """Arguments of `timm.create_model` beside the name; `save_purified` needs them.

        Raises:
            DataError: a width for an architecture other than a small ResNet.
        """
        settings = {"num_classes": 10, **self.settings}
        if self.width != 1:
            if self.arch not in ("resnet10t", "resnet14t", "resnet18", "resnet34"):
                raise DataError(
                    f"width can be set for small ResNets only; give width 1 for {self.arch}"
                )
            settings["channels"] = tuple(round(self.width * c) for c in (64, 128, 256, 512))
        return settings

    def model(self) -> nn.Module:
        """The untrained network, with ten classes."""
        with private_randomness(self.seed):
            model: nn.Module = timm.create_model(self.arch, **self.arguments())
        return model

    def train(self, photos: Photos, progress: bool = False) -> nn.Module:
        """The network after training on poisoned images, in eval mode."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(photos.train_labels), generator=generator)
        chosen = order[: self.images].sort().values
        pixels, labels, _ = poison(
            photos.train_images[chosen],
            photos.train_labels[chosen],
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
            seed=self.seed,
            progress=progress,
        )


@dataclass(frozen=True)
class Rates:
    """ACC, ASR and RA of a model on images that the defence did not see.

    Attributes:
        acc: ACC.
        attack: ASR and RA.
    """

    acc: Rate
    attack: Attack

    @classmethod
    def of(
        cls, model: nn.Module, pixels: Tensor, labels: Tensor, trigger: Trigger, target: int
    ) -> Rates:
        """Measured on images (N, C, H, W) in [0, 1] with labels (N,), with and without trigger."""
        return cls(
            accuracy(model, normalise(pixels), labels),
            attack_success(model, normalise(trigger(pixels)), labels, target),
        )


@dataclass(frozen=True)
class Outcome:
    """Result of a demo.

    Attributes:
        before: Rates of the backdoored model.
        after: Rates of the purified model.
        purified: Result of `purify`.
        training_seconds: Seconds that training the backdoored model took.
    """

    before: Rates
    after: Rates
    purified: Purified
    training_seconds: float

    def table(self) -> str:
        """Rates with 95 % intervals before and after, in Markdown."""
        old, new = self.before, self.after
        rows = [
            ("ACC: clean images, correct label", old.acc, new.acc),
            ("ASR: triggered images, target label", old.attack.asr, new.attack.asr),
            ("RA: triggered images, correct label", old.attack.ra, new.attack.ra),
        ]
        der = defense_effectiveness(
            old.acc.value, old.attack.asr.value, new.acc.value, new.attack.asr.value
        )
        count, total = len(self.purified.selection), len(self.purified.scores.flat)
        seconds = sum(self.purified.seconds.values())
        cells = [
            ("", "before", "after"),
            *((name, str(was), str(now)) for name, was, now in rows),
            ("neurons silenced", "", f"{count} of {total} ({count / total:.1%})"),
            *self._sizes(),
            ("DER (0.5 = no change, 1 = best)", "", f"{der:.3f}"),
            ("seconds", f"{self.training_seconds:.1f} (training)", f"{seconds:.1f} (purifying)"),
        ]
        lines = [f"| {a:40} | {b:22} | {c:22} |" for a, b, c in cells]
        lines.insert(1, f"|{'-' * 42}|{'-' * 24}|{'-' * 24}|")
        return "\n".join(lines)

    def _sizes(self) -> list[tuple[str, str, str]]:
        removal = self.purified.removal
        if removal is None:
            return []
        old, new = (f"{size.parameters:,}" for size in (removal.before, removal.after))
        removed = f"{len(removal.removed)} (logits differ by {removal.drift:.0e})"
        return [("of these removed from the tensors", "", removed), ("parameters", old, new)]


def run_demo(
    demo: Demo,
    *,
    method: str | Criterion = "rnp",
    selector: str | Selector | None = None,
    repair: Repair | None = None,
    clean_images: int = 500,
    progress: bool = False,
    save: Path | None = None,
) -> Outcome:
    """Train a backdoored network, purify it with clean images, and measure both networks.

    The test set is divided in two: images for `purify`, and about 2,400 to measure on. Only the
    measurement uses the trigger.

    Args:
        demo: the network and the attack.
        method: as for `purify`.
        selector: as for `purify`.
        repair: as for `purify`.
        clean_images: number of clean images for `purify`.
        progress: show progress bars on a terminal, elsewhere a line every 30 seconds.
        save: PNG file of a clean and a triggered image with the labels that both networks predict.

    Raises:
        DataError: too few or too many clean images, or a package of the extra `demo` is missing.
        OutputError: the picture cannot be written.
        PurifyError: matplotlib is missing, or see `purify`.
    """
    photos = photo_patches()
    order = torch.randperm(len(photos.test_labels), generator=torch.Generator().manual_seed(1))
    if not 50 <= clean_images <= len(order) - 500:
        raise DataError(f"expected 50 to {len(order) - 500} clean images, got {clean_images}")
    given, hidden = order[:clean_images], order[clean_images:]
    start = time.perf_counter()
    model = demo.train(photos, progress)
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
    )
    trigger = create_attack(demo.attack)
    pixels, labels = photos.test_images[hidden], photos.test_labels[hidden]
    before = Rates.of(model, pixels, labels, trigger, demo.target)
    after = Rates.of(purified.model, pixels, labels, trigger, demo.target)
    if save is not None:
        index = int((labels != demo.target).nonzero()[0])
        pair = torch.stack([pixels[index], trigger(pixels[index : index + 1])[0]])
        _save_picture(save, pair, int(labels[index]), (model, purified.model), photos.class_names)
    return Outcome(before, after, purified, training_seconds)


def normalise(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1], scaled to [-1, 1] as the networks of the demo expect."""
    return (pixels - _MEAN) / _STD


def _save_picture(
    path: Path, pair: Tensor, truth: int, models: tuple[nn.Module, nn.Module], names: Sequence[str]
) -> None:
    """Draw a clean and a triggered image (2, 3, H, W) with the labels that both models predict."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PurifyError(
            "the picture needs matplotlib; run: pip install 'nnprune-backdoor[plots]'"
        ) from error
    before, after = (predict(model, normalise(pair)).tolist() for model in models)
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    for axis, image, kind, old, new in zip(
        figure.subplots(1, 2), pair, ("clean", "triggered"), before, after, strict=True
    ):
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.set_title(f"{kind}\nbefore: {names[old]}\nafter: {names[new]}", fontsize=9)
        axis.axis("off")
    figure.suptitle(f"true label: {names[truth]}", fontsize=10)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    try:
        path.write_bytes(file.getvalue())
    except (OSError, UnicodeError) as error:
        raise OutputError(
            f"{path}: cannot be written ({error}); free space on the disk, or give another name"
        ) from error
