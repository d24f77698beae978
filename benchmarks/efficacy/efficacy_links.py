"""Where a method fails, which link of its chain broke: sections of docs/results/efficacy.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from statistics import mean
from typing import Any

from benchmarks.efficacy.efficacy import INFORMED, TUNED
from benchmarks.networks.zoo import Member
from benchmarks.render import percent

Row = dict[str, Any]

SOLVED, SOLVED_DROP = 0.2, 0.03  # ASR, and loss of ACC
LINKS = ("works", "amount", "target", "trigger", "ranking", "no cut found")
SEEDS_ARCH, SEEDS_ATTACK, SEEDS = ("resnet", "mobilenet"), ("badnets", "blended"), (0, 1, 2)
COMPARED = ("cnp", "mnp", "rnp", "anp", "tac", "random")


def place(row: Row) -> tuple[Any, ...]:
    """Network and clean set."""
    return row["name"], row["images"], row["clean_seed"]


def works(before: dict[str, float], after: dict[str, float]) -> bool:
    return after["asr"] <= SOLVED and before["acc"] - after["acc"] <= SOLVED_DROP + 1e-9


def target_of(row: Row) -> Any:
    """The label that the attack sends to."""
    return Member(**{key: row[key] for key in ("arch", "attack", "length", "seed")}).target


def has_cut(row: Row) -> bool:
    """Whether some prefix of this ranking works; the trigger says which."""
    return any(works(row["curve"][0], point) for point in row.get("curve", ()))


def link(row: Row, informed: bool, others: bool) -> str:
    """The first link that broke, of a row under its default amount.

    Args:
        informed: some prefix of a ranking by the true trigger works on this network.
        others: some prefix of any method's ranking does.
    """
    if "error" not in row and works(row["before"], row["selections"]["accuracy"]):
        return "works"
    if has_cut(row):
        return "amount"
    if row.get("target_found") not in (None, target_of(row)):
        return "target"
    if not (informed or others):
        return "no cut found"
    follows_trigger = row["method"] in ("tac", "tac change", "cnp")
    return "trigger" if follows_trigger and informed else "ranking"


def links(rows: list[Row]) -> list[str]:
    """On how many networks which link broke, a line a method."""
    informed, others = set(), set()
    for row in rows:
        if has_cut(row):
            (informed if row["method"] in INFORMED else others).add(place(row))
    found: dict[str, Counter[str]] = {}
    for row in rows:
        if row["method"] not in (*INFORMED, *TUNED):
            broke = link(row, place(row) in informed, place(row) in others)
            found.setdefault(row["method"], Counter())[broke] += 1
    lines = [f"| method | {' | '.join(LINKS)} |", "|---|" + "---|" * len(LINKS)]
    for method, counts in found.items():
        lines.append(f"| {method} | {' | '.join(str(counts[one]) for one in LINKS)} |")
    return [
        *lines,
        "",
        "By selector `accuracy`, without a repair. *works*: ASR <= 20 % for at most three points",
        "of ACC. *amount*: the ranking works at another amount. *target*: the recovered trigger",
        "leads to another label. *no cut found*: no ranking that was tried works at any amount,",
        "not even those by the true trigger, so task and backdoor seem to share neurons.",
        "*trigger*: `tac` or `cnp`, where a ranking by the true trigger works at some amount.",
        "*ranking*: all others; some other ranking works at some amount.",
    ]


def three_seeds(rows: list[Row]) -> list[str]:
    """ResNet and MobileNet, patch and full-image trigger, means over networks of three seeds."""
    columns = [(arch, attack) for arch in SEEDS_ARCH for attack in SEEDS_ATTACK]
    lines = [
        "| method | amount | " + " | ".join(f"{a} {b}" for a, b in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    pool = [
        row
        for row in rows
        if (row["arch"], row["attack"]) in columns
        and (row["length"], row["images"], row["clean_seed"]) == ("short", 500, 0)
        and row["seed"] in SEEDS
    ]

    def line(method: str, amount: str, rates: Callable[[Row], dict[str, float]]) -> str:
        mine = [row for row in pool if row["method"] == method]
        cells = [
            _over_seeds([row for row in mine if (row["arch"], row["attack"]) == column], rates)
            for column in columns
        ]
        return f"| {method if amount else 'none'} | {amount} | {' | '.join(cells)} |"

    lines.append(line(COMPARED[0], "", lambda row: row["before"]))
    for method in COMPARED:
        for amount in ("1 %", "accuracy", "trigger, repaired"):
            if any(amount in row.get("selections", {}) for row in pool if row["method"] == method):
                lines.append(line(method, amount, partial(_after, amount=amount)))
    return [
        *lines,
        "",
        "ACC, ASR (each seed), RA. `random` at 1 % silences as many neurons as the others do.",
    ]


def _after(row: Row, amount: str) -> dict[str, float]:
    rates: dict[str, float] = row["before"] if "error" in row else row["selections"][amount]
    return rates


def _over_seeds(rows: list[Row], rates: Callable[[Row], dict[str, float]]) -> str:
    some = [rates(row) for row in sorted(rows, key=lambda row: row["seed"])]
    if not some:
        return ""
    each = ", ".join(percent(one["asr"]) for one in some)
    acc, asr, ra = (percent(mean(one[key] for one in some)) for key in ("acc", "asr", "ra"))
    return f"{acc}, {asr} ({each}), {ra}"
