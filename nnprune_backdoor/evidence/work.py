"""What a scan sends through a network, counted from its settings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..core.passes import Task, Work
from .exposure import UNLEARNING
from .restoration import Restoration

if TYPE_CHECKING:
    from .scanning import Scan


def passes_of_scan(scan: Scan, task: Task, labels: int | None = None) -> dict[str, Work]:
    """What each stage sends through the network, where half of the labels are searched again.

    Args:
        labels: how many were asked for; None: every one.
    """
    unlearning = scan.unlearning or UNLEARNING
    stages: dict[str, Work] = {
        "exposure": (*unlearning.passes(task), task.forward(3 * task.images))
    }
    likely = task.classes if labels is None else labels
    if labels is None and task.classes > scan.screened:
        quick = task.part(min(scan.screen_images, task.images))
        stages["screening"] = scan.screen.passes(quick, likely)
        likely = scan.screened
    again = min(scan.candidates, math.ceil(likely / 2))
    more = scan.universal.passes(task, again) * (scan.starts - 1)
    stages["universal"] = (*scan.universal.passes(task, likely), *more)
    if labels is None and task.classes > scan.many:
        likely = min(likely, scan.candidates)
    stages["triggers"] = scan.search.passes(task, likely)
    stages["restoration"] = Restoration.passes(task, likely)
    return stages


def passes_of_remaining(scan: Scan, task: Task) -> Work:
    """What `Scan.remaining` sends through the network, where the label is still suspect."""
    universal = scan.universal.passes(task, 1) * scan.starts
    return (*scan.search.passes(task, 1), *Restoration.passes(task, 1), *universal)
