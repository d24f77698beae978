"""Every method on every network of the zoo, chosen by clean images alone, beside an oracle.

    python -m benchmarks.efficacy.efficacy --models DIR --out DIR2 --workers 2     # resumable
    python -m benchmarks.efficacy.efficacy --out DIR2 --collect
        # -> results/efficacy.json
    ... --zoo fresh                    # other networks of zoo.py -> results/efficacy_fresh.json
    ... --plugin mine.py --methods mine    # a criterion that mine.py registers, by the same rules

A run scores one network by one method with one set of clean images, then lets each selector choose
how much goes. All are measured on 1,000 hidden images, with and without the trigger. The curve
(ACC, ASR, RA on 500 of them against the number silenced) is for analysis; from it comes the
*oracle* amount, the best ASR within two points of ACC, which no defender can know. `informed` and
`informed change` rank by the true trigger, which no defender has: reference rows, not methods.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.networks.zoo import ZOOS, Member, records
from nnprune_backdoor import CleanData, Criterion, PurifyError, Selector, create_criterion
from nnprune_backdoor.attacks import Trigger, photo_patches
from nnprune_backdoor.attacks.targets import target_labels
from nnprune_backdoor.cli.plugins import load_plugins
from nnprune_backdoor.core.held_out import HeldOut
from nnprune_backdoor.core.masks import MaskedModel, silence_
from nnprune_backdoor.core.predictions import predict
from nnprune_backdoor.core.scores import ChannelScores, Selection, lowest
from nnprune_backdoor.core.sites import Site, find_sites
from nnprune_backdoor.criteria import ANP, CNP, MNP, RNP, TAC, ActivationChange
from nnprune_backdoor.criteria.parts.response import loss_gradient, response_scores, sensitivity
from nnprune_backdoor.criteria.tac import activation_change
from nnprune_backdoor.demo import normalise
from nnprune_backdoor.selectors import AccuracyBudget, BelowThreshold, LowestFraction, TriggerGone
from nnprune_backdoor.training import FineTuning, fine_tune
from nnprune_backdoor.training.repair import REPAIR, repaired, triggers_of
from nnprune_backdoor.utils.randomness import private_randomness

RESULTS = Path(__file__).parents[1] / "results"
SHARES = (0.0, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.2)
BUDGET = 0.02  # points of ACC that the oracle may spend, as the selector `accuracy` may
MEASURED, CURVE = 1000, 500  # hidden images
PER_CLASS = 100  # a clean set of so many images has equally many of each class

CRITERIA: dict[str, Criterion] = {
    "random": create_criterion("random"),
    "magnitude": create_criterion("magnitude"),
    "fp": create_criterion("fp"),
    "clp": create_criterion("clp"),
    "bnp": create_criterion("bnp"),
    "rnp": RNP(),
    "rnp paper": RNP.paper(),
    "anp": ANP(),
    "mnp": MNP(),
    "mnp paper": MNP.paper(),
    "cnp": CNP(),
    "tac": TAC(),
    "tac change": TAC(ranking=ActivationChange()),
}
INFORMED = ("informed", "informed change")
TUNED = ("ft",)
SELECTORS: dict[str, Selector] = {"accuracy": AccuracyBudget(), "1 %": LowestFraction(0.01)}
# the published amount where there is one (RNP's authors: 0.25 to 0.3), and the selector that
# watches a recovered trigger
MORE: dict[str, dict[str, Selector]] = {
    "clp": {"published": BelowThreshold(-3)},
    "bnp": {"published": BelowThreshold(-3)},
    "rnp paper": {"published": BelowThreshold(0.25)},
    "random": {"trigger": TriggerGone()},  # what a repair does where the ranking is chance
    "tac": {"trigger": TriggerGone()},
    "cnp": {"trigger": TriggerGone()},
}


OWN: dict[str, dict[str, Selector]] = {"trigger": TriggerGone()}  # what MORE is for a plugin's


def criterion_of(method: str) -> Criterion:
    """As above, else what is registered by that name, with its defaults."""
    return CRITERIA[method] if method in CRITERIA else create_criterion(method)


def selectors_of(method: str) -> dict[str, Selector]:
    """Those of every method, and its own."""
    return SELECTORS | (MORE.get(method, {}) if method in CRITERIA or method in INFORMED else OWN)


@dataclass(frozen=True)
class Run:
    member: Member
    method: str
    images: int  # clean ones, given to the defender
    seed: int  # of the clean set, and of the defence

    @property
    def key(self) -> str:
        return f"{self.member.name}__{self.method.replace(' ', '_')}__{self.images}__{self.seed}"


@dataclass(frozen=True)
class Hidden:
    """What is measured on: images that no defence ever sees."""

    images: Tensor
    labels: Tensor
    stamped: Tensor | None
    target: int | Tensor

    @classmethod
    @cache
    def of(cls, member: Member) -> Hidden:
        photos, order = photo_patches(), _order()[-2000:]
        pixels, labels = photos.test_images[order], photos.test_labels[order]
        stamped = None if member.trigger is None else normalise(member.trigger(pixels))
        return cls(normalise(pixels), labels, stamped, member.target)

    def measure(self, labels_of: Callable[[Tensor], Tensor], count: int) -> dict[str, float]:
        """ACC, ASR and RA on the first `count` images, by what predicts the labels of images."""
        labels = self.labels[:count]
        right = {"acc": labels_of(self.images[:count]) == labels}
        if self.stamped is not None:
            targets = target_labels(labels, self.target)
            others = targets != labels  # the target's own images would be success for free
            predicted = labels_of(self.stamped[:count][others])
            right |= {"asr": predicted == targets[others], "ra": predicted == labels[others]}
        return {key: round(hits.float().mean().item(), 4) for key, hits in right.items()}


@cache
def _order() -> Tensor:
    count = len(photo_patches().test_labels)
    return torch.randperm(count, generator=torch.Generator().manual_seed(1))


def clean_set(images: int, seed: int) -> CleanData:
    """The defender's images; drawn from the 869 test images that nothing is measured on."""
    photos, pool = photo_patches(), _order()[:-2000]
    pool = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))]
    labels = photos.test_labels[pool]
    if images <= PER_CLASS:
        each = [(labels == c).nonzero().flatten()[: images // 10] for c in range(10)]
        chosen = pool[torch.cat(each)]
    else:
        chosen = pool[:images]
    return CleanData(normalise(photos.test_images[chosen]), photos.test_labels[chosen])


def informed_scores(
    model: nn.Module, clean: CleanData, sites: tuple[Site, ...], trigger: Trigger, method: str
) -> ChannelScores:
    """Rankings by the true trigger: how far it moves a neuron, or what would undo its effect."""

    def stamp(images: Tensor) -> Tensor:
        return normalise(trigger((images / 2 + 0.5).clamp(0, 1)))

    if method == "informed change":
        flat = 1 / (1 + activation_change(model, clean, stamp, sites))  # type: ignore[arg-type]
    else:
        masked = MaskedModel(model, sites)
        stamped = CleanData(stamp(clean.images), clean.labels)
        pull = loss_gradient(masked, stamped)
        stiffness = sensitivity(model, clean, sites, torch.Generator().manual_seed(0))
        flat = response_scores(pull, stiffness, 0.1)
    return ChannelScores(sites, flat, method)


def execute(run: Run, models: Path, out: Path) -> None:
    """Do one run and write its JSON; the scores go beside it."""
    torch.set_num_threads(1)
    row: dict[str, Any] = {**asdict(run.member), "name": run.member.name}
    row |= {"method": run.method, "images": run.images, "clean_seed": run.seed}
    model = run.member.load(models).requires_grad_(False)
    model = model.to(memory_format=torch.channels_last)  # up to twice as fast
    hidden = Hidden.of(run.member)
    row["before"] = hidden.measure(partial(predict, model), MEASURED)
    clean = clean_set(run.images, run.seed)
    start = time.process_time()
    try:
        if run.method in TUNED:
            row |= _tuned(run, model, clean, hidden)
        else:
            row |= _pruned(run, model, clean, hidden, out)
    except PurifyError as error:
        row["error"] = f"{type(error).__name__}: {error}"
    row["cpu_seconds"] = round(time.process_time() - start, 1)
    part = out / f"{run.key}.part"
    part.write_text(json.dumps(row) + "\n")
    part.replace(out / f"{run.key}.json")


def _pruned(
    run: Run, model: nn.Module, clean: CleanData, hidden: Hidden, out: Path
) -> dict[str, Any]:
    scoring, selecting, _ = clean.split(0.6, 0.25, 0.15, seed=run.seed)  # as purify does
    sites = find_sites(model, scoring.images[:2])
    start = time.process_time()
    if run.method in INFORMED:
        assert run.member.trigger is not None
        scores = informed_scores(model, scoring, sites, run.member.trigger, run.method)
    else:
        scores = criterion_of(run.method)(model, scoring, sites=sites, seed=run.seed)
    row: dict[str, Any] = {"scoring_seconds": round(time.process_time() - start, 1)}
    scores.save(out / f"{run.key}.safetensors")
    silencing = "zero" if run.method in INFORMED else criterion_of(run.method).silencing
    held_out = HeldOut(model, sites, selecting, silencing=silencing)

    def measure(selection: Selection, count: int) -> dict[str, float]:
        return hidden.measure(partial(held_out.predict, selection), count)

    row["neurons"] = len(scores.flat)
    row["target_found"] = scores.details.get("target")
    row["curve"] = [
        {"share": share, **measure(lowest(scores, round(share * len(scores.flat))), CURVE)}
        for share in SHARES
    ]
    row["selections"] = {}
    for name, selector in selectors_of(run.method).items():
        start = time.process_time()
        with private_randomness(run.seed):
            selection = selector(scores, held_out)
        seconds = round(time.process_time() - start, 1)
        row["selections"][name] = {
            "neurons": len(selection),
            "reason": selection.reason,
            "seconds": seconds,
            **measure(selection, MEASURED),
        }
        if name == "trigger":
            product, repair_rejected = _repaired(
                model, (scoring, selecting), scores, selection, run.seed
            )
            row["selections"]["trigger, repaired"] = {
                "neurons": len(selection),
                "undone": repair_rejected,
                **hidden.measure(partial(predict, product), MEASURED),
            }
    return row


def _repaired(
    model: nn.Module,
    parts: tuple[CleanData, CleanData],
    scores: ChannelScores,
    selection: Selection,
    seed: int,
) -> tuple[nn.Module, str]:
    """What `purify(..., repair="unlearn")` makes of a selection, and why it undid the repair."""
    product = copy.deepcopy(model)
    silence_(product, selection)
    if not len(selection):
        return product, ""
    found = triggers_of(scores, selection)
    return repaired(product, *parts, found, selection=selection, seed=seed, progress=False)


def _tuned(run: Run, model: nn.Module, clean: CleanData, hidden: Hidden) -> dict[str, Any]:
    """Plain fine-tuning, as BackdoorBench does it, or as a repair does it but for the trigger."""
    scoring, selecting, _ = clean.split(0.6, 0.25, 0.15, seed=run.seed)
    given = {"seed": run.seed, "progress": False}
    tuned = {
        "accuracy": fine_tune(
            model, scoring.concatenate(selecting), FineTuning(epochs=40), **given
        ),
        "as a repair": fine_tune(model, scoring, REPAIR, **given),
    }
    return {
        "selections": {
            name: {"neurons": 0, **hidden.measure(partial(predict, one.eval()), MEASURED)}
            for name, one in tuned.items()
        }
    }


def oracle(row: dict[str, Any]) -> dict[str, float]:
    """The point of the curve with the lowest ASR within the budget of ACC."""
    before = row["curve"][0]
    allowed = [p for p in row["curve"] if before["acc"] - p["acc"] <= BUDGET + 1e-9]
    best: dict[str, float] = min(allowed, key=lambda p: (p.get("asr", 0.0), p["share"]))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=Path, help="folder of the zoo's weights")
    parser.add_argument("--out", type=Path, required=True, help="folder, a JSON each run")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[*CRITERIA, *INFORMED, *TUNED],
        help="of these, or any registered name (all of these)",
    )
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="import it first: a name, or a path to a .py file; its names are methods too",
    )
    parser.add_argument("--only", nargs="+", help="networks: names, or parts of them")
    parser.add_argument("--zoo", choices=[*ZOOS], default="members", help="whose networks")
    parser.add_argument("--images", type=int, nargs="+", default=[500, PER_CLASS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start none later")
    parser.add_argument("--collect", action="store_true", help="write the file in results/")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.collect:
        which = "" if options.zoo == "members" else f"_{options.zoo}"
        collect(options.out, RESULTS / f"efficacy{which}.json")
        return
    _check_methods(parser, options)
    known = records()
    zoo = ZOOS[options.zoo]()
    zoo = [m for m in zoo if m.name in known and m.file(options.models).exists()]
    zoo = [m for m in zoo if not options.only or any(o in m.name for o in options.only)]
    runs = [
        Run(member, method, images, seed)
        for images in options.images
        for seed in options.seeds
        for member in zoo
        for method in options.methods
        if member.attack is not None or method not in INFORMED
    ]
    todo = [run for run in runs if not (options.out / f"{run.key}.json").exists()]
    end = time.monotonic() + 60 * options.minutes
    context = multiprocessing.get_context("spawn")
    with (
        tqdm(total=len(runs), initial=len(runs) - len(todo), desc="runs") as bar,
        ProcessPoolExecutor(options.workers, context, load_plugins, (options.plugin,)) as pool,
    ):
        jobs = [pool.submit(execute, run, options.models, options.out) for run in todo]
        for job in as_completed(jobs):
            job.result()
            bar.update()
            if time.monotonic() > end:  # as_completed would wait for the cancelled ones for ever
                pool.shutdown(cancel_futures=True)
                break


def _check_methods(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Import the plugins here too, so that what is wrong with a name is said before any work."""
    try:
        load_plugins(options.plugin)
        for method in options.methods:
            if method not in (*INFORMED, *TUNED):
                criterion_of(method)
    except PurifyError as error:
        parser.error(str(error))


def collect(out: Path, file: Path) -> None:
    """All runs in one file, a line each; whole curves of the first clean set only."""
    rows = [json.loads(file.read_text()) for file in sorted(out.glob("*.json"))]
    for row in rows:
        if "curve" in row and (row["images"], row["clean_seed"]) != (500, 0):
            kept = (row["curve"][0], oracle(row))
            row["curve"] = [point for point in row["curve"] if point in kept]
    file.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print(f"{len(rows)} runs")


if __name__ == "__main__":
    main()
