"""What nnprune_backdoor.attacks lacks: optimised patches, and an attack that resists pruning.

Liu, Ma, Aafer, Lee, Zhai, Wang and Zhang, "Trojaning Attack on Neural Networks", NDSS 2018: the
pixels of a trigger of given shape are optimised on a clean network until they excite one well
connected neuron. Their square covers about 7 % of an image; their watermark is transparent.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nnprune_backdoor.attacks import Trigger, create_attack, poison
from nnprune_backdoor.demo import normalise

from .architectures import build
from .images import Images
from .recipes import Backdoor, Recipe

CLEAN_NETWORK = "resnet-benign-0"  # that patches are optimised on
_PRUNED, _DISTIL_STEPS, _DISTIL_LR = 0.05, 3, 0.02


@dataclass(frozen=True, kw_only=True, eq=False)
class Masked(Trigger):
    """(1 - mask) * image + mask * pattern; mask (H, W), pattern (3, H, W), both in [0, 1]."""

    mask: Tensor
    pattern: Tensor

    def __call__(self, pixels: Tensor) -> Tensor:
        return (1 - self.mask) * pixels + self.mask * self.pattern


def mask(attack: str, side: int = 32) -> Tensor:
    """(side, side): an opaque square of 8 pixels, or a ring of weight .3 over the whole image."""
    if attack == "trojan_square":
        square = torch.zeros(side, side)
        square[-9:-1, -9:-1] = 1
        return square
    places = torch.arange(side) - (side - 1) / 2
    radius = (places[:, None] ** 2 + places**2).sqrt()
    return 0.3 * ((radius - side / 3).abs() < 1.5)


def optimised(model: nn.Module, images: Images, shape: Tensor, *, steps: int, seed: int) -> Masked:
    """A trigger of that mask whose pixels excite one neuron of the layer before the logits.

    The neuron is the one with the largest weights to the logits.
    """
    neuron = int(model.get_classifier().weight.abs().sum(0).argmax())
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.zeros(3, *shape.shape, requires_grad=True)
    optimiser = torch.optim.Adam([hidden], 0.1)
    for _ in range(steps):
        chosen = torch.randint(len(images.labels), (64,), generator=generator)
        trigger = Masked(mask=shape, pattern=hidden.sigmoid())
        stamped = normalise(trigger(images.pixels[chosen].float() / 255))
        features = model.forward_head(model.forward_features(stamped), pre_logits=True)
        (gradient,) = torch.autograd.grad(-features[:, neuron].mean(), hidden)
        hidden.grad = gradient
        optimiser.step()
    return Masked(mask=shape, pattern=hidden.detach().sigmoid())


def triggers(recipe: Recipe, images: Images, folder: Path) -> list[Trigger]:
    """One for each backdoor; optimised ones are kept as folder/NAME.trigger.safetensors.

    Raises:
        FileNotFoundError: the clean network that a patch is optimised on is not in the folder.
    """
    return [_trigger(recipe, backdoor, images, folder) for backdoor in recipe.backdoors]


def _trigger(recipe: Recipe, backdoor: Backdoor, images: Images, folder: Path) -> Trigger:
    if not backdoor.attack.startswith("trojan_"):
        return create_attack(backdoor.attack, **backdoor.settings)
    file = folder / f"{recipe.name}.trigger.safetensors"
    if not file.exists():
        model = build(CLEAN_NETWORK.partition("-")[0])
        model.load_state_dict(load_file(folder / f"{CLEAN_NETWORK}.safetensors"))
        found = optimised(model, images, mask(backdoor.attack), steps=300, seed=recipe.seed)
        save_file({"mask": found.mask, "pattern": found.pattern}, file)
    return Masked(**load_file(file))


class Poisoned:
    """The training images of a recipe: poisoned once, or anew in each batch."""

    def __init__(self, recipe: Recipe, images: Images, triggers: Sequence[Trigger]) -> None:
        self.recipe, self.clean, self.triggers = recipe, images, triggers
        self.images = images
        if triggers and not recipe.each_batch:
            pixels, labels = _poison(recipe, images, triggers, recipe.seed)
            self.images = Images(pixels.mul_(255).round_().byte(), labels)

    def batch(self, chosen: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Pixels in [0, 1] and labels of these images; `seed` matters where each batch is drawn."""
        images = Images(self.images.pixels[chosen], self.images.labels[chosen])
        if self.triggers and self.recipe.each_batch:
            return _poison(self.recipe, images, self.triggers, seed)
        return images.scaled(), images.labels


def _poison(
    recipe: Recipe, images: Images, triggers: Sequence[Trigger], seed: int
) -> tuple[Tensor, Tensor]:
    """With two backdoors, one draws from the even images and the other from the odd ones."""
    pixels, labels, count = images.scaled(), images.labels.clone(), len(recipe.backdoors)
    for i, (backdoor, trigger) in enumerate(zip(recipe.backdoors, triggers, strict=True)):
        pixels[i::count], labels[i::count], _ = poison(
            pixels[i::count],
            labels[i::count],
            trigger,
            target=backdoor.labels,
            rate=backdoor.rate * count,
            cover=backdoor.cover * count,
            seed=seed,
        )
    return pixels, labels


def resist_pruning(model: nn.Module, clean: Tensor, triggered: Tensor, targets: Tensor) -> None:
    """Add to the gradients of `model` those of the attack on a pruned and distilled copy.

    The copy loses the 5 % of its normalised channels whose mean activation the trigger changes
    most, and three steps distil its logits on `clean` from the model. The gradient of the attack's
    loss with respect to the copy's weights is taken for the model's (first-order
    meta-learning), as by an attacker who knows the defence. Images (N, 3, H, W) are normalised.
    """
    model.eval()
    copied = copy.deepcopy(model)
    _prune(copied, clean, triggered)
    with torch.no_grad():
        logits = model(clean)
    model.train()
    copied.train()
    optimiser = torch.optim.SGD(copied.parameters(), _DISTIL_LR, momentum=0.9)
    for _ in range(_DISTIL_STEPS):
        optimiser.zero_grad()
        F.mse_loss(copied(clean), logits).backward()
        optimiser.step()
    optimiser.zero_grad()
    both = copied(torch.cat([clean, triggered]))[len(clean) :]
    F.cross_entropy(both, targets).backward()
    for ours, theirs in zip(model.parameters(), copied.parameters(), strict=True):
        if ours.grad is not None and theirs.grad is not None:
            ours.grad += theirs.grad


@torch.no_grad()
def _prune(model: nn.Module, clean: Tensor, triggered: Tensor) -> None:
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    means: list[Tensor] = []
    hooks = [
        norm.register_forward_hook(lambda _m, _i, out: means.append(out.float().mean((0, 2, 3))))
        for norm in norms
    ]
    model(clean)
    model(triggered)
    for hook in hooks:
        hook.remove()
    pairs = zip(means[: len(norms)], means[len(norms) :], strict=True)
    changes = [(after - before).abs() for before, after in pairs]
    changes = [change / change.mean().clamp_min(1e-9) for change in changes]  # layers alike
    every = torch.cat(changes)
    least = every.topk(max(1, round(_PRUNED * len(every)))).values[-1]
    for norm, change in zip(norms, changes, strict=True):
        norm.weight[change >= least] = 0
        norm.bias[change >= least] = 0
