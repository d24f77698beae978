"""What ANP, RNP, CNP and MNP cost when written down as published, with none of the savings.

Our own text from the papers' descriptions (for CNP and RNP also from what the authors' codes do;
MNP has no public code, so it is our reconstruction of its objective). Every parameter asks for a
gradient, as layers with extra mask parameters have it by default; losses that are added are added
before one backward pass, so their graphs live together; features and logits are separate forward
passes. Random numbers are drawn in the library's order, so that scores can be compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnprune_backdoor import CleanData
from nnprune_backdoor.core.checks import count_classes
from nnprune_backdoor.core.norms import use_statistics_
from nnprune_backdoor.core.sites import Site, find_classifiers, find_sites
from nnprune_backdoor.criteria import ANP, CNP, MNP, RNP, Unlearning
from nnprune_backdoor.criteria.cnp import contrastive_loss
from nnprune_backdoor.criteria.mnp import magnitudes, tie_free
from nnprune_backdoor.criteria.rnp import LOSS_WEIGHT

Stamp = Callable[[Tensor], Tensor]


def there(batch: CleanData, model: nn.Module) -> CleanData:
    """The batch where the model is."""
    device = next(model.parameters()).device
    return CleanData(batch.images.to(device), batch.targets.to(device))


class MaskedLayer(nn.Module):
    """A layer with a mask and two noises a channel; all of them, and the weights, are trainable."""

    def __init__(self, layer: nn.Module, channels: int) -> None:
        super().__init__()
        self.layer = layer
        device = layer.weight.device
        self.mask = nn.Parameter(torch.ones(channels, device=device))
        self.delta = nn.Parameter(torch.zeros(channels, device=device))
        self.xi = nn.Parameter(torch.zeros(channels, device=device))
        self.mode = "mask"  # original, mask, perturbed

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.ones_like(self.mask) if self.mode == "original" else self.mask
        if self.mode == "perturbed":
            scale = scale + self.delta
        weight = self.layer.weight
        own = {"weight": weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))}
        if self.layer.bias is not None and self.mode == "perturbed":
            own["bias"] = self.layer.bias * (1 + self.xi)
        return torch.func.functional_call(self.layer, own, (x,))


class MaskedNetwork:
    """A copy of a model, in eval mode, whose sites are MaskedLayers."""

    def __init__(self, model: nn.Module, sites: tuple[Site, ...]) -> None:
        self.model = copy.deepcopy(model).requires_grad_(True)
        self.layers = []
        for site in sites:
            parent, _, name = site.name.rpartition(".")
            layer = MaskedLayer(self.model.get_submodule(site.name), site.channels)
            setattr(self.model.get_submodule(parent), name, layer)
            self.layers.append(layer)
        self.model.eval()

    @property
    def masks(self) -> list[Tensor]:
        return [layer.mask for layer in self.layers]

    def flat(self) -> Tensor:
        return torch.cat([layer.mask.detach() for layer in self.layers])

    def run(self, images: Tensor, mode: str = "mask") -> Tensor:
        for layer in self.layers:
            layer.mode = mode
        logits: Tensor = self.model(images)
        return logits

    def features(self, images: Tensor, heads: tuple[str, ...], mode: str = "mask") -> Tensor:
        seen: list[Tensor] = []
        handles = [
            self.model.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs: seen.append(inputs[0].flatten(1))
            )
            for name in heads
        ]
        self.run(images, mode)
        for handle in handles:
            handle.remove()
        return torch.cat(seen, 1)

    def draw_noise(self, generator: torch.Generator, budget: float) -> None:
        sizes = [len(layer.mask) for layer in self.layers]
        with torch.no_grad():
            for name in ("delta", "xi"):
                values = (torch.rand(sum(sizes), generator=generator) * 2 - 1) * budget
                for layer, part in zip(self.layers, values.split(sizes), strict=True):
                    getattr(layer, name).copy_(part)

    def ascend_noise(
        self, images: Tensor, labels: Tensor, budget: float, steps: int, project: bool
    ) -> None:
        for _ in range(steps):
            self.clear_noise_gradients()
            F.cross_entropy(self.run(images, "perturbed"), labels).backward()
            with torch.no_grad():
                for layer in self.layers:
                    for noise in (layer.delta, layer.xi):
                        if noise.grad is not None:
                            noise.add_(budget / steps * noise.grad.sign())
                        if project:
                            noise.clamp_(-budget, budget)

    def clear_noise_gradients(self) -> None:
        for layer in self.layers:
            layer.delta.grad = layer.xi.grad = None


def masks_step(optimiser: torch.optim.Optimizer, networks: list[MaskedNetwork]) -> None:
    optimiser.step()
    with torch.no_grad():
        for mask in networks[0].masks:
            mask.clamp_(0, 1)


def anp(criterion: ANP, model: nn.Module, clean: CleanData, sites: tuple[Site, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    network = MaskedNetwork(model, sites)
    use_statistics_(network.model, criterion.ranking.statistics)
    optimiser = torch.optim.SGD(
        network.masks, lr=criterion.ranking.lr, momentum=criterion.ranking.momentum
    )
    done = 0
    while done < criterion.ranking.steps:
        for drawn in clean.batches(criterion.ranking.batch_size, generator, replacement=True):
            if done == criterion.ranking.steps:
                break
            batch = there(drawn, model)
            network.draw_noise(generator, criterion.noise_budget)
            network.ascend_noise(
                batch.images,
                batch.targets,
                criterion.noise_budget,
                criterion.noise_steps,
                criterion.project_noise,
            )
            optimiser.zero_grad()  # the weights' gradients pile up, as nobody clears them
            natural = F.cross_entropy(network.run(batch.images), batch.targets)
            robust = F.cross_entropy(network.run(batch.images, "perturbed"), batch.targets)
            (criterion.alpha * natural + (1 - criterion.alpha) * robust).backward()
            masks_step(optimiser, [network])
            done += 1
    return network.flat()


def unlearn(
    settings: Unlearning, model: nn.Module, clean: CleanData, generator: torch.Generator
) -> nn.Module:
    unlearned = copy.deepcopy(model).requires_grad_(True)
    use_statistics_(unlearned, settings.statistics)
    optimiser = torch.optim.SGD(
        unlearned.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    for _ in range(settings.epochs):
        right = 0
        for drawn in clean.batches(settings.batch_size, generator):
            batch = there(drawn, model)
            optimiser.zero_grad()
            logits = unlearned(batch.images)
            (-F.cross_entropy(logits, batch.targets)).backward()
            if settings.clip is not None:
                nn.utils.clip_grad_norm_(unlearned.parameters(), settings.clip)
            optimiser.step()
            right += int((logits.argmax(1) == batch.targets).sum())
        if right / len(clean) <= (0.2 if settings.stop is None else settings.stop):
            break
    return unlearned.eval()


def rnp(criterion: RNP, model: nn.Module, clean: CleanData, sites: tuple[Site, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    network = MaskedNetwork(unlearn(criterion.unlearning, model, clean, generator), sites)
    use_statistics_(network.model, criterion.ranking.statistics)
    optimiser = torch.optim.SGD(
        network.masks, lr=criterion.ranking.lr, momentum=criterion.ranking.momentum
    )
    for _ in range(criterion.ranking.epochs):
        for drawn in clean.batches(criterion.ranking.batch_size, generator):
            batch = there(drawn, model)
            optimiser.zero_grad()
            (LOSS_WEIGHT * F.cross_entropy(network.run(batch.images), batch.targets)).backward()
            masks_step(optimiser, [network])
    return network.flat()


def mnp(criterion: MNP, model: nn.Module, clean: CleanData, sites: tuple[Site, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    suppressed = unlearn(criterion.unlearning.careful(model), model, clean, generator)
    networks = [MaskedNetwork(each, sites) for each in (model, suppressed)]
    for own, other in zip(networks[0].layers, networks[1].layers, strict=True):
        other.mask = own.mask
    for network in networks:
        use_statistics_(network.model, criterion.ranking.statistics)
    weights = magnitudes(suppressed, sites).to(networks[0].masks[0])
    optimiser = torch.optim.SGD(
        networks[0].masks, lr=criterion.ranking.lr, momentum=criterion.ranking.momentum
    )
    closed_at, steps = torch.full_like(weights, torch.inf), 0
    while steps < criterion.ranking.steps:
        for drawn in clean.batches(criterion.ranking.batch_size, generator):
            batch = there(drawn, model)
            optimiser.zero_grad()
            own, other = (
                F.cross_entropy(network.run(batch.images), batch.targets) for network in networks
            )
            penalty = criterion.penalty * (torch.cat(networks[0].masks) * weights).sum()
            (criterion.preserve * own + (1 - criterion.preserve) * other + penalty).backward()
            masks_step(optimiser, networks)
            steps += 1
            closed_at[(networks[0].flat() == 0) & (closed_at > steps)] = steps
            if steps == criterion.ranking.steps:
                break
    return tie_free(networks[0].flat().cpu(), closed_at.cpu(), weights.cpu())


def cnp(criterion: CNP, model: nn.Module, clean: CleanData, sites: tuple[Site, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(2**31, (2,), generator=generator).tolist()
    target = infer_target(criterion, model, clean, seeds[0])
    stamp = invert(criterion, model, clean, target, seeds[1])
    device = next(model.parameters()).device
    heads = find_classifiers(model, clean.images[:2].to(device))
    network = MaskedNetwork(model, sites)
    use_statistics_(network.model, criterion.ranking.statistics)
    optimiser = torch.optim.SGD(
        network.masks, lr=criterion.ranking.lr, momentum=criterion.ranking.momentum
    )
    for drawn in islice(
        criterion.draws(clean, generator, criterion.ranking.batch_size), criterion.ranking.steps
    ):
        images = drawn.to(device)
        stamped = stamp(images)
        labels = network.run(images).argmax(1)
        network.draw_noise(generator, criterion.noise_budget)
        network.ascend_noise(
            images, labels, criterion.noise_budget, criterion.noise_steps, criterion.project_noise
        )
        z = network.features(images, heads, "original")
        zs = network.features(stamped, heads, "original")
        z_m, zs_m = network.features(images, heads), network.features(stamped, heads)
        z_n = network.features(images, heads, "perturbed")
        alike, apart = ((z_m, z), (zs_m, z), (z_n, z)), ((z_n, zs), (z_m, zs), (zs_m, zs))
        similarities = [F.cosine_similarity(a, b) for a, b in alike + apart]
        optimiser.zero_grad()
        contrastive_loss(torch.stack(similarities, 1), criterion.temperature).backward()
        masks_step(optimiser, [network])
        # for the recovered share, which lowers the rate of learning (later than we go)
        network.run(stamped).argmax(1).eq(network.run(images, "original").argmax(1)).sum()
    return network.flat()


def infer_target(criterion: CNP, model: nn.Module, clean: CleanData, seed: int) -> int:
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    network = MaskedNetwork(model, find_sites(model, clean.images[:2].to(device)))
    increase = torch.zeros(count_classes(model, clean.images), dtype=torch.int64, device=device)
    size = criterion.ranking.batch_size
    count = -(-criterion.noise_passes * len(clean) // size)
    for drawn in islice(criterion.draws(clean, generator, size), count):
        images = drawn.to(device)
        before = network.run(images).argmax(1)
        network.draw_noise(generator, criterion.noise_budget)
        network.ascend_noise(
            images, before, criterion.noise_budget, criterion.noise_steps, criterion.project_noise
        )
        after = network.run(images, "perturbed").argmax(1)
        increase += after.bincount(minlength=len(increase))
        increase -= before.bincount(minlength=len(increase))
    return int(increase.argsort(descending=True, stable=True)[0])


def invert(criterion: CNP, model: nn.Module, clean: CleanData, target: int, seed: int) -> Stamp:
    model = copy.deepcopy(model).requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = clean.images.shape[1:]
    device = next(model.parameters()).device
    unit = torch.rand(1 + channels, height, width, generator=generator).to(device)
    unit.requires_grad_(True)
    low = clean.images.amin((0, 2, 3))[:, None, None].to(device)
    high = clean.images.amax((0, 2, 3))[:, None, None].to(device)
    optimiser = torch.optim.Adam([unit], lr=criterion.inversion_lr)
    penalty = criterion.inversion_penalty * 1024 / (height * width)
    for drawn in islice(criterion.draws(clean, generator, criterion.batch_size), criterion.steps):
        images = drawn.to(device)
        mask, pattern = unit[:1], low + (high - low) * unit[1:]
        logits = model((1 - mask) * images + mask * pattern)
        labels = torch.full((len(images),), target, device=device)
        optimiser.zero_grad()
        (F.cross_entropy(logits, labels) + penalty * mask.sum()).backward()
        optimiser.step()
        with torch.no_grad():
            unit.clamp_(0, 1)
    mask, pattern = unit.detach()[:1], low + (high - low) * unit.detach()[1:]
    return lambda images: (1 - mask) * images + mask * pattern
