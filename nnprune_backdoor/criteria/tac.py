"""Trigger-activated change (TAC) under a recovered trigger.

Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE
S&P 2019, recover a trigger from clean images and prune the neurons that it moves; Zheng, Tang, Li
and Liu, "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022, call that movement
TAC and measure it at every channel. Recover the smallest trigger (`inversion.py`), stamp it on
clean images, and ask which neurons it works through.

`TAC.paper()` asks by how much each neuron moves. The default asks, in one gradient, which neurons
must be silent for stamped images to get their own labels back, and weighs that against what the
neuron is worth to clean images (`response.py`); docs/inversion.md has both in numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from ..data import CleanData, like
from ..errors import DataError, ScoringError
from ..inversion import Inversion, PixelRange, RecoveredTrigger, TargetEvidence, predict_labels
from ..masking import MaskedModel
from ..scores import ChannelScores, Site
from .base import Criterion, register_criterion
from .response import loss_gradient, response_scores, sensitivity


@register_criterion("tac")
@dataclass(frozen=True, kw_only=True)
class TAC(Criterion):
    """Neurons through which a recovered trigger works: low = backdoor.

    Scores by "unlearn" lie in (0, 2), 1 meaning that silencing the neuron does nothing for stamped
    images; those by "change" in (0, 1], 1 meaning that the trigger does not move it. Wherever the
    methods speak of labels, the model's own predictions serve.
    """

    reference: ClassVar[str] = "Wang et al., Neural Cleanse, IEEE S&P 2019; Zheng et al., ECCV 2022"
    needs_labels: ClassVar[bool] = False

    target: int | None = None  # the attacker's label; None: that of the smallest trigger
    mean: tuple[float, ...] | None = None  # of the normalisation; None: the valid range of pixels
    std: tuple[float, ...] | None = None  # ... is the one seen in the clean images
    ranking: Literal["unlearn", "change"] = "unlearn"  # paper: change

    search_steps: int = 150  # inversion of every label, to find the target
    search_batch: int = 16
    steps: int = 200  # inversion of the target
    batch_size: int = 32
    min_success: float = 0.75  # of a trigger on held-out images, below which it is not believed

    damping: float = 0.1  # unlearn: share of the mean clean sensitivity added to each neuron's
    probe_size: int = 20  # unlearn: images a gradient of the clean sensitivity

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise DataError("expected both mean and std of the normalisation, or neither")

    @classmethod
    def paper(cls) -> Self:
        """Neural Cleanse's rule, carried from the last layer to all sites, as CLP's authors do.

        For Neural Cleanse itself give the last site alone as `sites`.
        """
        return cls(ranking="change", steps=1000)

    def score(
        self,
        model: nn.Module,
        clean: CleanData,
        sites: tuple[Site, ...],
        generator: torch.Generator,
        progress: bool,
    ) -> ChannelScores:
        """Find the target, recover its trigger, rank by what the trigger needs or moves."""
        own = CleanData(clean.images, predict_labels(model, clean.images))
        trigger, details = self.recover(model, own, generator, progress)
        elsewhere = own.take((own.targets != trigger.target).nonzero().flatten())
        if self.ranking == "change":
            flat = 1 / (1 + activation_change(model, elsewhere, trigger, sites))
        else:
            stamped = CleanData(trigger(elsewhere.images), elsewhere.labels)
            masked = MaskedModel(model, sites)
            pull = torch.zeros_like(masked.masks)
            for batch in stamped.batches(_BATCH, generator):
                pull += len(batch) * loss_gradient(masked, batch)
            stiffness = sensitivity(model, own, sites, generator, self.probe_size)
            flat = response_scores(pull / len(stamped), stiffness, self.damping)
        return ChannelScores(sites, flat, repr(self), details)

    def recover(
        self, model: nn.Module, clean: CleanData, generator: torch.Generator, progress: bool
    ) -> tuple[RecoveredTrigger, dict[str, Any]]:
        """The target's trigger, and how it was found.

        Raises:
            ScoringError: no trigger works on `min_success` of the held-out images.
        """
        pixels = None
        if self.mean is not None and self.std is not None:
            pixels = PixelRange.normalised(self.mean, self.std)
        seeds = torch.randint(2**31, (2,), generator=generator).tolist()
        target = self.target
        details: dict[str, Any] = {}
        if target is None:
            search = Inversion(steps=self.search_steps, batch_size=self.search_batch)
            found = search.recover(model, clean, pixels=pixels, seed=seeds[0], progress=progress)
            evidence = TargetEvidence.of(found, self.min_success)
            target = evidence.target
            details["search"] = {
                "sizes": list(evidence.sizes),
                "success": [trigger.success for trigger in found],
                "anomaly": list(evidence.anomaly),
            }
            if target is None:
                best = max(found, key=lambda trigger: trigger.success)
                raise ScoringError(
                    f"no label has a trigger that works: the best one (label {best.target}) sends "
                    f"{best.success:.0%} of {best.tested} held-out images there, min_success is "
                    f"{self.min_success:.0%}; give more search_steps or images, or name the target"
                )
        inversion = Inversion(steps=self.steps, batch_size=self.batch_size)
        (trigger,) = inversion.recover(
            model, clean, [target], pixels=pixels, seed=seeds[1], progress=progress
        )
        if trigger.success < self.min_success or trigger.tested == 0:
            raise ScoringError(
                f"the trigger recovered for label {target} sends {trigger.success:.0%} of "
                f"{trigger.tested} held-out images there, min_success is {self.min_success:.0%}; "
                "give more steps or images of other classes"
            )
        details["target"] = target
        details["trigger"] = {
            "success": trigger.success,
            "tested": trigger.tested,
            "norm": trigger.norm,
            "steps": trigger.steps,
        }
        return trigger, details


@torch.no_grad()
def activation_change(
    model: nn.Module, clean: CleanData, trigger: RecoveredTrigger, sites: tuple[Site, ...]
) -> Tensor:
    """How far the trigger moves each neuron (number of neurons,), in units of its clean spread.

    The root mean square, over images and positions, of the stamped less the clean output of the
    site, by the standard deviation of the clean output.
    """
    where = like(model)
    # sum and sum of squares of clean outputs, sum of squared changes, and of how many
    sums = {site.name: torch.zeros(4, site.channels, dtype=torch.float64) for site in sites}
    for images in clean.images.split(_FEW):
        before = _outputs(model, sites, images.to(**where))
        after = _outputs(model, sites, trigger(images).to(**where))
        for name, x in before.items():
            change = after[name] - x
            parts = (x, x.square(), change.square(), torch.ones_like(x))
            sums[name] += torch.stack([part.sum(1) for part in parts]).cpu()
    changes = []
    for site in sites:
        total, squares, moved, count = sums[site.name]
        spread = (squares / count - (total / count).square()).clamp_min(0).sqrt()
        changes.append((moved / count).sqrt() / (spread + 1e-6))
    return torch.cat(changes).float()


def _outputs(model: nn.Module, sites: tuple[Site, ...], images: Tensor) -> dict[str, Tensor]:
    """Site name -> its output (C, images x positions), float64: what a mask would scale."""
    found: dict[str, list[Tensor]] = {site.name: [] for site in sites}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            # linear layers have their channels last, convolutions and norm layers after the images
            along = -1 if isinstance(module, nn.Linear) else 1
            found[name].append(output.movedim(along, 0).flatten(1).double())

        return hook

    with contextlib.ExitStack() as hooks:
        for site in sites:
            handle = model.get_submodule(site.name).register_forward_hook(keep(site.name))
            hooks.callback(handle.remove)
        model(images)
    return {name: torch.cat(parts, 1) for name, parts in found.items()}


_BATCH = 128  # images a pass
_FEW = 32  # images a pass that keeps the outputs of all sites
