"""Say what will be done and how long it should take, before it is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..utils.progress import duration, say
from ..utils.randomness import private_randomness
from .passes import Expected, Work, expected
from .sites import Site


def announce(
    what: str,
    stages: Mapping[str, Work | None],
    model: nn.Module,
    images: Tensor,
    sites: tuple[Site, ...],
    *,
    seed: int,
    progress: bool,
    **how: Any,
) -> dict[str, float | None]:
    """Time some passes, and say what will be done and how long it should take.

    Where nobody is to be told, nothing is timed. Nothing that comes later depends on it.

    Args:
        what: will be done, a line.
        **how: see `expected`; so are the others.

    Returns:
        Stage -> seconds; empty where nothing was timed.
    """
    if not progress:
        return {}
    say(what, progress)
    try:
        with private_randomness(seed):
            found = expected(stages, model, images, sites, **how)
    except Exception as error:  # whatever stops the work itself will stop it with advice
        first = str(error).partition("\n")[0][:150] or type(error).__name__
        say(f"how long it takes cannot be estimated ({first})", progress)
        return {}
    say(in_words(found), progress)
    return found.seconds


def in_words(found: Expected) -> str:
    """A line: all, the stages that take a while, and what is not known."""
    parts = [
        f"{stage} {duration(seconds)}"
        for stage, seconds in found.seconds.items()
        if seconds is not None and seconds >= 0.5
    ]
    text = f"about {duration(found.total)} in all" + (f": {', '.join(parts)}" if parts else "")
    if found.longest > 1.5 * found.total:
        text += f"; up to {duration(found.longest)} if unlearning does not end by itself"
    unknown = [stage for stage, seconds in found.seconds.items() if seconds is None]
    return text + (f"; without {', '.join(unknown)}, of which it is not known" if unknown else "")
