"""The plain call and its controls, on backdoored and benign networks: ACC, ASR and RA.

    python -m benchmarks.efficacy.plain_call --young DIR --out OUT [--only NAME ...]
    python -m benchmarks.efficacy.plain_call --published DIR --data CIFAR --out OUT
    python -m benchmarks.efficacy.plain_call --out OUT --collect   # -> results/plain_call.json

One or two processor minutes a run, a JSON each, resumable. Young networks are those of
benchmarks.networks.zoo, published ones of benchmarks.networks.published. The rows `rnp`, `anp`, ...
are `purify(model, clean, method)`; the others are its controls. Clean images, and those that all is
measured on, never overlap.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.efficacy.efficacy import _order, clean_set
from benchmarks.networks import zoo
from benchmarks.networks.published import images as published_images
from benchmarks.networks.published import train as published_train
from benchmarks.networks.published.attacks import triggers
from benchmarks.networks.published.recipes import RECIPES
from benchmarks.render import RESULTS
from nnprune_backdoor import CleanData, purify
from nnprune_backdoor.attacks.evaluation import accuracy, attack_success
from nnprune_backdoor.core.scores import Selection
from nnprune_backdoor.core.splits import equal_images, stratified
from nnprune_backdoor.demo import normalise
from nnprune_backdoor.errors import PurifyError
from nnprune_backdoor.selectors.agreement import Agreeing
from nnprune_backdoor.training import Distillation, distil

METHODS = ("rnp", "anp", "cnp", "mnp", "tac", "random", "magnitude")
CONTROLS = ("pruning alone", "distilling alone", "without triggers")
RESULT = RESULTS / "plain_call.json"


@dataclass(frozen=True)
class Case:
    """A network, the images of its defender, and what it is measured on.

    Attributes:
        stamped: The measured images with the trigger, normalised; None for a benign network.
        target: Of the attack; a label, or one for each label.
    """

    model: nn.Module
    clean: CleanData
    images: Tensor
    labels: Tensor
    stamped: Tensor | None
    target: int | Tensor

    def measure(self, model: nn.Module) -> dict[str, float]:
        """ACC, and ASR and RA where there is a trigger."""
        rates = {"acc": accuracy(model, normalise(self.images), self.labels).value}
        if self.stamped is not None:
            attack = attack_success(model, self.stamped, self.labels, self.target)
            rates |= {"asr": attack.asr.value, "ra": attack.ra.value}
        return {name: round(rate, 4) for name, rate in rates.items()}


def young(folder: Path, images: int, draw: int, only: list[str]) -> Iterator[tuple[str, Case]]:
    photos = zoo._photos()
    measured = _order()[-2000:]  # never among those of `clean_set`
    pixels, labels = photos.test_images[measured], photos.test_labels[measured]
    for member in (one for some in zoo.ZOOS.values() for one in some()):
        if member.file(folder).exists() and any(part in member.name for part in only):
            trigger = member.trigger
            stamped = None if trigger is None else normalise(trigger(pixels))
            clean = clean_set(images, draw)
            case = Case(member.load(folder), clean, pixels, labels, stamped, member.target)
            yield member.name, case


def published(
    folder: Path, data: Path, images: int, draw: int, only: list[str]
) -> Iterator[tuple[str, Case]]:
    train, test = published_images.read(data)
    half, measured = published_images.halves(test)
    share = images / len(half.labels)
    chosen = stratified(half.labels, equal_images(half.scaled()), (share, 1 - share), draw)[0]
    clean = CleanData(normalise(half.scaled()[chosen]), half.labels[chosen])
    for name, recipe in RECIPES.items():
        if (folder / f"{name}.safetensors").exists() and any(part in name for part in only):
            found = triggers(recipe, train, folder)
            stamped = normalise(found[0](measured.scaled())) if found else None
            target = recipe.backdoors[0].labels if found else 0
            model = published_train.load(name, folder)
            yield name, Case(model, clean, measured.scaled(), measured.labels, stamped, target)


def purified(row: str, case: Case, seed: int) -> nn.Module:
    """The network after the call, or after a part of it."""
    if row in METHODS:
        return purify(case.model, case.clean, row, seed=seed, progress=False).model
    deep = Agreeing()
    cut = purify(
        case.model, case.clean, "rnp", selector=deep, removal="none", seed=seed, progress=False
    )
    if row == "pruning alone":
        return cut.model
    scoring, selecting, _ = case.clean.split(0.6, 0.25, 0.15, seed=seed)
    both = CleanData(torch.cat([scoring.images, selecting.images]))
    student, silent = cut.model, cut.selection
    if row == "distilling alone":
        student, silent = case.model, Selection((), ())
    settings = replace(Distillation(), stamped=0.0) if row == "without triggers" else Distillation()
    return distil(student, case.model, both, settings, selection=silent, seed=seed, progress=False)


def run(name: str, case: Case, row: str, draw: int, out: Path) -> None:
    images = len(case.clean)
    file = out / f"{name}__{row.replace(' ', '_')}__{images}__{draw}.json"
    if file.exists():
        return
    start = time.process_time()
    record: dict[str, Any] = {"network": name, "row": row, "images": images, "draw": draw}
    record["before"] = case.measure(case.model)
    try:
        record["after"] = case.measure(purified(row, case, draw))
    except PurifyError as error:
        record["refused"] = str(error)
    record["cpu_seconds"] = round(time.process_time() - start)
    record["commit"] = COMMIT
    file.write_text(json.dumps(record) + "\n")
    print(json.dumps(record), flush=True)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip()


COMMIT = _commit()  # of the code that was read, whatever is checked out while it runs


def collect(out: Path) -> None:
    rows = [json.loads(file.read_text()) for file in sorted(out.glob("*__*.json"))]
    lines = ",\n".join(json.dumps(row) for row in rows)
    RESULT.write_text(f"[\n{lines}\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--young", type=Path, help="folder of the young networks' weights")
    parser.add_argument("--published", type=Path, help="folder of the published networks' weights")
    parser.add_argument("--data", type=Path, help="CIFAR-10, for the published networks")
    parser.add_argument("--out", type=Path, required=True, help="folder, a JSON each run")
    parser.add_argument("--only", nargs="+", default=[""], help="networks: names, or parts of them")
    parser.add_argument("--rows", nargs="+", default=[*METHODS, *CONTROLS])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--draws", type=int, nargs="+", default=[0])
    parser.add_argument("--collect", action="store_true", help="write results/plain_call.json")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.collect:
        collect(options.out)
        return
    torch.set_num_threads(1)
    for draw in options.draws:
        for row in options.rows:
            cases: list[Iterator[tuple[str, Case]]] = []
            if options.young:
                cases.append(young(options.young, options.images, draw, options.only))
            if options.published:
                cases.append(
                    published(options.published, options.data, options.images, draw, options.only)
                )
            for name, case in (pair for some in cases for pair in some):
                run(name, case, row, draw, options.out)


if __name__ == "__main__":
    main()
