"""Save and load a purified model: a folder with weights, a record and a report.

`model.safetensors` holds the weights, `record.json` how the model was made and how to rebuild it,
and `report.json` the data of the report's pages. Loading builds the original architecture and cuts
it down by the recipe in the record; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.copies import clone, frozen_copy
from ..errors import CheckpointError
from ..removal.compaction import allowed_drift
from ..removal.recipe import Recipe
from ..reports.purified import Purified
from ..utils.randomness import private_randomness
from ..utils.tensors import placement
from .architecture import complete, create, fill_
from .checkpoint import MAX_BYTES, read_safetensors
from .record_file import LIBRARY, RECORD, REPORT, read_record, record_of, to_json

_WEIGHTS = "model.safetensors"

_FILES = (_WEIGHTS, RECORD, REPORT)


def save_purified(
    purified: Purified,
    folder: str | os.PathLike[str],
    *,
    arch: str | None,
    model_args: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a purified model, with a record of how it was made, to a folder.

    The folder is complete or not there at all: after any error, the disk is as it was before. With
    a timm architecture, the model is loaded back from the new folder and its logits are compared,
    so that a wrong `arch` or argument is noticed now.

    Args:
        folder: a new folder, or with `overwrite` one that this function wrote.
        arch: timm name of the original architecture. None if timm does not have it; then
            `load_purified` needs a network of that architecture.
        model_args: other arguments of `timm.create_model`, as plain data. num_classes, in_chans and
            img_size are read from the weights where they are not given.
        overwrite: replace a folder that this function wrote.

    Returns:
        The absolute path of the folder.

    Raises:
        CheckpointError: the folder exists, an argument is not plain data, or the model that is
            loaded back does not fit the weights or computes other logits.
        UnknownNameError: timm has no such architecture.
        UnsupportedModelError: `arch` is not the architecture that was purified.
    """
    folder = Path(folder).resolve()
    check_free(folder, overwrite=overwrite)
    state = tensors_of(purified.model)
    arguments = _plain_arguments(model_args or {})
    if arch is not None:
        arguments = _plain_arguments(complete(arch, arguments, state))
    elif arguments:
        raise CheckpointError("model_args are for a timm architecture; give arch too")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft_of(folder)
    try:
        draft.mkdir()
        save_file(state, os.fspath(draft / _WEIGHTS), {"format": "pt"})
        report = purified.to_dict()
        record = record_of(purified, report, arch, arguments, _sha256(draft / _WEIGHTS))
        for name, content in ((RECORD, record), (REPORT, report)):
            (draft / name).write_text(to_json(content), encoding="utf-8")
        (draft / _WEIGHTS).chmod((draft / RECORD).stat().st_mode)  # safetensors: owner only
        if arch is not None:
            _check_logits(purified, draft)
        for path in (*(draft / name for name in _FILES), draft):
            _sync(path)
        _move(draft, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def load_purified(
    folder: str | os.PathLike[str], *, model: nn.Module | None = None, max_bytes: int = MAX_BYTES
) -> nn.Module:
    """The model that `save_purified` wrote; on the same machine, with exactly the same logits.

    Args:
        folder: the folder that `save_purified` wrote.
        model: a network of the original architecture with any weights, used instead of the recorded
            architecture; needed if timm does not have it. It is copied. It must not be on the
            device "meta", since tensors outside its state dict could not be filled.
        max_bytes: largest weights file, and largest original architecture.

    Returns:
        The smaller model in eval mode, on the CPU, in the dtypes of the saved weights.

    Raises:
        CheckpointError: the record cannot be read (see `read_record`), the weights do not fit or
            are not those of the record, or there is neither a recorded architecture nor a model.
        DataError: the recipe in the record is malformed.
        UnsupportedModelError: the recipe is for another architecture, or the model cannot be copied
            (see `core.copies.clone`).
    """
    folder = Path(folder)
    record = read_record(folder)
    weights = read_safetensors(folder / _WEIGHTS, max_bytes=max_bytes)
    if _sha256(folder / _WEIGHTS) != record["weights"].get("sha256"):
        raise CheckpointError(
            f"{folder / _WEIGHTS}: the SHA-256 is not the one in the record, so the file is "
            "damaged or was replaced; get the folder again"
        )
    recipe = Recipe.from_dict(record["recipe"])
    name, arguments = (record["architecture"].get(entry) for entry in ("name", "arguments"))
    if model is not None:
        network = clone(model).cpu()
    elif name is None:
        raise CheckpointError(
            f"{folder}: saved without an architecture; give a network of the original one: "
            "load_purified(folder, model=...)"
        )
    else:
        network = create(name, _tuples(arguments), max_bytes=max_bytes)
    smaller = recipe.apply_(network)
    fill_(smaller, weights, str(folder), keep_dtype=True)
    return smaller.eval()


def _plain_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments after a round trip through JSON; CheckpointError if JSON cannot hold them."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(arguments), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"model_args cannot be written as plain data ({error}); give names instead of "
            "classes, or save with arch=None"
        ) from error
    return plain


