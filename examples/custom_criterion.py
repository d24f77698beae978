"""A criterion of your own: thirty lines, then it works everywhere by its name.

The idea: a neuron that serves the task speaks for some classes and against others, while one of a
backdoor pushes one label and little else. So measure how a neuron's effect on the logits of clean
images, by the gradient of its mask, is spread over the classes; neurons with one dominant class go
first. It was made up for this example; in our run it did not find the backdoor.

    python examples/custom_criterion.py    # about a minute on two cores
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch_pruning as tp
from _shared import parameters, parser, plant
from torch import Tensor, nn

from nnprune_backdoor import CleanData, Criterion, list_criteria, purify, register_criterion
from nnprune_backdoor.core.masks import MaskedModel
from nnprune_backdoor.core.scores import ChannelScores
from nnprune_backdoor.core.sites import Site
from nnprune_backdoor.demo import Demo
from nnprune_backdoor.importance import importance_class
from nnprune_backdoor.selectors import LowestFraction


@register_criterion("onesided")
@dataclass(frozen=True, kw_only=True)
class OneSided(Criterion):
    """Minus the largest class's share of a neuron's effect on all logits. Low scores go first."""

    reference: ClassVar[str] = "made up for an example, no paper"
    needs_labels: ClassVar[bool] = False
    cost: ClassVar[str] = "one backward pass over the images for each class"

    batch_size: int = 64

    def score(
        self,
        model: nn.Module,
        clean: CleanData,
        sites: tuple[Site, ...],
        generator: torch.Generator,
        progress: bool,
    ) -> ChannelScores:
        """Sum the effects (classes, neurons) over the batches, then compare the classes."""
        masked, weight = MaskedModel(model, sites), next(model.parameters())
        effects: Tensor | float = 0.0
        for batch in clean.batches(self.batch_size, generator):
            logits = masked(batch.images.to(weight.device, weight.dtype))
            logits = logits - logits.mean(1, keepdim=True)  # softmax depends on differences alone
            gradients = [
                torch.autograd.grad(logit, masked.masks, retain_graph=True)[0]
                for logit in logits.sum(0)
            ]
            effects = effects + torch.stack(gradients).abs()
        share = effects.amax(0) / effects.sum(0).clamp_min(1e-12)
        return ChannelScores(sites, -share.cpu(), repr(self))


def main() -> None:
    """Use it by name in `purify` and as a Torch-Pruning importance; measure both."""
    options = parser(__doc__).parse_args()
    print("criteria:", ", ".join(list_criteria()))
    given = plant(Demo(width=0.25), options)

    # as any other criterion; its fields are arguments
    purified = purify(
        given.model, given.clean, "onesided", selector=LowestFraction(0.02), batch_size=100
    )
    print(f"\n{purified.summary()}\n")

    # once it is registered, nnprune_backdoor.importance.OneSidedImportance is the same class
    importance = importance_class("onesided")
    pruned = copy.deepcopy(given.model)
    tp.pruner.BasePruner(
        pruned,
        (torch.zeros(2, 3, 32, 32),),
        importance=importance(pruned, given.clean),
        pruning_ratio=0.05,
        global_pruning=True,
        ignored_layers=[pruned.fc],
    ).step()

    for name, model in (
        ("before", given.model),
        ("purify, 2 % of the neurons", purified.model),
        ("Torch-Pruning, 5 % of the channels", pruned),
    ):
        size = f"{parameters(model):9,} parameters"
        print(f"{name:34} {size}  ACC {given.acc(model)}  ASR {given.asr(model)}")


if __name__ == "__main__":
    main()
