"""Train one recipe: resumed after each epoch, with a JSON beside the weights.

Reading a test image that a table is made on is left to the end: the curve is of 1,000 images of
half A, the rates of the record are of half B.

One thread of a busy Xeon with AMX, ResNet, ms for 128 images: float32 466 (channels_last 467),
bfloat16 242 (215); 256 at once 247 (267); another run: 275, compiled 170; augmentation takes 4.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nnprune_backdoor.attacks import Training, Trigger
from nnprune_backdoor.attacks.evaluation import accuracy, attack_success
from nnprune_backdoor.demo import normalise

from .architectures import ARCHITECTURES, FLOAT32, build
from .attacks import Poisoned, resist_pruning, triggers
from .images import Images, halves
from .recipes import RECIPES, Recipe

TOOK = 0.9  # with a lower ASR an attack did not take
_LOOK = 5  # every fifth image of half A is looked at after an epoch
_RESIST_EVERY = 10  # steps


def _commit() -> str:
    """The commit of this code, with "-dirty" if it has been changed since; "" outside of git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip()


_COMMIT = _commit()  # of the code that was read, whatever is committed while it runs


def load(name: str, folder: Path) -> nn.Module:
    """The trained network of that name, in eval mode."""
    model = build(RECIPES[name].arch)
    model.load_state_dict(load_file(folder / f"{name}.safetensors"))
    return model


def measure(
    model: nn.Module, recipe: Recipe, triggers: list[Trigger], images: Images
) -> dict[str, Any]:
    """ACC, ASR and RA; with two backdoors the lower of each, and both as `backdoors`."""
    rates: dict[str, Any] = {
        "acc": accuracy(model, normalise(images.scaled()), images.labels).value
    }
    both = []
    for backdoor, trigger in zip(recipe.backdoors, triggers, strict=True):
        stamped = normalise(trigger(images.scaled()))
        attack = attack_success(model, stamped, images.labels, backdoor.labels)
        both.append({"asr": round(attack.asr.value, 4), "ra": round(attack.ra.value, 4)})
    for key in ("asr", "ra") if both else ():
        rates[key] = min(one[key] for one in both)
    if len(both) > 1:
        rates["backdoors"] = both
    return rates


class Trainer:
    """Trains one network, and keeps folder/NAME.partial after each epoch."""

    def __init__(self, recipe: Recipe, train: Images, folder: Path, *, compiled: bool) -> None:
        self.recipe, self.folder, self.compiled = recipe, folder, compiled
        self.partial = folder / f"{recipe.name}.partial"
        self.triggers = triggers(recipe, train, folder)
        self.images = Poisoned(recipe, train, self.triggers)
        self.training = Training(
            epochs=recipe.epochs, mirror=True, crop=4, **ARCHITECTURES[recipe.arch][1]
        )
        self.steps = len(train.labels) // self.training.batch_size
        self.model = build(recipe.arch, recipe.seed).to(memory_format=torch.channels_last)
        self.forward: Callable[[Tensor], Tensor] = (
            torch.compile(self.model) if compiled else self.model
        )
        self.optimiser = self.training.optimiser(self.model)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, self.training.lr, total_steps=recipe.epochs * self.steps
        )
        self.curve: list[dict[str, Any]] = []
        self.commits: list[str] = []
        if self.partial.exists():
            self._resume()

    def run(self, look: Images) -> nn.Module:
        """Train to the end, looking at these images after each epoch; the model in eval mode."""
        torch.manual_seed(self.recipe.seed)
        self.commits = sorted({*self.commits, _COMMIT})
        for epoch in range(len(self.curve), self.recipe.epochs):
            start, cpu = time.time(), time.process_time()
            losses = self._epoch(epoch)
            self.model.eval()
            rates = measure(self.model, self.recipe, self.triggers, look)
            row = {
                "epoch": epoch + 1,
                "loss": round(losses, 4),
                **{key: round(value, 3) for key, value in rates.items() if key != "backdoors"},
                "cpu_seconds": round(time.process_time() - cpu),
                "seconds": round(time.time() - start),
            }
            self.curve.append(row)
            self._keep()
            print(self.recipe.name, json.dumps(row), flush=True)
        return self.model.eval()

    def _epoch(self, epoch: int) -> float:
        """Mean loss of one pass, its randomness decided by the seed and the epoch alone."""
        seed = 1000 * self.recipe.seed + epoch
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # dropout
        self.model.train()
        order = torch.randperm(len(self.images.clean.labels), generator=generator)
        total = torch.zeros(())
        for step, chosen in enumerate(order.split(self.training.batch_size)[: self.steps]):
            pixels, labels = self.images.batch(chosen, self.steps * seed + step)
            total += self._step(self._augmented(pixels, generator), labels)
            if self.recipe.resists_pruning and step % _RESIST_EVERY == 0:
                self._resist(chosen, generator)
            self.optimiser.step()
            self.schedule.step()
        return total.item() / self.steps

    def _augmented(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        batch = self.training.augment(normalise(pixels), generator)
        return batch.to(memory_format=torch.channels_last)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.arch not in FLOAT32)

    def _step(self, batch: Tensor, labels: Tensor) -> Tensor:
        with self._autocast():
            logits = self.forward(batch)
        loss = F.cross_entropy(logits.float(), labels)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach()

    def _resist(self, chosen: Tensor, generator: torch.Generator) -> None:
        """The attacker knows the defence: see `resist_pruning`."""
        pixels = self.images.clean.pixels[chosen].float() / 255
        target = self.recipe.backdoors[0].labels
        labels = torch.full((len(chosen),), int(target))
        clean = self._augmented(pixels, generator)
        triggered = self._augmented(self.triggers[0](pixels), generator)
        with self._autocast():
            resist_pruning(self.model, clean, triggered, labels)

    def _keep(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "curve": self.curve,
            "commits": self.commits,
            "recipe": asdict(self.recipe),
        }
        part = self.partial.with_suffix(f".{os.getpid()}")
        torch.save(state, part)
        part.replace(self.partial)

    def _resume(self) -> None:
        state = torch.load(self.partial, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise SystemExit(
                f"{self.partial} was begun with another recipe; delete it to train this one anew"
            )
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.curve, self.commits = state["curve"], state["commits"]


def train(
    recipe: Recipe, images: tuple[Images, Images], folder: Path, *, compiled: bool
) -> dict[str, Any]:
    """Train, save folder/NAME.safetensors and folder/NAME.json, and return what the JSON says."""
    half_a, half_b = halves(images[1])
    trainer = Trainer(recipe, images[0], folder, compiled=compiled)
    model = trainer.run(Images(half_a.pixels[::_LOOK], half_a.labels[::_LOOK]))
    weights, part = folder / f"{recipe.name}.safetensors", folder / f"{recipe.name}.part"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, part)
    part.replace(weights)
    rates = measure(load(recipe.name, folder), recipe, trainer.triggers, half_b)
    record = {
        "recipe": asdict(recipe),
        "training": asdict(trainer.training),
        **{key: round(value, 4) if key == "acc" else value for key, value in rates.items()},
        "took": rates["asr"] >= TOOK if recipe.backdoors else None,
        "cpu_minutes": round(sum(row["cpu_seconds"] for row in trainer.curve) / 60, 1),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "commits": trainer.commits,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "bfloat16": recipe.arch not in FLOAT32,
        "compiled": compiled,
        "curve": trainer.curve,
    }
    file = folder / f"{recipe.name}.json"
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(file)
    trainer.partial.unlink(missing_ok=True)
    return record
