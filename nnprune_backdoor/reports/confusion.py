"""Which labels a model takes for which, before and after: counts, and the section about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from ..core.answers import Answers
from .sections import Section, Table

_CLASSES = 20  # with more, the pairs that are confused most stand in place of a matrix
_PAIRS = 20


def confusion_of(answers: Answers) -> dict[str, Any]:
    """Counts as plain data.

    Returns:
        "before" and "after": [label, answer, images] of each pair that there is; "labelled":
        whether the images have labels, or the given model's answers stand for them.
    """
    rows = answers.before if answers.labels is None else answers.labels
    return {
        "labelled": answers.labels is not None,
        **{
            when: [[*pair, count] for pair, count in sorted(pairs.items())]
            for when, pairs in (
                ("before", _pairs(rows.tolist(), answers.before.tolist())),
                ("after", _pairs(rows.tolist(), answers.after.tolist())),
            )
        },
    }


def _pairs(rows: list[int], given: list[int]) -> Counter[tuple[int, int]]:
    return Counter(zip(rows, given, strict=True))


def confusion_section(
    confusion: dict[str, Any], classes: int, name: Callable[[int], str]
) -> Section:
    """Both matrices, or with many classes the pairs that are confused most.

    Args:
        confusion: of `confusion_of`.
        classes: number of classes of the model.
        name: of a label.
    """
    labelled = confusion["labelled"]
    counts = {
        when: {(row, answer): count for row, answer, count in confusion[when]}
        for when in ("before", "after")
    }
    total = sum(counts["after"].values())
    rows = "the labels of the images"
    if not labelled:
        rows = "the given model's own answers, since the images have no labels"
    text = f"On the {total} images that measured accuracy and agreement."
    if classes > _CLASSES:
        return Section(
            "Confusion",
            [f"{text} Beside each other: {rows}, and the answers that differ from them."],
            table=_most(counts, name, labelled),
        )
    matrices = {"Purified model": counts["after"]}
    if labelled:
        matrices = {"Model as given": counts["before"], **matrices}
    return Section(
        "Confusion",
        [f"{text} Rows: {rows}. Columns: the answers of the model in the title."],
        beside=[(title, _matrix(found, classes, name)) for title, found in matrices.items()],
    )


def _matrix(counts: dict[tuple[int, int], int], classes: int, name: Callable[[int], str]) -> Table:
    """A row for each label; the darker a cell, the larger its share of the row."""
    cells, shades = [], []
    for row in range(classes):
        found = [counts.get((row, answer), 0) for answer in range(classes)]
        most = max(1, sum(found))
        cells.append([name(row), *(str(count or "") for count in found)])
        shades.append([0, *(-(-4 * count // most) for count in found)])
    return Table("l" + "r" * classes, cells, ["", *map(str, range(classes))], shades=shades)


def _most(
    counts: dict[str, dict[tuple[int, int], int]], name: Callable[[int], str], labelled: bool
) -> Table:
    """The pairs of label and other answer with the most images, before or after."""
    wrong = {pair for found in counts.values() for pair in found if pair[0] != pair[1]}
    most = sorted(wrong, key=lambda pair: (-max(c.get(pair, 0) for c in counts.values()), pair))
    cells = [
        [name(row), name(answer), *(str(counts[when].get((row, answer), 0)) for when in shown)]
        for shown in [("before", "after") if labelled else ("after",)]
        for row, answer in most[:_PAIRS]
    ]
    head = ["label", "answer", "model as given", "purified model"]
    if not labelled:
        head = ["model as given", "purified model", "images"]
    none = ["none", *[""] * (len(head) - 1)]
    return Table("ll" + "r" * (len(head) - 2), cells or [none], head)
