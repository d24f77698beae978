"""What criteria read from single layers, and how the layers are made to compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...core.sites import Site
from ...utils.hooks import hooked
from ...utils.tensors import placement


@torch.no_grad()
def watch(
    model: nn.Module,
    sites: tuple[Site, ...],
    images: Tensor,
    see: Callable[[Site, Tensor], None],
    side: Literal["input", "output"] = "output",
) -> None:
    """Run images (N, C, H, W) through the model, a few at a time, and look at the sites.

    Args:
        see: is given a site and what its layer reads or emits, (channels, images x positions),
            float64 on the model's device, whenever the layer runs. What a norm layer reads has the
            channels of the site; for other layers only the output does. Of heads it is what the
            layer reads, whatever `side`: (heads, images x positions x channels of a head).
    """
    watched = {model.get_submodule(site.name): site for site in sites}

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        site = watched[module]
        values = inputs[0] if side == "input" or site.kind == "heads" else output
        # linear layers have their channels last, convolutions and norm layers after the images
        along = -1 if isinstance(module, nn.Linear) else 1
        # a copy: what comes next may write into it
        values = values.movedim(along, 0).to(torch.float64, copy=True)
        see(site, values.reshape(site.channels, -1))

    with hooked(list(watched), hook):
        for part in images.split(_FEW):
            model(part.to(**placement(model)))


@torch.no_grad()
def kernels(model: nn.Module, site: Site) -> Tensor:
    """Weights (channels, inputs a channel reads, kernel positions) of the producer, float64.

    As they are stored: a layer that standardises them in its forward (NFNet's) uses others. A
    linear layer has one position, a depthwise convolution one input. Of a head they are the weights
    that read it: (heads, outputs of the projection, channels of a head).
    """
    weights = site.weights_of(model.get_submodule(site.producer)).double()
    return weights.reshape(*weights.shape[:2], -1)


@torch.no_grad()
def gammas(model: nn.Module, site: Site) -> Tensor:
    """|gamma| (channels,) of the site's norm layer, float64; ones where it has none."""
    weight: Any = model.get_submodule(site.name).weight
    if site.kind != "norm":
        return torch.ones(site.channels, dtype=torch.float64, device=weight.device)
    return torch.as_tensor(weight).double().abs()


def relative(values: Tensor) -> Tensor:
    """Values (channels,) >= 0 of a layer as multiples of their mean; zeros if all are."""
    return values / values.mean().clamp_min(torch.finfo(values.dtype).tiny)


def standardised(values: Tensor) -> Tensor:
    """Values (channels,) of a layer in standard deviations from their mean; zeros if alike.

    None of n channels can be further out than (n - 1) / sqrt(n): at the usual three deviations a
    layer of ten channels or fewer has no outliers.
    """
    if len(values) < 2:
        return torch.zeros_like(values)
    spread, mean = torch.std_mean(values)
    rounding = 1e-12 * values.abs().max()
    return torch.where(spread > rounding, (values - mean) / spread, torch.zeros_like(values))


_FEW = 32  # images a pass: the outputs of all sites may be kept
