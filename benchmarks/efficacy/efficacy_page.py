"""docs/results/efficacy.md and its pictures, from results/efficacy.json and results/zoo.json.

python -m benchmarks.efficacy.efficacy_page
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.efficacy.efficacy import INFORMED, TUNED, oracle
from benchmarks.efficacy.efficacy_links import SOLVED, links, place, three_seeds
from benchmarks.networks.zoo import TOOK, members
from benchmarks.render import DOCS, RESULTS, percent
from nnprune_backdoor.attacks.evaluation import defense_effectiveness

Row = dict[str, Any]
Rates = dict[str, float]

FIRST = (500, 0)  # images and seed of the clean set of all tables but those that name their own
NEAR_ASR, NEAR_ACC = 0.10, 0.02  # how near a method must come to the informed reference
REPAIRED = "trigger, repaired"
# the networks on which the settings of the repair were found (docs/results/repair.md)
REPAIR_FOUND_ON = {
    f"{name}-short-0"
    for name in (
        *("mobilenet-badnets", "vit-badnets", "mobilenet-blended", "repvgg-blended"),
        *("convnext-badnets", "convnext-lowfreq", "convnext-benign", "resnet-blended"),
    )
}
SELECTORS = (
    "accuracy",
    "trigger",
    REPAIRED,
    "as a repair",
    "auto",
    "published",
    "1 %",
    "oracle",
)


def chosen(row: Row, selector: str) -> Rates | None:
    """ACC, ASR, RA under a selector; refusals leave the network as it was; None: not run."""
    if "error" in row:
        return dict(row["before"])
    if selector == "oracle":
        return oracle(row) if "curve" in row else None
    found: Rates | None = row["selections"].get(selector)
    return found


def start(row: Row, selector: str) -> Rates:
    """What to compare with: the oracle is chosen and measured on the curve's own images."""
    before: Rates = row["curve"][0] if selector == "oracle" and "curve" in row else row["before"]
    return before


def der(row: Row, selector: str) -> float:
    after, before = chosen(row, selector), start(row, selector)
    assert after is not None
    return defense_effectiveness(before["acc"], before["asr"], after["acc"], after["asr"])


def interval(values: list[float]) -> str:
    """The mean in percent with a 95 % bootstrap interval over networks."""
    draw = random.Random(0)
    means = sorted(mean(draw.choices(values, k=len(values))) for _ in range(1000))
    return f"{percent(mean(values))} [{percent(means[25])}, {percent(means[974])}]"


