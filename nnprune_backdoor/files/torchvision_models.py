"""torchvision's classifiers by name, "torchvision:resnet18", in the place of a timm name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import UnknownNameError

PREFIX = "torchvision:"


def build(arch: str, **arguments: Any) -> nn.Module:
    """A classifier of torchvision with new weights; raises whatever torchvision raises."""
    from torchvision.models import get_model

    model: nn.Module = get_model(arch.removeprefix(PREFIX), weights=None, **arguments)
    return model


def check_name(arch: str) -> None:
    """Raise UnknownNameError if torchvision has no classifier of this name."""
    import torchvision.models

    known = torchvision.models.list_models(module=torchvision.models)
    name = arch.removeprefix(PREFIX)
    if name not in known:
        close = difflib.get_close_matches(name[:100], known, n=3, cutoff=0.6)
        hint = f"; did you mean {' or '.join(repr(PREFIX + each) for each in close)}?"
        raise UnknownNameError(
            f"torchvision has no classifier {name[:100]!r}{hint if close else ''}"
        )


def sizes_in(
    empty: Callable[[Mapping[str, Any]], nn.Module],
    arguments: Mapping[str, Any],
    weights: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Number of classes and size of the images, as far as the weights determine them.

    Args:
        empty: builds the architecture with other arguments, on the device "meta".
        arguments: those given.
        weights: their shapes are compared with those of the architecture.
    """
    others = {name: value for name, value in arguments.items() if name != "num_classes"}
    network = empty(others)
    one, other = (_shapes(empty({**others, "num_classes": count})) for count in (10, 11))
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    sizes: dict[str, Any] = {}
    counts = {  # what the two differ in is the classifier's
        given[name][axis]
        for name, shape in one.items()
        for axis, size in enumerate(shape)
        if size != other[name][axis] and len(given.get(name, ())) == len(shape)
    }
    if len(counts) == 1:
        sizes["num_classes"] = counts.pop()
    patch, tokens = getattr(network, "patch_size", None), given.get("encoder.pos_embedding", ())
    if isinstance(patch, int) and len(tokens) == 3:
        sizes["image_size"] = math.isqrt(max(0, tokens[1] - 1)) * patch
    return sizes


def config_of(arch: str) -> dict[str, Any]:
    """How images are prepared for torchvision's own weights, in the form of timm's configuration.

    Nothing is downloaded: torchvision has it beside the address of the weights.
    """
    from torchvision.models import get_model_weights

    transform = get_model_weights(arch.removeprefix(PREFIX)).DEFAULT.transforms()
    (crop,), (resized,) = transform.crop_size, transform.resize_size
    return {
        "input_size": (3, crop, crop),
        "mean": tuple(transform.mean),
        "std": tuple(transform.std),
        "interpolation": transform.interpolation.value,
        "crop_pct": crop / resized,
    }


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
