"""Build an architecture by name and fill it with weights from a file.

Names are timm's; "torchvision:NAME" is torchvision's, and "hf" a folder of `transformers`.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, UnknownNameError, UnsupportedModelError
from ..utils.randomness import private_randomness
from ..utils.time_limit import within
from . import torchvision_models, transformers_models
from .checkpoint import Weights, load_weights
from .fitting import fitted, timm_converter
from .limits import MAX_BYTES
from .record_file import purified_folder
from .remote import refuse_address
from .state_dicts import Kind, short
from .transformers_models import HF

_SIZES = ("num_classes", "in_chans", "img_size")  # may be large, since memory is checked

_MAX_NUMBER = 2**16  # limit of every other number among the arguments, such as depth

_MAX_SECONDS = 60.0  # for building an architecture; the largest in timm takes a few seconds

# arguments of timm.create_model and torchvision that read files or use the network
_FORBIDDEN = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
    "weights",
    "weights_backbone",
)


_DROP = "; what is no part of the network is left out by --drop PATTERN (drop=[...])"


def load_model(
    path: str | os.PathLike[str],
    arch: str | None = None,
    *,
    key: str | None = None,
    prefix: str | None = None,
    drop: Sequence[str] = (),
    weights: Kind | None = None,
    max_bytes: int = MAX_BYTES,
    **model_args: Any,
) -> nn.Module:
    """A model with the weights of a file. No code from the file runs, nothing is downloaded.

    Args:
        path: the file, of one of the kinds that `load_weights` reads; with "hf" the folder.
        arch: timm name of the architecture; "torchvision:NAME" for one of torchvision; "hf" for
            an image classifier of `transformers` in a folder with config.json, for which nothing
            else is given. By default the file's entry "arch".
        key, prefix, drop, weights: which tensors of the file are taken; see `load_weights`.
        max_bytes: largest file, and largest model, that is loaded.
        **model_args: arguments of `timm.create_model`. num_classes, in_chans and img_size are
            read from the shapes of the weights (classifier, first convolution, position
            embedding) where they are not given.

    Returns:
        The model in eval mode, on the CPU, in single precision.

    Raises:
        CheckpointError: the file cannot be read (see `load_weights`), or its weights do not fit;
            the path is an address.
        UnknownNameError: there is no such architecture, or transformers is not installed.
    """
    refuse_address(path)
    if arch == HF:
        if key or prefix or drop or weights or model_args:
            raise CheckpointError(f"{path}: config.json says all; give arch={HF!r} alone")
        return _load_folder(Path(path), max_bytes)
    if folder := purified_folder(Path(path)):
        raise CheckpointError(
            f"{path}: a purified model; read it by load_purified({str(folder)!r})"
        )
    read = load_weights(
        path, key=key, prefix=prefix, drop=drop, weights=weights, max_bytes=max_bytes
    )
    return built(read, arch, model_args, what=str(path), max_bytes=max_bytes)[0]


def built(
    weights: Weights,
    arch: str | None,
    model_args: Mapping[str, Any],
    *,
    what: str,
    max_bytes: int = MAX_BYTES,
) -> tuple[nn.Module, str, dict[str, Any], Weights]:
    """Build a timm model and load weights into it.

    Args:
        weights: as `load_weights` returns them.
        arch: timm name; by default the architecture that the weights name.
        model_args: see `load_model`.
        what: name of the weights in error messages.
        max_bytes: largest model.

    Returns:
        the model in eval mode, its timm name, all arguments it was built with, and the weights
        with the names of the model; their notes say how they were found.

    Raises:
        CheckpointError, UnknownNameError: see `load_model`.
    """
    arch = arch or weights.arch
    if arch is None:
        raise CheckpointError(f"{what}: the file does not name its architecture; give arch='...'")
    if arch == weights.config.get("architecture"):
        model_args = {**weights.config["model_args"], **model_args}
    empty, converter = _build_empty(arch, model_args), timm_converter(arch)
    if weights.purified:
        what += ", of a purified model whose record.json is not beside it"
    try:
        named = fitted(weights, empty, converter)
        arguments = complete(arch, model_args, named)
        model = create(arch, arguments, max_bytes=max_bytes)
        named = fitted(weights, model, converter)
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from error
    plain = arch.rpartition(":")[2].partition(".")[0]
    if weights.arch and weights.arch.partition(".")[0] != plain:
        other = f"it says that it is a {short(weights.arch)!r}, not a {arch!r}"
        named = named.with_tensors(named, other)
    fill_(model, named, f"{what} as {arch!r}")
    return model, arch, arguments, named


def create(arch: str, model_args: Mapping[str, Any], *, max_bytes: int = MAX_BYTES) -> nn.Module:
    """A model with new weights, in eval mode; global random generators are left as they were.

    Args:
        arch: timm name; "torchvision:NAME"; or "hf".
        model_args: of `timm.create_model` or torchvision's function; of "hf" the entry "config",
            with the content of config.json.
        max_bytes: largest model.

    Raises:
        UnknownNameError: there is no such architecture.
        CheckpointError: an argument does not fit, would read files, or makes the model too large.
    """
    check_size(arch, model_args, max_bytes=max_bytes)
    return _build(arch, model_args, "cpu").eval()


def check_size(arch: str, model_args: Mapping[str, Any], *, max_bytes: int = MAX_BYTES) -> None:
    """Raise what `create` raises; no memory is taken for weights."""
    empty = _build_empty(arch, model_args)
    size = sum(t.numel() * t.element_size() for t in (*empty.parameters(), *empty.buffers()))
    if size > max_bytes:
        raise CheckpointError(
            f"{arch!r} with {_shown(model_args)} takes {size:,} bytes, over the limit of "
            f"{max_bytes:,}; raise max_bytes if the model is meant to be that large"
        )


def complete(
    arch: str, model_args: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> dict[str, Any]:
    """`model_args`, and num_classes, in_chans and img_size as far as the weights determine them.

    Raises:
        UnknownNameError, CheckpointError: see `create`.
    """
    if arch == HF:
        return dict(model_args)
    if _is_torchvision(arch):
        empty_one = partial(_build_empty, arch)
        return {**torchvision_models.sizes_in(empty_one, model_args, weights), **model_args}
    others = {name: value for name, value in model_args.items() if name != "num_classes"}
    empty = _build_empty(arch, others)
    config: Mapping[str, Any] = getattr(empty, "pretrained_cfg", {})
    expected = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    sizes: dict[str, Any] = {}
    for layer in _layer_names(config.get("classifier")):
        if given.get(f"{layer}.weight"):
            sizes["num_classes"] = given[f"{layer}.weight"][0]
    for layer in _layer_names(config.get("first_conv")):
        new, old = (shapes.get(f"{layer}.weight", ()) for shapes in (given, expected))
        # a stem that rearranges pixels has a multiple of the images' channels
        if len(new) == len(old) >= 3 and new[1] != old[1] and 3 * new[1] % old[1] == 0:
            sizes["in_chans"] = 3 * new[1] // old[1]
    side = _image_size(empty, expected.get("pos_embed", ()), given.get("pos_embed", ()))
    if side is not None:
        sizes["img_size"] = side
    return {**sizes, **model_args}


def fill_(
    model: nn.Module, weights: Mapping[str, Tensor], what: str, *, keep_dtype: bool = False
) -> None:
    """Load weights in place; all names and shapes must match.

    Args:
        what: name of the weights in error messages.
        keep_dtype: change each tensor of the model to the dtype of its weights; otherwise weights
            are converted to the dtype of the model.

    Raises:
        CheckpointError: names or shapes differ; nothing was loaded.
    """
    state: dict[str, Tensor] = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
    }
    mismatches = {
        "missing": [name for name in state if name not in weights],
        "unexpected": [f"{name} {_form(weights[name])}" for name in weights if name not in state],
        "of another shape": [
            f"{name} {_form(weights[name])}, expected {_form(tensor)}"
            for name, tensor in state.items()
            if name in weights and not _fits(tensor, weights[name])
        ],
    }
    if any(mismatches.values()):
        text = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
            for kind, names in mismatches.items()
            if names
        )
        raise CheckpointError(
            f"the weights of {what} do not fit the model: {text}. Check the architecture and its "
            f"arguments{_DROP if mismatches['unexpected'] else ''}"
        )
    if keep_dtype:
        for name, tensor in state.items():
            tensor.data = tensor.data.to(weights[name].dtype)
    # not strict, because a model may keep extra state; names were checked above
    model.load_state_dict(dict(weights), strict=False)


def _build_empty(arch: str, model_args: Mapping[str, Any]) -> nn.Module:
    """The architecture on the meta device, where weights take no memory."""
    _check_name(arch)
    for name in model_args:
        if name in _FORBIDDEN:
            raise CheckpointError(f"{name!r} is no argument of an architecture; leave it out")
        if name not in _SIZES and _largest_number(model_args[name]) > _MAX_NUMBER:
            raise CheckpointError(
                f"{name!r} is over {_MAX_NUMBER:,}; give the value that the model was made with"
            )
    try:
        # time is limited, because an untrusted record may ask for many layers
        return within(
            _MAX_SECONDS,
            f"building {arch!r} with {_shown(model_args)}",
            lambda: _build(arch, model_args, "meta"),
        )
    except UnsupportedModelError as error:
        raise CheckpointError(str(error)) from error
    except CheckpointError as error:
        if "meta tensor" not in str(error):
            raise
        return _build(arch, model_args, "cpu")  # older versions of timm read values while building


def _largest_number(value: Any) -> float:
    """The largest absolute value of the numbers in plain data."""
    largest, pending = 0.0, [value]  # no recursion, since untrusted data may be nested deeply
    while pending:
        match pending.pop():
            case int() | float() as number:
                largest = max(largest, abs(number))
            case list() | tuple() as items:
                pending += items
            case dict() as entries:
                pending += entries.values()
    return largest


def _build(arch: str, model_args: Mapping[str, Any], device: str) -> nn.Module:
    maker: Callable[..., nn.Module]
    if arch == HF:
        library, maker = "transformers", transformers_models.build
    elif _is_torchvision(arch):
        library, maker = "torchvision", partial(torchvision_models.build, arch)
    else:
        import timm

        library, maker = "timm", partial(timm.create_model, arch, pretrained=False)
    try:
        with private_randomness(0), torch.device(device):
            return maker(**model_args)
    except CheckpointError:
        raise
    except Exception as error:  # arguments may be untrusted, and hardly any are checked
        raise CheckpointError(
            f"{library} cannot build {arch!r} with {_shown(model_args)} ({type(error).__name__}: "
            f"{error}); check the arguments"
        ) from error


def _shown(model_args: Mapping[str, Any]) -> str:
    """Arguments in messages; a whole configuration would fill the screen."""
    return reprlib.repr(dict(model_args)) if "config" in model_args else str(dict(model_args))


def _is_torchvision(arch: str) -> bool:
    return arch.startswith(torchvision_models.PREFIX)


def _load_folder(folder: Path, max_bytes: int) -> nn.Module:
    """A model of transformers, of which everything in the folder is data."""
    config = transformers_models.read_config(folder)
    check_size(HF, {"config": config}, max_bytes=max_bytes)
    weights = load_weights(folder, max_bytes=max_bytes)
    return transformers_models.filled(config, weights, str(folder), torch.float32)


def _check_name(arch: str) -> None:
    """Refuse names that are not registered; timm would look for some in a folder or a hub."""
    if arch == HF:
        transformers_models.check_installed()
    elif _is_torchvision(arch):
        torchvision_models.check_name(arch)
    else:
        _check_timm_name(arch)


def _check_timm_name(arch: str) -> None:
    import timm

    if not re.fullmatch(r"\w+(\.\w+)?", arch, re.ASCII) or not timm.is_model(arch):
        close = difflib.get_close_matches(arch[:100], timm.list_models(), n=3, cutoff=0.6)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise UnknownNameError(
            f"timm has no architecture {arch[:100]!r}{hint} (hubs, folders and paths are not read)"
        )


def _layer_names(entry: Any) -> tuple[str, ...]:
    """Layer names in an entry of timm's configuration: none, one or several."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _image_size(model: nn.Module, expected: tuple[int, ...], given: tuple[int, ...]) -> int | None:
    """Side in pixels of the square images that a position embedding was made for.

    Args:
        expected: shape of the model's position embedding, (1, tokens, width).
        given: shape of the one in the weights.

    Returns:
        None if the shapes are equal, or do not determine it.
    """
    patches = getattr(model, "patch_embed", None)
    patch = getattr(patches, "patch_size", None)
    if expected == given or len(expected) != 3 or len(given) != 3 or not isinstance(patch, tuple):
        return None
    class_tokens = expected[1] - int(getattr(patches, "num_patches", 0))
    tokens = given[1] - class_tokens
    rows = math.isqrt(max(tokens, 0))
    return rows * int(patch[0]) if rows and rows * rows == tokens and patch[0] == patch[1] else None


def _fits(tensor: Tensor, given: Tensor) -> bool:
    return tensor.shape == given.shape and tensor.is_floating_point() == given.is_floating_point()


def _form(tensor: Tensor) -> str:
    kind = "" if tensor.is_floating_point() else f" {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)}{kind}"
