"""A purified model on disk: a folder with its weights, a record and a report.

`model.safetensors` holds the weights, `record.json` what rebuilds the model and says how it came
about, `report.json` what the report's pages are laid out from. The smaller model is rebuilt from a
fresh network by the recipe; nothing is unpickled.
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
from .record_file import LIBRARY, RECORD, REPORT, read_record, record_of, written

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
    """Write a purified model and the record of its making to a folder, all or nothing.

    With a timm architecture the folder is loaded back before it gets its name, and the logits
    are compared, so that a wrong `arch` or argument is found now.

    Args:
        folder: is made; one that is there already is only replaced on request.
        arch: timm name of the original architecture; None for a model that timm does not have,
            which `load_purified` then needs a fresh copy of.
        model_args: arguments of `timm.create_model` beside the name, plain values; num_classes,
            in_chans and img_size are found from the weights if left out.
        overwrite: replace the folder, if it is one that this function wrote.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder exists, an argument is not plain data, or what was written
            does not fit or does not compute the same.
        UnknownNameError: timm has no such architecture.
        UnsupportedModelError: the recipe was made for another architecture.
            Whatever is raised, what was on disk before is there as it was.
    """
    folder = Path(folder).resolve()
    check_free(folder, overwrite=overwrite)
    state = tensors_of(purified.model)
    arguments = _plain_arguments(model_args or {})
    if arch is not None:
        arguments = _plain_arguments(complete(arch, arguments, state))
    elif arguments:
        raise CheckpointError("model_args are arguments of a timm architecture; give arch too")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft_of(folder)
    try:
        draft.mkdir()
        save_file(state, os.fspath(draft / _WEIGHTS), {"format": "pt"})
        report = purified.to_dict()
        record = record_of(purified, report, arch, arguments, _sha256(draft / _WEIGHTS))
        for name, content in ((RECORD, record), (REPORT, report)):
            (draft / name).write_text(written(content), encoding="utf-8")
        (draft / _WEIGHTS).chmod((draft / RECORD).stat().st_mode)  # safetensors lets nobody read
        if arch is not None:
            _check_computes_the_same(purified, draft)
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
    """The model that `save_purified` wrote; same machine, same logits to the bit.

    Args:
        model: a network of the original architecture, where timm does not have it; it is copied,
            and taken in place of a recorded architecture. It has weights (any), is not on "meta":
            what a network keeps beside its state could not be filled.
        max_bytes: largest weights file, and largest original architecture.

    Returns:
        The smaller model in eval mode, on the CPU; types are those of the saved weights.

    Raises:
        CheckpointError: see `read_record`; the weights are not those of the record, or do not
            fit; no architecture is recorded and no model given.
        DataError, UnsupportedModelError: the recipe is malformed, or for another architecture; the
            given model cannot be copied (see `guard.copied`).
    """
    folder = Path(folder)
    record = read_record(folder)
    weights = read_safetensors(folder / _WEIGHTS, max_bytes=max_bytes)
    if _sha256(folder / _WEIGHTS) != record["weights"].get("sha256"):
        raise CheckpointError(
            f"{folder / _WEIGHTS}: not the weights that the record was written with (SHA-256 "
            "differs); the file is damaged or was exchanged"
        )
    recipe = Recipe.from_dict(record["recipe"])
    name, arguments = (record["architecture"].get(entry) for entry in ("name", "arguments"))
    if model is not None:
        fresh = clone(model).cpu()
    elif name is None:
        raise CheckpointError(
            f"{folder}: saved without an architecture; give a fresh one: load_purified(folder, "
            "model=...)"
        )
    else:
        fresh = create(name, _tuples(arguments), max_bytes=max_bytes)
    product = recipe.apply_(fresh)
    fill_(product, weights, str(folder), keep_dtype=True)
    return product.eval()


def _plain_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as JSON gives them back; what it cannot hold is refused, not described."""
    try:
        held: dict[str, Any] = json.loads(json.dumps(dict(arguments), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"model_args cannot be written as plain data ({error}); give names in place of "
            "classes, or save with arch=None"
        ) from error
    return held


def _tuples(value: Any) -> Any:
    """JSON has lists alone, and timm expects tuples."""
    if isinstance(value, dict):
        return {name: _tuples(entry) for name, entry in value.items()}
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value


def _check_computes_the_same(purified: Purified, draft: Path) -> None:
    own, again = frozen_copy(purified.model).cpu(), load_purified(draft, max_bytes=sys.maxsize)
    shape = purified.given.example.shape
    with private_randomness(0), torch.no_grad():
        images = torch.randn(2, *shape).to(**placement(own))
        wanted = own(images)
        try:
            got = again(images)
            drift = float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
            found = f"computes something else (relative drift {drift:.1e})"
        except Exception as error:  # whatever a network does with images it was not made for
            drift, found = math.inf, f"does not run on images {tuple(shape)} ({error})"
    if not drift <= allowed_drift(wanted.dtype):
        raise CheckpointError(
            f"the model that was rebuilt from arch and model_args {found}; give the arguments that "
            "the original was made with, img_size among them, or save with arch=None"
        )


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model as safetensors takes it: copies, since shared memory is refused."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor)
    }


def check_free(folder: Path, *, overwrite: bool = False) -> None:
    """Before long work: raise CheckpointError where `save_purified` would not or cannot write."""
    if folder.exists():
        _check_replaceable(folder, overwrite)
    there = next(parent for parent in folder.parents if parent.exists())  # the others are made
    draft = _draft_of(there / folder.name)
    try:  # access rights alone do not say it: the disk may be read-only, the name too long
        draft.mkdir()
        draft.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"{folder}: {there} cannot be written to ({error.strerror}); give another folder"
        ) from error


def _draft_of(folder: Path) -> Path:
    """Where it is written before it gets its name."""
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}")


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: a file is there; give a folder that is not there yet")
    held = {path.name for path in folder.iterdir()}
    if not held:
        return
    if not overwrite:
        raise CheckpointError(f"{folder}: not empty; give another folder, or overwrite=True")
    if others := sorted(held - set(_FILES)):
        raise CheckpointError(f"{folder}: holds {others[0]!r}, so it is not replaced")
    try:
        ours = json.loads((folder / RECORD).read_text(encoding="utf-8"))["library"] == LIBRARY
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        ours = False
    if not ours:
        raise CheckpointError(f"{folder}: save_purified did not write it, so it is not replaced")


def _move(draft: Path, folder: Path) -> None:
    """Give the draft its name; what had it before goes when that is done, or comes back."""
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
    """To the disk, so that a crash cannot leave a name without its content."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
