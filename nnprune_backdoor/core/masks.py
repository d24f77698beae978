"""Masks on neurons without touching the model, and the same cut made permanent.

Two meanings of "pruned" are in use. `constant`: the weight goes and the bias stays, so the neuron
says the same thing everywhere (ANP, RNP and BNP as published: gamma = 0). `zero`: both go, so it
says nothing (CLP, and what physical removal computes).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .copies import refuse_computed_weights, refuse_inference_weights
from .norms import Statistics, keeps_statistics, use_statistics_
from .scores import Selection
from .sites import Site
from .trace import NORMS

Silencing = Literal["zero", "constant"]


class MaskedModel:
    """A callable around an untouched model; it owns nothing but masks and a copy of the buffers.

    `masks` is one leaf (number of neurons,) of ones, in site order, then channel order. A norm
    site's mask multiplies gamma; a layer site's multiplies the output channel less its bias. With
    `silencing="zero"` the bias (beta) is multiplied too. A head's mask multiplies the weights that
    read it; it has no bias. Masks of ones give the model's own
    logits, bit for bit. No gradient of a weight is ever computed: freeze the model's parameters.
    Gradient checkpointing must be off: it would compute blocks again without their masks
    (`copies.frozen_copy` sees to both).

    In batch-statistics mode (`norms.use_statistics_`) the running statistics drift in the copied
    buffers only.
    """

    def __init__(
        self, model: nn.Module, sites: tuple[Site, ...], *, silencing: Silencing = "constant"
    ) -> None:
        refuse_inference_weights(model, [site.name for site in sites])
        self.model = model
        self.sites = sites
        self.silencing = silencing
        self._sizes = [site.channels for site in sites]
        self._modules = [model.get_submodule(site.name) for site in sites]
        self.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        device = next(model.parameters()).device
        self.masks = torch.ones(sum(self._sizes), device=device, requires_grad=True)

    def __call__(
        self,
        images: Tensor,
        *,
        weight_noise: Tensor | None = None,
        bias_noise: Tensor | None = None,
    ) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W) under the masks.

        With noise (flat, like `masks`) weights are multiplied by mask + weight_noise and biases
        by 1 + bias_noise (ANP: the noise adds to the mask, it does not multiply it).
        """
        scale = self.masks if weight_noise is None else self.masks + weight_noise
        shift = self.masks if self.silencing == "zero" else None  # None: biases as they are
        if bias_noise is not None:
            shift = bias_noise + (1 if shift is None else shift)
        scales = scale.split(self._sizes)
        shifts = [None] * len(scales) if shift is None else shift.split(self._sizes)
        parameters: dict[str, Tensor] = {}
        with contextlib.ExitStack() as hooks:
            for site, module, s, t in zip(self.sites, self._modules, scales, shifts, strict=True):
                if isinstance(module, NORMS):
                    parameters[f"{site.name}.weight"] = module.weight * s.to(module.weight)
                    if t is not None and module.bias is not None:
                        parameters[f"{site.name}.bias"] = module.bias * t.to(module.bias)
                elif site.kind == "heads":
                    parameters[f"{site.name}.weight"] = _scale_columns(module, site.width, s)
                else:
                    handle = module.register_forward_hook(_scale_output(s, t))
                    hooks.callback(handle.remove)
            logits: Tensor = torch.func.functional_call(
                self.model, (parameters, self.buffers), (images,), tie_weights=False
            )
        return logits

    def use_statistics_(self, statistics: Statistics, images: Tensor) -> None:
        """Of BatchNorm, as `norms.use_statistics_`; but no layer may normalise masks away.

        Where convolutions are concatenated before they are normalised (DenseNet) a mask scales
        what the layer scales back: under a batch's statistics it has no effect until it is zero,
        and its gradient is nothing. Such layers keep their running statistics.

        Args:
            images: (N, C, H, W), a few; on these it is tried where a BatchNorm does not follow a
                convolution of its own.
        """
        use_statistics_(self.model, statistics)
        scored = {site.name for site in self.sites}
        norms = [
            module
            for name, module in self.model.named_modules()
            if keeps_statistics(module) and name not in scored
        ]
        bare = [not isinstance(module, NORMS) for module in self._modules]
        if statistics == "running" or not norms or not any(bare):
            return
        pulled = self._pulls(images)
        self.model.eval()
        free = self._pulls(images)
        use_statistics_(self.model, statistics)
        if any(b and p < _NOTHING * f for b, p, f in zip(bare, pulled, free, strict=True)):
            for module in norms:
                module.eval()

    def _pulls(self, images: Tensor) -> list[float]:
        """How the sum of squared logits pulls at each site's masks; buffers do not drift."""
        drifting, self.buffers = self.buffers, {k: b.clone() for k, b in self.buffers.items()}
        images = images.to(next(self.model.parameters()))
        try:
            with torch.autocast(images.device.type, enabled=False):  # rounding would be a pull
                size = self(images).float().square().sum()
            (pull,) = torch.autograd.grad(size, self.masks)
        finally:
            self.buffers = drifting
        return [part.norm().item() for part in pull.split(self._sizes)]

    @contextlib.contextmanager
    def frozen_masks(self) -> Iterator[None]:
        """No gradient reaches the masks inside the block (nothing would read it)."""
        self.masks.requires_grad_(False)
        try:
            yield
        finally:
            self.masks.requires_grad_(True)


_NOTHING = 0.01  # of the pull under running statistics; 1e-5 was seen where norms undo masks


def _scale_output(scale: Tensor, shift: Tensor | None) -> Callable[..., Tensor]:
    """A hook that turns W x + b into scale * W x + shift * b, channel by channel."""

    def hook(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        bias: Tensor | None = getattr(module, "bias", None)
        s = _along_channels(scale.to(output), module)
        if bias is None:
            return output * s
        t = 1.0 if shift is None else shift.to(output)
        # in this form a scale and shift of one leave the output bit for bit as it was
        rest = bias * (t - scale.to(output))
        return output * s + _along_channels(rest, module)

    return hook


def _scale_columns(module: nn.Module, width: int, scale: Tensor) -> Tensor:
    """The weight, of which `width` input channels at a time are multiplied by one scale."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    columns = scale.to(weight).repeat_interleave(width)
    return weight * columns.reshape(-1, *(1,) * (weight.ndim - 2))


def _along_channels(values: Tensor, module: nn.Module) -> Tensor:
    """(C,) -> (C, 1, ...) for a convolution, whose channels come before the spatial axes."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return values.reshape(-1, *(1,) * len(module.kernel_size))
    return values


def silence_(model: nn.Module, selection: Selection, *, silencing: Silencing = "zero") -> None:
    """Set the selected neurons' weights to zero, in place; biases too with `silencing="zero"`.

    Computes what a mask of exactly zero computes. Of a head, the weights that read it are its
    weights, and it has no bias. Shapes stay as they are.

    Raises:
        UnsupportedModelError: a selected layer's weight is parametrised (weight norm, ...), so
            writing to it would change nothing; it was made in inference mode; or it has another
            width than the selection knows.
    """
    modules = {name: model.get_submodule(name) for name in selection.by_site()}
    refuse_computed_weights(model, modules)
    refuse_inference_weights(model, modules)
    sites = {site.name: site for site in selection.sites}
    for name, channels in selection.by_site().items():
        module, site = modules[name], sites[name]
        with torch.no_grad():
            site.weights_of(module)[channels] = 0
            if silencing == "zero" and site.kind != "heads" and module.bias is not None:
                module.bias[channels] = 0  # type: ignore[operator]
