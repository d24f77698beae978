"""Say what will be done and how long it should take, before it is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, nn

from ..utils.progress import duration, say
from ..utils.randomness import private_randomness
from .passes import Work, seconds_of
from .sites import Site


@dataclass(frozen=True)
class Plan:
    """Stages of the work, in order, and how long each should take.

    Attributes:
        seconds: Stage -> seconds; None of a stage of which this is not known.
    """

    seconds: dict[str, float | None] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        what: str,
        stages: Mapping[str, Work | None],
        model: nn.Module,
        images: Tensor,
        sites: tuple[Site, ...],
        *,
        seed: int,
        progress: bool,
        **how: Any,
    ) -> Self:
        """Time some passes, and say what will be done and how long it should take.

        Where nobody is to be told, nothing is timed. Nothing that comes later depends on it.

        Args:
            what: will be done, a line.
            **how: see `seconds_of`.
        """
        if not progress:
            return cls()
        say(what, progress)
        try:
            with private_randomness(seed):
                plan = cls(seconds_of(stages, model, images, sites, **how))
        except Exception as error:  # whatever stops the work itself will stop it with advice
            first = str(error).partition("\n")[0][:150] or type(error).__name__
            say(f"how long it takes cannot be estimated ({first})", progress)
            return cls()
        say(str(plan), progress)
        return plan

    def __str__(self) -> str:
        known = {stage: seconds for stage, seconds in self.seconds.items() if seconds is not None}
        parts = ", ".join(
            f"{stage} {duration(seconds)}" for stage, seconds in known.items() if seconds >= 0.5
        )
        unknown = [stage for stage in self.seconds if stage not in known]
        text = f"about {duration(sum(known.values()))} in all: {parts}"
        if unknown:
            text += f"; without {', '.join(unknown)}, of which it is not known"
        return text
