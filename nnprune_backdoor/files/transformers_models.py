"""Image classifiers of `transformers` from a local folder; nothing in it is run.

Of config.json only plain settings are used, for a class that `transformers` itself has. Weights are
read by this package, and handed over as tensors, since `transformers` knows the names that they had
in its older versions.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, UnknownNameError
from .remote import how_to_fetch, refuse_address
from .strict_json import read_json

HF = "hf"  # in the place of an architecture's name

CONFIG = "config.json"

PROCESSOR = "preprocessor_config.json"

_WHOSE = "a folder with config.json and weights, as save_pretrained of transformers writes"

# settings that would choose code, or another way to load; an architecture has none of them
_IGNORED = ("auto_map", "fusion_config", "kernel_config", "distributed_config", "torch_dtype")

_COUNTER = "num_batches_tracked"  # of BatchNorm; no output depends on it in eval mode


def check_installed() -> None:
    """Raise UnknownNameError if transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise UnknownNameError(
            f"{HF!r} needs transformers: pip install 'nnprune-backdoor[transformers]'"
        )


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The plain settings in config.json; CheckpointError if there are none."""
    refuse_address(folder)
    path = Path(folder)
    if not path.is_dir():
        text = str(folder)
        fetch = f"; fetch it yourself:\n{how_to_fetch(text)}" if text.count("/") == 1 else ""
        raise CheckpointError(f"{text}: no such folder; give {_WHOSE}{fetch}")
    config = read_json(path / CONFIG, _WHOSE)
    if "quantization_config" in config:
        raise CheckpointError(
            f"{path / CONFIG}: the weights are quantised, and cannot be masked or trained; get "
            "them as they were before"
        )
    if "model_type" not in config and "architecture" in config:
        raise CheckpointError(
            f"{path}: a model of timm; leave out the architecture, or give "
            f"{str(config['architecture'])[:100]!r}"
        )
    return plain_settings(config)


def plain_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that choose code, as lists and dicts of their own."""
    kept: dict[str, Any] = json.loads(json.dumps(dict(config)))
    waiting: list[Any] = [kept]
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict):
            for name in list(here):
                if name.startswith("_") or name.endswith("_implementation") or name in _IGNORED:
                    del here[name]
            waiting += here.values()
        elif isinstance(here, list):
            waiting += here
    return kept


def config_of(model: nn.Module) -> dict[str, Any]:
    """The settings of a model of transformers; CheckpointError for another one."""
    config = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        raise CheckpointError(
            f"{type(model).__name__} is no model of transformers; leave out arch={HF!r}"
        )
    settings = json.loads(config.to_json_string(use_diff=False))  # type: ignore[union-attr]
    return plain_settings({**settings, "architectures": [type(model).__name__]})


def build(*, config: Mapping[str, Any], processor: object = None) -> nn.Module:
    """A model with new weights.

    Args:
        config: the content of config.json.
        processor: that of preprocessor_config.json, of which the model does not depend.

    Raises:
        CheckpointError: transformers has no such image classifier.
    """
    kind, settings = _kind(config)
    with _quiet():
        model: nn.Module = kind(settings)
    return model


def filled(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], what: str, dtype: torch.dtype
) -> nn.Module:
    """A model with these weights, by the names of any version of transformers; in eval mode.

    Raises:
        CheckpointError: a tensor of the model does not come from the weights, or one of the weights
            is not the model's.
    """
    kind, settings = _kind(config)
    try:
        with _quiet():
            model, found = kind.from_pretrained(
                None,
                config=settings,
                state_dict=dict(weights),
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are listed, and refused here
            )
    except Exception as error:  # whatever transformers raises on weights of another model
        raise CheckpointError(f"{what}: transformers cannot load it ({error})") from error
    wrong = {
        "missing": [name for name in found["missing_keys"] if not name.endswith(_COUNTER)],
        "unexpected": list(found["unexpected_keys"]),
        "of another shape": [str(entry) for entry in found["mismatched_keys"]],
    }
    if any(wrong.values()):
        text = "; ".join(
            f"{len(names)} {kind}: {', '.join(sorted(names)[:4])}{', ...' if names[4:] else ''}"
            for kind, names in wrong.items()
            if names
        )
        raise CheckpointError(f"{what}: the weights do not fit config.json: {text}")
    plain: nn.Module = model.eval()
    return plain


def dtype_of(weights: Mapping[str, Tensor]) -> torch.dtype:
    """The type of all weights; single precision where they have several."""
    found = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    return found.pop() if len(found) == 1 else torch.float32


def write_folder(
    model: nn.Module, folder: Path, processor: Mapping[str, Any] | None = None
) -> None:
    """Write weights, config.json and, where it is known, preprocessor_config.json.

    Args:
        model: of transformers, in the shape that its configuration says.
    """
    with _quiet():
        model.save_pretrained(folder, max_shard_size="1000TB")  # type: ignore[operator]
    if processor is not None:
        text = json.dumps(dict(processor), indent=2) + "\n"
        (folder / PROCESSOR).write_text(text, encoding="utf-8")


def _kind(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """The class of a model and its configuration; both are transformers' own."""
    check_installed()
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as KNOWN,
    )

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in KNOWN or kind == "timm_wrapper":
        raise CheckpointError(
            f"{CONFIG}: transformers has no image classifier of model_type {str(kind)[:100]!r}, "
            "other than by code from a hub, which is not run"
        )
    classes = (KNOWN[kind],) if isinstance(KNOWN[kind], str) else tuple(KNOWN[kind])
    named = config.get("architectures") or classes
    name = named[0] if isinstance(named, (list, tuple)) else named
    if name not in classes:
        raise CheckpointError(
            f"{CONFIG}: {str(name)[:100]!r} is no image classifier; expected {' or '.join(classes)}"
        )
    model_class = getattr(transformers, name)
    if model_class.main_input_name != "pixel_values":
        raise CheckpointError(f"{CONFIG}: {name} does not take images (N, C, H, W)")
    settings = plain_settings(config)
    try:
        with _quiet():
            return model_class, CONFIG_MAPPING[kind].from_dict(settings)
    except Exception as error:  # settings may be untrusted
        raise CheckpointError(
            f"{CONFIG}: transformers cannot use it ({type(error).__name__}: {error})"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and reports of transformers inside; what they say is checked here."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