def table(rows: list[Row]) -> list[str]:
    """One line a method and selector, over the backdoored networks that were run."""
    lines = [
        "| method | amount by | networks | ASR | worst | ACC drop | RA | DER | refused |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, mine in by(rows, "method").items():
        for selector in SELECTORS:
            known = [row for row in mine if chosen(row, selector) is not None]
            if not known or all("error" in row for row in known):
                continue
            if not any(
                "error" in row or selector in (*row["selections"], "oracle") for row in known
            ):
                continue
            after = [chosen(row, selector) or {} for row in known]
            drops = [
                start(row, selector)["acc"] - rates["acc"]
                for row, rates in zip(known, after, strict=True)
            ]
            asr = [rates["asr"] for rates in after]
            cells = [
                method,
                selector,
                str(len(known)),
                interval(asr),
                percent(max(asr)),
                interval(drops),
                percent(mean(rates["ra"] for rates in after)),
                f"{mean(der(row, selector) for row in known):.3f}",
                str(sum("error" in row for row in known)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def rates_of(rows: list[Row], selector: str) -> list[tuple[Row, Rates]]:
    """Rows that were run with a selector, and what came out."""
    found = [(row, chosen(row, selector)) for row in rows]
    ran = any("error" in row or selector in (*row.get("selections", {}), "oracle") for row in rows)
    return [(row, rates) for row, rates in found if rates is not None] if ran else []


def solved(some: list[tuple[Row, Rates]], asr: float, drop: float, selector: str) -> int:
    """On how many networks ASR is down to a level, for at most so much ACC."""
    return sum(
        rates["asr"] <= asr and start(row, selector)["acc"] - rates["acc"] <= drop + 1e-9
        for row, rates in some
    )


def variants(rows: list[Row]) -> list[tuple[str, str, list[tuple[Row, Rates]]]]:
    """Name, selector and outcomes: each method by default, and repaired where that was tried."""
    found = []
    for method, mine in by(rows, "method").items():
        name = f"{method} (knows the trigger)" if method in INFORMED else method
        for selector in ("accuracy", REPAIRED):
            some = rates_of(mine, selector)
            if some and not all("error" in row for row, _ in some):
                label = name if selector == "accuracy" else f"{name}, {REPAIRED}"
                found.append((label, selector, some))
    return found


def works(rows: list[Row]) -> list[str]:
    """How many networks are purified: ASR down to a level, at most so much ACC lost."""
    lines = [
        "| method | ASR <= 10 %, 2 points | <= 20 %, 3 points | same, oracle | by architecture |",
        "|---|---|---|---|---|",
    ]
    for name, selector, some in variants(rows):
        each = [
            f"{arch} {solved(mine, SOLVED, 0.03, selector)}/{len(mine)}"
            for arch in by(rows, "arch")
            if (mine := [pair for pair in some if pair[0]["arch"] == arch])
        ]
        best = rates_of([row for row, _ in some], "oracle") if selector == "accuracy" else []
        cells = [
            name,
            f"{solved(some, 0.1, 0.02, selector)} of {len(some)}",
            f"{solved(some, SOLVED, 0.03, selector)} of {len(some)}",
            f"{solved(best, SOLVED, 0.03, 'oracle')} of {len(best)}" if best else "",
            ", ".join(each),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def brief(rows: list[Row]) -> list[str]:
    """One line a method: the default amount, and repaired."""
    lines = [
        "| method | networks | mean ASR | mean ACC drop | mean RA | ASR <= 20 % for <= 3 points |",
        "|---|---|---|---|---|---|",
    ]
    for name, selector, some in variants(rows):
        cells = [
            name,
            str(len(some)),
            percent(mean(rates["asr"] for _, rates in some)),
            percent(mean(row["before"]["acc"] - rates["acc"] for row, rates in some)),
            percent(mean(rates["ra"] for _, rates in some)),
            str(solved(some, SOLVED, 0.03, selector)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def unseen(rows: list[Row]) -> list[str]:
    """As `brief`, without the networks on which the settings of the repair were found."""
    return brief([row for row in rows if row["name"] not in REPAIR_FOUND_ON])


def each(rows: list[Row]) -> list[str]:
    """ACC, ASR and RA of each network before and after pruning, and after the repair."""
    lines = ["| network | method | before | pruned | repaired |", "|---|---|---|---|---|"]
    for row in rows:
        repaired = row.get("selections", {}).get(REPAIRED)
        if repaired is None or "asr" not in repaired:
            continue
        stages = (row["before"], row["selections"]["trigger"], repaired)
        cells = [", ".join(percent(one[key]) for key in ("acc", "asr", "ra")) for one in stages]
        note = " (repair rejected)" if repaired.get("undone") else ""
        star = " *" if row["name"] in REPAIR_FOUND_ON else ""
        lines.append(f"| {row['name']}{star} | {row['method']} | {' | '.join(cells)}{note} |")
    return [*lines, "", "*: one of the networks on which the settings of the repair were found."]


def by(rows: Iterable[Row], key: str) -> dict[Any, list[Row]]:
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found


def reference(rows: list[Row]) -> dict[tuple[Any, ...], Rates]:
    """Network and clean set -> the better of the informed rankings at its oracle amount."""
    found: dict[tuple[Any, ...], Rates] = {}
    for row in rows:
        if row["method"] in INFORMED and "curve" in row:
            point = oracle(row)
            best = found.get(place(row))
            if best is None or point["asr"] < best["asr"]:
                found[place(row)] = point
    return found


def near(rows: list[Row]) -> list[str]:
    """How often a method comes near what the trigger itself would have told."""
    best = reference(rows)
    lines = [
        "| method | selector `accuracy` | oracle amount | oracle less selector (DER) |",
        "|---|---|---|---|",
    ]
    for method, mine in by(rows, "method").items():
        known = [
            row for row in mine if place(row) in best and "accuracy" in row.get("selections", {})
        ]
        if method in INFORMED or method in TUNED or not known:
            continue

        def share(selector: str, known: list[Row] = known) -> str:
            hits = 0
            for row in known:
                rates, goal = chosen(row, selector), best[place(row)]
                assert rates is not None
                hits += (
                    rates["asr"] <= goal["asr"] + NEAR_ASR
                    and rates["acc"] >= goal["acc"] - NEAR_ACC
                )
            return f"{hits} of {len(known)}"

        gap = mean(der(row, "oracle") - der(row, "accuracy") for row in known)
        lines.append(f"| {method} | {share('accuracy')} | {share('oracle')} | {gap:+.3f} |")
    return lines


def unsolved(rows: list[Row]) -> list[str]:
    """Networks on which no method's ranking has an amount that works."""
    lines = ["| network | best method | its ASR | informed ASR |", "|---|---|---|---|"]
    best = reference(rows)
    for key, mine in by([{**row, "place": place(row)} for row in rows], "place").items():
        tried = [row for row in mine if "curve" in row and row["method"] not in INFORMED]
        if not tried:
            continue
        top = min(tried, key=lambda row: oracle(row)["asr"])
        if oracle(top)["asr"] > SOLVED:
            goal = percent(best[key]["asr"]) if key in best else ""
            lines.append(f"| {key[0]} | {top['method']} | {percent(oracle(top)['asr'])} | {goal} |")
    return lines if len(lines) > 2 else ["None."]


def benign(rows: list[Row]) -> list[str]:
    lines = [
        "| method | amount by | networks | pruned anything | ACC drop | worst |",
        "|---|---|---|---|---|---|",
    ]
    for method, mine in by(rows, "method").items():
        for selector in ("accuracy", "trigger", REPAIRED, "as a repair", "auto", "1 %"):
            known = [row for row in mine if selector in row.get("selections", {})]
            if not known:
                continue
            drops = [row["before"]["acc"] - row["selections"][selector]["acc"] for row in known]
            cut = sum(row["selections"][selector]["neurons"] > 0 for row in known)
            cells = [method, selector, str(len(known)), str(cut), interval(drops)]
            lines.append(f"| {' | '.join(cells)} | {percent(max(drops))} |")
    return lines


def seconds(rows: list[Row]) -> list[str]:
    lines = ["| method | " + " | ".join(by(rows, "arch")) + " |"]
    lines.append("|---|" + "---|" * len(by(rows, "arch")))
    for method, mine in by(rows, "method").items():
        cells = [
            f"{mean(times):.0f}"
            if (times := [r["scoring_seconds"] for r in some if "curve" in r])
            else ""
            for some in ([row for row in mine if row["arch"] == arch] for arch in by(rows, "arch"))
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def heat(rows: list[Row], selector: str, path: Path) -> None:
    """ASR after each method, over attacks and architectures."""
    methods = [m for m in by(rows, "method") if m not in TUNED]
    columns = sorted({(row["attack"], row["arch"]) for row in rows})
    figure = Figure(
        figsize=(2 + 0.32 * len(columns), 1.8 + 0.34 * len(methods)), layout="constrained"
    )
    axis = figure.subplots()
    cells = [[_cell(rows, method, column, selector) for column in columns] for method in methods]
    image = axis.imshow(cells, vmin=0, vmax=1, cmap="viridis_r", aspect="auto")
    axis.set_xticks(range(len(columns)), [f"{a} {b}" for a, b in columns], rotation=90, fontsize=7)
    axis.set_yticks(range(len(methods)), methods, fontsize=8)
    for y, line in enumerate(cells):
        for x, value in enumerate(line):
            if not math.isnan(value):
                colour = "white" if value > 0.5 else "black"
                text = f"{100 * value:.0f}"
                axis.text(x, y, text, ha="center", va="center", fontsize=6, color=colour)
    figure.colorbar(image, label="ASR")
    axis.set_title(f"ASR, amount by {selector}", fontsize=9)
    figure.savefig(path, dpi=110)


def _cell(rows: list[Row], method: str, column: tuple[str, str], selector: str) -> float:
    found = [
        rates["asr"]
        for row in rows
        if row["method"] == method and (row["attack"], row["arch"]) == column
        if (rates := chosen(row, selector)) is not None
    ]
    return mean(found) if found else float("nan")


def curves(rows: list[Row], path: Path) -> None:
    """Mean ASR and ACC against the share of neurons silenced, a line a method."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method, mine in by([row for row in rows if "curve" in row], "method").items():
        shares = [100 * point["share"] for point in mine[0]["curve"]]
        style = "--" if method in INFORMED else ":" if method == "random" else "-"
        for axis, key in ((left, "asr"), (right, "acc")):
            points = zip(*(row["curve"] for row in mine), strict=True)
            axis.plot(shares, [mean(p[key] for p in some) for some in points], style, label=method)
    for axis, name in ((left, "ASR"), (right, "ACC")):
        axis.set_xscale("symlog", linthresh=0.5)
        axis.set_xlabel("neurons silenced, %")
        axis.set_ylabel(f"mean {name}")
        axis.set_ylim(0, 1.02)
    right.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def by_set(rows: list[Row]) -> dict[tuple[int, int], list[Row]]:
    """(images, seed of the clean set) -> its rows, the first set first; none that is not whole."""
    found = by([{**row, "set": (row["images"], row["clean_seed"])} for row in rows], "set")
    wanted = {(row["name"], row["method"]) for row in found[FIRST]}
    whole = {
        key: some
        for key, some in found.items()
        if {(row["name"], row["method"]) for row in some} >= wanted
    }
    return dict(sorted(whole.items(), key=lambda item: (-item[0][0], item[0][1])))


def sets(rows: list[Row]) -> list[str]:
    """What each method achieves with each clean set: by default, repaired, and by the oracle."""
    tables = {
        key: {
            **{name: (selector, some) for name, selector, some in variants(mine)},
            **{
                f"{method}, oracle": ("oracle", rates_of(some, "oracle"))
                for method, some in by(mine, "method").items()
                if any("curve" in row for row in some)
            },
        }
        for key, mine in by_set(rows).items()
    }
    head = [f"{images} images, set {seed}" for images, seed in tables]
    lines = [f"| method | {' | '.join(head)} |", "|---|" + "---|" * len(head)]
    for name in tables[FIRST]:
        cells = []
        for table in tables.values():
            selector, some = table[name]
            drop = mean(start(row, selector)["acc"] - rates["acc"] for row, rates in some)
            asr, ra = (percent(mean(rates[key] for _, rates in some)) for key in ("asr", "ra"))
            gained = mean(der(row, selector) for row, _ in some)
            count = solved(some, SOLVED, 0.03, selector)
            cells.append(f"{count}; {asr}, {percent(drop)}, {ra}, {gained:.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [
        f"Networks of {len(tables[FIRST]['tac'][1])} with ASR <= 20 % for <= 3 points of ACC; then "
        "means: ASR, ACC drop, RA, DER. 100 images are ten a class.",
        "",
        *lines,
    ]


def near_by_set(rows: list[Row]) -> list[str]:
    """How many networks each method takes near the informed reference, set by set."""
    lines: list[str] = []
    for (images, seed), mine in by_set(rows).items():
        lines += ["", f"{images} images, set {seed}:", "", *near(mine)]
    return lines[1:]


def benign_sets(rows: list[Row]) -> list[str]:
    """Mean and worst loss of benign networks with each clean set."""
    sets = by_set(rows)
    head = [f"{images} images, set {seed}" for images, seed in sets]
    lines = [f"| method | amount by | {' | '.join(head)} |", "|---|---|" + "---|" * len(head)]
    for method, mine in by(sets[FIRST], "method").items():
        for selector in ("accuracy", REPAIRED):
            if not any(selector in row.get("selections", {}) for row in mine):
                continue
            cells = []
            for some in sets.values():
                known = [
                    row
                    for row in some
                    if row["method"] == method and selector in row.get("selections", {})
                ]
                drops = [r["before"]["acc"] - r["selections"][selector]["acc"] for r in known]
                cut = sum(row["selections"][selector]["neurons"] > 0 for row in known)
                worst = percent(max(drops))
                cells.append(f"{cut} of {len(known)}; {percent(mean(drops))}, {worst}")
            lines.append(f"| {method} | {selector} | {' | '.join(cells)} |")
    return ["Networks that lost neurons; then ACC drop: mean, worst.", "", *lines]


def zoo(records: dict[str, Row]) -> list[str]:
    lines = ["| network | ACC | ASR | RA | CPU seconds |", "|---|---|---|---|---|"]
    for name, row in records.items():
        rates = [percent(row[key]) if key in row else "" for key in ("acc", "asr", "ra")]
        note = "" if row.get("asr", 1) >= TOOK else " (did not take, left out)"
        lines.append(f"| {name}{note} | {' | '.join(rates)} | {row['cpu_seconds']} |")
    return lines


def cost(rows: list[Row], records: dict[str, Row]) -> str:
    """In minutes of one thread, as noted when it was made."""
    train = sum(record["cpu_seconds"] for record in records.values()) / 60
    runs = sum(row["cpu_seconds"] for row in rows) / 60
    return f"about {train:.0f} CPU minutes to train the zoo, {runs:.0f} for the runs."


def page(everything: list[Row], records: dict[str, Row], finding: str) -> str:
    rows = by_set(everything)[FIRST]
    poisoned = [row for row in rows if row["attack"] is not None]
    names = len(by(poisoned, "name"))
    innocent = [row for row in rows if row["attack"] is None]
    attacked = [row for row in everything if row["attack"] is not None]
    others = [row for row in everything if row["attack"] is None]
    parts: list[tuple[str, Callable[[], list[str]]]] = [
        ("How often it works, by default and repaired", lambda: works(poisoned)),
        ("Every method, by default and repaired", lambda: brief(poisoned)),
        ("Where the repair's settings were not found", lambda: unseen(poisoned)),
        ("With other clean images, and with ten a class", lambda: sets(attacked)),
        ("Each network, repaired", lambda: each(poisoned)),
        ("Every method, every selector", lambda: table(poisoned)),
        ("Against the informed reference", lambda: near_by_set(attacked)),
        ("Where the default call fails", lambda: links(poisoned)),
        ("Networks that no ranking solves", lambda: unsolved(poisoned)),
        ("Two architectures, two attacks, three seeds", lambda: three_seeds(poisoned)),
        ("Benign networks", lambda: benign(innocent)),
        ("Benign networks, other clean images", lambda: benign_sets(others)),
        ("CPU seconds of scoring", lambda: seconds(rows)),
        ("The zoo", lambda: zoo(records)),
    ]
    lines = [
        "# Efficacy: every method on every network of the zoo",
        "",
        finding.strip(),
        "",
        "## How to read the tables",
        "",
        f"{names} backdoored and {len(by(innocent, 'name'))} benign networks; 500 clean images,",
        "set 0, unless another set is named. All rates are percentages: means over networks, with",
        "95 % bootstrap intervals, measured on 1,000 images that no defence sees (the oracle and",
        "the curves on 500 of them). *oracle*: the amount with the lowest ASR within two points of",
        "ACC; only somebody who has the trigger can choose it. *informed*: rankings by the true",
        "trigger. Where a method refuses a network, the network counts as unchanged.",
        f"`bash benchmarks/reproduce.sh DIR` makes all of it: {cost(everything, records)}",
        "",
        "![ASR by attack and architecture, selector `accuracy`](efficacy_accuracy.png)",
        "![ASR by attack and architecture, oracle amount](efficacy_oracle.png)",
        "![ASR and ACC against the amount](efficacy_curves.png)",
    ]
    for title, part in parts:
        lines += ["", f"## {title}", "", *part()]
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = json.loads((RESULTS / "efficacy.json").read_text())
    usual = {member.name for member in members()}  # the others are diagnosis.py's
    records = {
        name: record
        for name, record in json.loads((RESULTS / "zoo.json").read_text()).items()
        if name in usual
    }
    finding = (RESULTS / "efficacy_finding.md").read_text()
    (DOCS / "efficacy.md").write_text(page(rows, records, finding))
    poisoned = [row for row in by_set(rows)[FIRST] if row["attack"] is not None]
    for selector in ("accuracy", "oracle"):
        heat(poisoned, selector, DOCS / f"efficacy_{selector}.png")
    curves(poisoned, DOCS / "efficacy_curves.png")


if __name__ == "__main__":
    main()
