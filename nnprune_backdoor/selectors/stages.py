"""Prune a little, let the network recover, rank it again: the amount is where that stops paying.

Iterative pruning (Han, Pool, Tran and Dally, "Learning both Weights and Connections for Efficient
Neural Networks", NeurIPS 2015), with a backdoor criterion as the importance and the given model's
own answers as what is recovered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.agreement import Agreement
from ..core.held_out import HeldOut
from ..core.scores import ChannelScores, Selection, neurons_of
from ..errors import DataError
from ..utils.randomness import as_integer
from .base import Selector, register_selector


@register_selector("stages")
@dataclass(frozen=True)
class Stages(Selector):
    """The same small share stage by stage, as long as the distilled network gets no less alike.

    `purify` ranks the network of the last stage, silences the lowest `share` of all neurons,
    distils, and compares with the given model on clean images that were not used for either. It
    stops after the first stage whose network answers less like the given model than that of the
    stage before, and goes on with the one that is most alike.

    Attributes:
        share: Of all neurons; silenced in each stage.
        most: Largest number of stages.
    """

    share: float = 0.05
    most: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or as_integer(self.most, "most") < 1:
            raise DataError(
                f"expected a share in (0, 1) and at least one stage, got {self.share} and "
                f"{self.most}"
            )

    def __call__(self, scores: ChannelScores, held_out: HeldOut | None = None) -> Selection:
        """The first stage's neurons."""
        return self.more(scores, Selection(scores.sites, ()))

    def more(self, scores: ChannelScores, silent: Selection) -> Selection:
        """The silent neurons and the next ones of a ranking; a site's last one is skipped.

        Args:
            scores: of the network in which `silent` are silent; theirs are not looked at.
        """
        neurons, have = neurons_of(scores.sites), set(silent.neurons)
        left = {site.name: site.channels for site in scores.sites}
        for neuron in have:
            left[neuron.site] -= 1
        chosen = list(silent.neurons)
        wanted = len(chosen) + max(1, round(self.share * len(neurons)))
        for index in scores.order().tolist():
            neuron = neurons[index]
            if len(chosen) < wanted and neuron not in have and left[neuron.site] > 1:
                left[neuron.site] -= 1
                chosen.append(neuron)
        return Selection(scores.sites, tuple(chosen), f"the lowest {self.share:.2%} of the scores")

    def goes_on(self, agreements: Sequence[Agreement]) -> bool:
        """Whether another stage is worth its time, by those of the stages so far."""
        return len(agreements) < self.most and self.best(agreements) == len(agreements) - 1

    def best(self, agreements: Sequence[Agreement]) -> int:
        """The number of the stage whose network is most like the given one, from 0."""
        return min(range(len(agreements)), key=lambda stage: agreements[stage].divergence)
