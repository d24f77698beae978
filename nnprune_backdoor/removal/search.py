"""Find out which of several things can be done together, by trying."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

from .probing import OutOfTime

T = TypeVar("T")


def working_parts(
    parts: Sequence[T],
    problem: Callable[[list[T]], str],
    check_time: Callable[[], None],
) -> tuple[list[T], dict[str, list[T]]]:
    """As many of the parts as work together, halving what does not.

    Args:
        parts: independent of each other.
        problem: why some of them do not work together; empty if they do.
        check_time: raises `OutOfTime` when no more is to be tried.

    Returns:
        the parts that work, and reason -> parts that do not.
    """
    working: list[T] = []
    failures: dict[str, list[T]] = {}
    pending = [list(parts)]
    while pending:
        some = pending.pop()
        try:
            check_time()
        except OutOfTime as error:  # the parts that work can be used all the same
            failures[str(error)] = [*some, *itertools.chain(*pending)]
            break
        why = problem([*working, *some])
        if not why:
            working += some
        elif len(some) == 1:
            failures.setdefault(why, []).extend(some)
        else:
            half = len(some) // 2
            pending += [some[half:], some[:half]]
    return working, failures
