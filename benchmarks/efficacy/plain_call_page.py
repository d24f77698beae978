"""Render results/plain_call.json: python -m benchmarks.efficacy.plain_call_page

docs/results/distilling.md, between its marks, and the table in README.
"""

from __future__ import annotations

import json
from statistics import mean
from typing import Any

from benchmarks.efficacy.plain_call import CONTROLS, METHODS, RESULT
from benchmarks.render import DOCS, README, fill, percent

PAGE = DOCS / "distilling.md"
# named before any of them was trained or seen by the call as it is now
HELD_OUT = (
    "repvgg-badnets-short-2",
    "repvgg-blended-short-2",
    "resnet-badnets-short-1",
    "resnet-blended-short-1",
    "resnet-warp-short-0",
    "mobilenet-badnets-short-1",
    "mobilenet-sample_specific-short-0",
    "convnext-blended-short-0",
    "convnext-lowfreq-short-0",
    "vit-adaptive_blend-short-0",
    "resnet10t-badnets-short-1",
    "resnet10t-blended-short-1",
    "regnet-badnets-short-1",
    "regnet-blended-short-1",
    "densenet-badnets-short-1",
    "densenet-blended-short-1",
    "resnet10t-benign-short-1",
    "regnet-benign-short-1",
    "densenet-benign-short-1",
    "mobilenet-benign-short-1",
    "convnext-benign-short-1",
    "vit-benign-short-0",
)
# settings were chosen with these in sight
DEVELOPMENT = (
    "resnet-badnets-short-0",
    "resnet-blended-short-0",
    "resnet-benign-short-0",
    "convnext-badnets-short-0",
    "convnext-benign-short-0",
    "mobilenet-badnets-short-0",
    "vit-badnets-short-0",
    "vit-blended-short-0",
    "wideresnet-badnets-0",
    # since perturbations of single images, and from which share on a label stands out
    "mobilenet-benign-short-0",
    "mobilenet-blended-short-0",
    "repvgg-adaptive_blend-short-0",
    "repvgg-all_to_all-short-0",
    "repvgg-badnets-short-0",
    "repvgg-benign-short-0",
    "repvgg-blended-short-0",
    "repvgg-blended-short-1",
    "repvgg-lowfreq-short-0",
    "repvgg-sample_specific-short-0",
    "repvgg-warp-short-0",
    "vit-lowfreq-short-0",
    "vit-sample_specific-short-0",
    # since radii that suit the network, and labels far from single images
    "vgg_elu-badnets-0",
    "repvgg-sig-short-0",
    "resnet-sig-short-0",
)
PURIFIED = (0.1, 0.015)  # ASR at most, for at most so much accuracy
Row = dict[str, Any]


def backdoored(row: Row) -> bool:
    return "asr" in row["before"]


def drop(row: Row) -> float:
    return float(row["before"]["acc"] - row["after"]["acc"])


def good(row: Row) -> bool:
    return bool(row["after"]["asr"] <= PURIFIED[0] and drop(row) <= PURIFIED[1])


def means(rows: list[Row], name: str) -> str:
    """One line: the row's means over backdoored networks, and over benign ones."""
    mine = [row for row in rows if row["row"] == name]
    done = [row for row in mine if "after" in row]
    attacked, benign = [r for r in done if backdoored(r)], [r for r in done if not backdoored(r)]
    cells = [name, str(len(attacked))]
    if attacked:
        worst = max(row["after"]["asr"] for row in attacked)
        cells += [percent(mean(row["after"]["asr"] for row in attacked)), percent(worst)]
        cells += [percent(mean(map(drop, attacked)))]
        cells += [f"{sum(map(good, attacked))} of {len(attacked)}"]
    else:
        cells += [""] * 4
    cells += [percent(mean(map(drop, benign))) if benign else "", str(len(benign))]
    refused = len(mine) - len(done)
    return f"| {' | '.join(cells)} |" + (f" {refused} refused" if refused else "")


def table(rows: list[Row], names: list[str]) -> str:
    head = "| call | networks | ASR | worst | ACC lost | purified | benign: ACC lost | networks |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    present = {row["row"] for row in rows}
    return "\n".join(lines + [means(rows, name) for name in names if name in present])


def beside(rows: list[Row]) -> str:
    """`rnp` and its controls, on the backdoored networks that have them: ACC / ASR.

    A network that was trained again is another one, and is not set beside the old one's controls.
    """
    names = ["rnp", "random", "distilling alone"]
    found = {(row["network"], row["row"]): row for row in rows if backdoored(row)}
    lines = ["| network | as given | " + " | ".join(names) + " |", "|---|---|---|---|---|"]
    for network in sorted({network for network, name in found if name in names[1:]}):
        given = found[network, "rnp"]["before"]
        of_it = [name for name in names if found.get((network, name), {}).get("before") == given]
        if of_it == ["rnp"]:
            continue
        cells = [f"{percent(given['acc'])} / {percent(given['asr'])}"]
        for name in names:
            after = found[network, name].get("after") if name in of_it else None
            cells.append(f"{percent(after['acc'])} / {percent(after['asr'])}" if after else "")
        lines.append(f"| {network} | {' | '.join(cells)} |")
    return "\n".join(lines)


def each(rows: list[Row]) -> str:
    lines = [
        "| network | images | ACC | ASR | RA | CPU seconds | code |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["row"] != "rnp":
            continue
        cells = [row["network"], str(row["images"])]
        if "after" not in row:
            cells += [f"refused: {row['refused']}", "", ""]
        else:
            for name in ("acc", "asr", "ra"):
                pair = [
                    percent(row[when][name]) for when in ("before", "after") if name in row[when]
                ]
                cells.append(" → ".join(pair))
        lines.append(f"| {' | '.join(cells)} | {row['cpu_seconds']} | {row['commit']} |")
    return "\n".join(lines)


def main() -> None:
    rows = json.loads(RESULT.read_text())
    full = [row for row in rows if row["images"] == 500]
    chosen = [row for row in full if row["network"] in DEVELOPMENT]
    others = [row for row in full if row["network"] in HELD_OUT]
    names = [*METHODS, *CONTROLS]
    fill(PAGE, "others", table(others, names))
    fill(PAGE, "development", table(chosen, names))
    fill(PAGE, "networks", each(rows))
    fill(PAGE, "controls", beside(full))
    attacked = [row for row in others if row["row"] == "rnp" and backdoored(row) and "after" in row]
    before = mean(row["before"]["asr"] for row in attacked)
    acc = mean(row["before"]["acc"] for row in attacked)
    head = f"{len(attacked)} backdoored networks, means in %"
    lines = [
        f"| {head} | attack success | accuracy | purified |",
        "|---|---|---|---|",
        f"| as given | {percent(before)} | {percent(acc)} | |",
        f'| `method="rnp"` | {percent(mean(row["after"]["asr"] for row in attacked))} | '
        f"{percent(mean(row['after']['acc'] for row in attacked))} | "
        f"{sum(map(good, attacked))} of {len(attacked)} |",
    ]
    fill(README, "plain_call", "\n".join(lines))


if __name__ == "__main__":
    main()
