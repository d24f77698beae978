"""Two threads that are in a block at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

Block = Callable[[], AbstractContextManager[None]]


def overlap(block: Block, first_out: int, inside: Callable[[int], None]) -> None:
    """Two threads are in the block at once; `inside` runs just before each of them leaves."""
    entered = [threading.Event(), threading.Event()]
    leave = [threading.Event(), threading.Event()]

    def work(number: int) -> None:
        with block():
            entered[number].set()
            assert leave[number].wait(30)
            inside(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread, event in zip(threads, entered, strict=True):
        thread.start()
        assert event.wait(30)
    for number in (first_out, 1 - first_out):
        leave[number].set()
        threads[number].join(30)
