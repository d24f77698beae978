"""Progress bars: on when asked for and the output is a terminal, silent otherwise; and a clock."""

from __future__ import annotations

import time
from typing import Any

from tqdm.auto import tqdm


def progress_bar(total: int, description: str, progress: bool) -> tqdm[Any]:
    """A bar of `total` steps on standard error, to be used in a `with` block."""
    # tqdm: None disables the bar when the output is no terminal, True always does
    return tqdm(total=total, desc=description, disable=None if progress else True, leave=False)


class Clock:
    """Wall seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage] = now - self._last
        self._last = now
