"""Give up work that takes too long, in any thread."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

from ..errors import UnsupportedModelError

_T = TypeVar("_T")


class _TimeIsUp(BaseException):
    """Not an Exception, so that a model's own `except Exception` lets it through."""


def within(seconds: float | None, doing: str, work: Callable[[], _T]) -> _T:
    """What `work` returns, if it does so in `seconds` of wall time; works in every thread.

    An alarm signal would be simpler, but it works in the main thread only, not on Windows, and
    takes the alarm away from whoever else uses it (pytest-timeout does). A function and not a
    context manager, because an interrupt could strike between `with` and the first line inside.

    Args:
        seconds: None for no limit. A long call into compiled code is interrupted when it returns.
        doing: what the message says was given up.

    Raises:
        UnsupportedModelError: time was up.
    """
    if seconds is None:
        return work()
    caller = ctypes.c_ulong(threading.get_ident())
    interrupt = ctypes.pythonapi.PyThreadState_SetAsyncExc
    done = threading.Event()

    def watch() -> None:
        wait = seconds
        while not done.wait(wait):
            interrupt(caller, ctypes.py_object(_TimeIsUp))
            wait = 1.0  # again, should a bare except have swallowed it

    watchdog = threading.Thread(target=watch, daemon=True)

    def call_off() -> None:
        done.set()
        if watchdog.is_alive():
            watchdog.join()
        interrupt(caller, None)  # one that is set and not yet raised

    try:
        try:
            watchdog.start()
            return work()
        finally:
            call_off()
    except _TimeIsUp:
        call_off()  # the interrupt may have struck while it was being called off
        raise UnsupportedModelError(
            f"{doing} took longer than {seconds:g} s and was given up"
        ) from None
