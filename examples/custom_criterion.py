"""A criterion of your own: thirty lines, then it works everywhere by its name.

The idea here: a neuron that serves the task speaks for some classes and against others, a
backdoor's pushes one label and little else. So look at how the gradient of each logit by a
neuron's mask, on clean images, is spread over the classes; one-sided neurons go first. It was made
up for this example. `purify` uses it, then a Torch-Pruning pruner does, and the last lines say
whether it is any good as a defence (in our run it was not). Needs the extra `demo`.

    python examples/custom_criterion.py            # about a minute on two cores
    python examples/custom_criterion.py --quick    # a network that has learned little
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch_pruning as tp
from torch import Tensor, nn

from nnprune_backdoor import CleanData, Criterion, list_criteria, purify, register_criterion
from nnprune_backdoor.attacks import create_attack, photo_patches
from nnprune_backdoor.attacks.evaluation import accuracy, attack_success
from nnprune_backdoor.core.masks import MaskedModel
from nnprune_backdoor.core.scores import ChannelScores
from nnprune_backdoor.core.sites import Site
from nnprune_backdoor.demo import Demo, normalise
from nnprune_backdoor.importance import importance_class
from nnprune_backdoor.selectors import LowestFraction


@register_criterion("onesided")
@dataclass(frozen=True, kw_only=True)
class OneSided(Criterion):
    """Minus the largest class's share of a neuron's effect on all logits: low = one-sided."""

    reference: ClassVar[str] = "made up for an example, no paper"
    needs_labels: ClassVar[bool] = False
    cost: ClassVar[str] = "one backward pass a class over the images"

    batch_size: int = 64

    def score(
        self,
        model: nn.Module,
        clean: CleanData,
        sites: tuple[Site, ...],
        generator: torch.Generator,
        progress: bool,
    ) -> ChannelScores:
        """Effects (classes, neurons), summed over the images as they come."""
        masked, weight = MaskedModel(model, sites), next(model.parameters())
        effects: Tensor | float = 0.0
        for batch in clean.batches(self.batch_size, generator):
            logits = masked(batch.images.to(weight.device, weight.dtype))
            logits = logits - logits.mean(1, keepdim=True)  # softmax sees differences alone
            grads = [
                torch.autograd.grad(logit, masked.masks, retain_graph=True)[0]
                for logit in logits.sum(0)
            ]
            effects = effects + torch.stack(grads).abs()
        share = effects.amax(0) / effects.sum(0).clamp_min(1e-12)
        return ChannelScores(sites, -share.cpu(), repr(self))


def main(arguments: list[str] | None = None) -> None:
    """Use it by name in `purify`, then as an importance; measure both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="so young that nothing is learned")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    print("criteria:", ", ".join(list_criteria()))

    demo = Demo(width=0.25, seed=options.seed)
    if options.quick:
        demo = replace(demo, epochs=1, images=640)
    photos = photo_patches()
    model = demo.train(photos, progress=True)
    order = torch.randperm(len(photos.test_labels), generator=torch.Generator().manual_seed(1))
    given, hidden = order[:500], order[500 : 700 if options.quick else None]
    clean = CleanData(normalise(photos.test_images[given]), photos.test_labels[given])

    # by name, as any other; a setting of the criterion is an argument
    purified = purify(
        model, clean, "onesided", selector=LowestFraction(0.02), batch_size=100, seed=options.seed
    )
    print(f"\n{purified.summary()}\n")

    # also nnprune_backdoor.importance.OneSidedImportance, once the class is registered
    importance = importance_class("onesided")
    cut = copy.deepcopy(model)
    tp.pruner.BasePruner(
        cut,
        (torch.zeros(2, 3, 32, 32),),
        importance=importance(cut, clean, seed=options.seed),
        pruning_ratio=0.05,
        global_pruning=True,
        ignored_layers=[cut.fc],
    ).step()

    pixels, labels = photos.test_images[hidden], photos.test_labels[hidden]
    triggered = create_attack(demo.attack)(pixels)
    for name, each in (
        ("as it was", model),
        ("purified, 2 % of the neurons", purified.model),
        ("Torch-Pruning, 5 % of the channels", cut),
    ):
        attack = attack_success(each, normalise(triggered), labels, demo.target)
        acc = accuracy(each, normalise(pixels), labels)
        size = sum(weight.numel() for weight in each.parameters())
        print(f"{name:34}  {size:9,} parameters  ACC {acc}  ASR {attack.asr}")


if __name__ == "__main__":
    main()
