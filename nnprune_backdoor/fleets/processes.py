"""An executor of processes in which one that dies takes nothing with it but its own task."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Processes(Executor):
    """So many pools of one process each, since all tasks of a larger pool fail if one process dies.

    A task whose process dies raises BrokenProcessPool; the next has a new process. All of them end
    when this process does, however it ends.

    Args:
        workers: number of processes.
    """

    def __init__(self, workers: int) -> None:
        self._threads = ThreadPoolExecutor(workers)  # each waits for the answer of its process
        self._own = threading.local()
        self._pools: list[tuple[ProcessPoolExecutor, Connection]] = []

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """As of every executor; `fn` and its arguments are pickled."""
        return self._threads.submit(self._asked, fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As of every executor; with `cancel_futures` the processes end at once."""
        if cancel_futures:
            self._threads.shutdown(wait=False, cancel_futures=True)
            for _, lifeline in self._pools:
                lifeline.close()
        self._threads.shutdown(wait=wait, cancel_futures=cancel_futures)
        for pool, lifeline in self._pools:
            pool.shutdown(wait=wait)
            lifeline.close()

    def _asked(self, fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
        try:
            return self._pool().submit(fn, *args, **kwargs).result()
        except BrokenProcessPool:
            self._own.pool = None
            raise

    def _pool(self) -> ProcessPoolExecutor:
        """This thread's pool of one process."""
        pool: ProcessPoolExecutor | None = getattr(self._own, "pool", None)
        if pool is None:
            # spawned: a process that torch has run threads in cannot be forked safely
            context = multiprocessing.get_context("spawn")
            theirs, lifeline = context.Pipe(duplex=False)
            pool = ProcessPoolExecutor(1, context, initializer=_begin, initargs=(theirs,))
            self._own.pool = pool
            self._pools.append((pool, lifeline))
        return pool


def _begin(lifeline: Connection) -> None:
    """In a new process: end at Ctrl-C without a traceback, and when the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()


def _end_with(lifeline: Connection) -> None:
    lifeline.poll(None)  # nothing is ever sent, so this returns when the other end is closed
    os._exit(1)
