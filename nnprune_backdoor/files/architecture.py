"""Build a timm architecture by name and fill it with weights from a file."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, UnknownNameError, UnsupportedModelError
from ..utils.randomness import private_randomness
from ..utils.time_limit import within
from .checkpoint import MAX_BYTES, Weights, load_weights

_SIZES = ("num_classes", "in_chans", "img_size")  # which may be large; memory is checked

_LARGEST = 2**16  # of all other numbers among the arguments, such as depth

_PATIENCE = 60.0  # seconds to lay out an architecture; the largest of timm's takes a few


# arguments of timm.create_model that read files, or reach for the network
_READERS = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
)


def load_model(
    path: str | os.PathLike[str],
    arch: str | None = None,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | None = None,
    key: str | None = None,
    max_bytes: int = MAX_BYTES,
    **model_args: Any,
) -> nn.Module:
    """A timm model with the weights of a file. No code from the file runs, nothing is downloaded.

    Args:
        path, key, max_bytes: as of `load_weights`; the limit holds for the model too.
        arch: name of a timm architecture; by default the one that the file names as its "arch".
        num_classes, in_chans, img_size: by default what the weights say (the classifier, the
            first convolution, the position embedding), else what is usual for the architecture.
        **model_args: other arguments of `timm.create_model`.

    Returns:
        The model in eval mode, on the CPU, in single precision.

    Raises:
        CheckpointError: the file (see `load_weights`), or its weights do not fit the model.
        UnknownNameError: timm has no such architecture.
    """
    weights = load_weights(path, key=key, max_bytes=max_bytes)
    sizes = {"num_classes": num_classes, "in_chans": in_chans, "img_size": img_size}
    model_args |= {name: size for name, size in sizes.items() if size is not None}
    return built(weights, arch, model_args, what=str(path), max_bytes=max_bytes)[0]


def built(
    weights: Weights,
    arch: str | None,
    model_args: Mapping[str, Any],
    *,
    what: str,
    max_bytes: int = MAX_BYTES,
) -> tuple[nn.Module, str, dict[str, Any]]:
    """The model of these weights (called `what` in errors), its timm name and all arguments.

    Raises:
        CheckpointError, UnknownNameError: as `load_model`.
    """
    arch = arch or weights.arch
    if arch is None:
        raise CheckpointError(f"{what}: the file does not name its architecture; give arch='...'")
    arguments = complete(arch, model_args, weights)
    model = create(arch, arguments, max_bytes=max_bytes)
    fill_(model, weights, f"{what} as {arch!r}")
    return model, arch, arguments


def create(arch: str, model_args: Mapping[str, Any], *, max_bytes: int = MAX_BYTES) -> nn.Module:
    """A fresh timm model in eval mode; the global generators stay as they were.

    Raises:
        UnknownNameError: timm has no such architecture.
        CheckpointError: the arguments do not fit it, read files, or make it larger than allowed.
    """
    plan = _outline(arch, model_args)
    size = sum(t.numel() * t.element_size() for t in (*plan.parameters(), *plan.buffers()))
    if size > max_bytes:
        raise CheckpointError(
            f"{arch!r} with {dict(model_args)} takes {size:,} bytes, over the limit of "
            f"{max_bytes:,}; raise max_bytes if you want it that large"
        )
    return _build(arch, model_args, "cpu").eval()


def complete(
    arch: str, model_args: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> dict[str, Any]:
    """`model_args`, with those of num_classes, in_chans and img_size that the weights tell."""
    rest = {name: value for name, value in model_args.items() if name != "num_classes"}
    plan = _outline(arch, rest)
    usual: Mapping[str, Any] = getattr(plan, "pretrained_cfg", {})
    own = {name: tuple(tensor.shape) for name, tensor in plan.state_dict().items()}
    there = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    found: dict[str, Any] = {}
    for layer in _names(usual.get("classifier")):
        if there.get(f"{layer}.weight"):
            found["num_classes"] = there[f"{layer}.weight"][0]
    for layer in _names(usual.get("first_conv")):
        new, old = (shapes.get(f"{layer}.weight", ()) for shapes in (there, own))
        # more than the images' channels, where the stem rearranges pixels first
        if len(new) == len(old) >= 3 and new[1] != old[1] and 3 * new[1] % old[1] == 0:
            found["in_chans"] = 3 * new[1] // old[1]
    size = _image_size(plan, own.get("pos_embed", ()), there.get("pos_embed", ()))
    if size is not None:
        found["img_size"] = size
    return {**found, **model_args}


def fill_(
    model: nn.Module, weights: Mapping[str, Tensor], what: str, *, keep_dtype: bool = False
) -> None:
    """Load weights strictly, in place.

    Args:
        what: what an error message calls the attempt.
        keep_dtype: give each tensor the type of its weights; else the model's own type stays.

    Raises:
        CheckpointError: names or shapes differ; nothing has been loaded then.
    """
    own: dict[str, Tensor] = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
    }
    differ = [
        f"{name} {_form(weights[name])}, expected {_form(tensor)}"
        for name, tensor in own.items()
        if name in weights and not _alike(tensor, weights[name])
    ]
    complaints = {
        "missing": [name for name in own if name not in weights],
        "unexpected": [f"{name} {_form(weights[name])}" for name in weights if name not in own],
        "of another shape": differ,
    }
    if any(complaints.values()):
        text = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
            for kind, names in complaints.items()
            if names
        )
        raise CheckpointError(
            f"the weights of {what} do not fit the model: {text}. Is it this architecture, with "
            "these arguments?"
        )
    if keep_dtype:
        for name, tensor in own.items():
            tensor.data = tensor.data.to(weights[name].dtype)
    model.load_state_dict(dict(weights), strict=False)  # names are checked; extra state is not


def _outline(arch: str, model_args: Mapping[str, Any]) -> nn.Module:
    """The architecture without memory for its weights."""
    _check_name(arch)
    for name in model_args:
        if name in _READERS:
            raise CheckpointError(f"{name!r} is no argument of an architecture; leave it out")
        if name not in _SIZES and _largest(model_args[name]) > _LARGEST:
            raise CheckpointError(f"{name!r} is over {_LARGEST:,}; no architecture is that large")
    try:
        # the number of layers may come from anybody too
        return within(
            _PATIENCE,
            f"building {arch!r} with {dict(model_args)}",
            lambda: _build(arch, model_args, "meta"),
        )
    except UnsupportedModelError as error:
        raise CheckpointError(str(error)) from error
    except CheckpointError as error:
        if "meta tensor" not in str(error):
            raise
        return _build(arch, model_args, "cpu")  # older versions of timm read values in building


def _largest(value: Any) -> float:
    """The largest number in plain data."""
    found, left = 0.0, [value]
    while left:
        match left.pop():
            case int() | float() as one:
                found = max(found, abs(one))
            case list() | tuple() as many:
                left += many
            case dict() as named:
                left += named.values()
    return found


def _build(arch: str, model_args: Mapping[str, Any], device: str) -> nn.Module:
    import timm

    try:
        with private_randomness(0), torch.device(device):
            model: nn.Module = timm.create_model(arch, pretrained=False, **model_args)
    except Exception as error:  # arguments may come from anybody, and timm checks few
        raise CheckpointError(
            f"timm cannot build {arch!r} with {dict(model_args)} ({type(error).__name__}: {error})"
        ) from error
    return model


def _check_name(arch: str) -> None:
    """Only names that timm has registered: others may be read from a folder or a hub."""
    import timm

    if not re.fullmatch(r"\w+(\.\w+)?", arch, re.ASCII) or not timm.is_model(arch):
        close = difflib.get_close_matches(arch[:100], timm.list_models(), n=3, cutoff=0.6)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise UnknownNameError(
            f"timm has no architecture {arch[:100]!r}{hint} (hubs, folders and paths are not read)"
        )


def _names(entry: Any) -> tuple[str, ...]:
    """Layer names of an entry of timm's configuration: none, one or several."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _image_size(plan: nn.Module, own: tuple[int, ...], there: tuple[int, ...]) -> int | None:
    """Side of the square images that a position embedding (1, tokens, width) was made for."""
    patches = getattr(plan, "patch_embed", None)
    side = getattr(patches, "patch_size", None)
    if own == there or len(own) != 3 or len(there) != 3 or not isinstance(side, tuple):
        return None
    tokens = there[1] - (own[1] - int(getattr(patches, "num_patches", 0)))
    rows = math.isqrt(max(tokens, 0))
    return rows * int(side[0]) if rows and rows * rows == tokens and side[0] == side[1] else None


def _alike(own: Tensor, given: Tensor) -> bool:
    return own.shape == given.shape and own.is_floating_point() == given.is_floating_point()


def _form(tensor: Tensor) -> str:
    kind = "" if tensor.is_floating_point() else f" {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)}{kind}"