def _tuples(value: Any) -> Any:
    """Plain data with tuples, which timm expects, in place of JSON's lists."""
    if isinstance(value, dict):
        return {name: _tuples(entry) for name, entry in value.items()}
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value


def _check_logits(purified: Purified, draft: Path) -> None:
    """Raise CheckpointError unless the saved model computes the logits of the purified one."""
    model, loaded = frozen_copy(purified.model).cpu(), load_purified(draft, max_bytes=sys.maxsize)
    shape = purified.given.example.shape
    with private_randomness(0), torch.no_grad():
        images = torch.randn(2, *shape).to(**placement(model))
        expected = model(images)
        try:
            logits = loaded(images)
            drift = float((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
            wrong = f"computes something else (relative drift {drift:.1e})"
        except Exception as error:  # a network may raise anything on images of another size
            drift, wrong = math.inf, f"does not run on images {tuple(shape)} ({error})"
    if not drift <= allowed_drift(expected.dtype):
        raise CheckpointError(
            f"the model rebuilt from arch and model_args {wrong}; give all the arguments that the "
            "original was made with, img_size among them, or save with arch=None"
        )


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model as contiguous copies on the CPU, since safetensors needs both."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor)
    }


def check_free(folder: Path, *, overwrite: bool = False) -> None:
    """Raise CheckpointError if `save_purified` could not write this folder.

    It is meant to be called before long work.
    """
    if folder.exists():
        _check_replaceable(folder, overwrite)
    parent = next(parent for parent in folder.parents if parent.exists())
    draft = _draft_of(parent / folder.name)
    try:  # to ask for access rights is not enough: the disk may be read-only, the name too long
        draft.mkdir()
        draft.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"{folder}: {parent} cannot be written to ({error.strerror}); give another folder"
        ) from error


def _draft_of(folder: Path) -> Path:
    """A hidden folder beside it, which is written first and renamed when it is complete."""
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}")


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: a file is there; give the name of a new folder")
    names = {path.name for path in folder.iterdir()}
    if not names:
        return
    if not overwrite:
        raise CheckpointError(f"{folder}: not empty; give another folder, or overwrite=True")
    if others := sorted(names - set(_FILES)):
        raise CheckpointError(
            f"{folder}: not replaced, since it holds {others[0]!r}; give another folder"
        )
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        replaceable = record["library"] == LIBRARY
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        replaceable = False
    if not replaceable:
        raise CheckpointError(
            f"{folder}: not replaced, since save_purified did not write it; give another folder"
        )


def _move(draft: Path, folder: Path) -> None:
    """Rename the draft to `folder`; the old folder is deleted last, or put back on errors."""
    old = draft.with_name(f"{draft.name}.old")
    try:
        if folder.exists():
            folder.replace(old)
        draft.replace(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.replace(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush to the disk, so that a crash cannot leave a name without its content."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
