"""Save and load a purified model: a folder with weights, a record and a report.

`model.safetensors` holds the weights, `record.json` how the model was made and how to rebuild it,
`report.json` the data of the report's pages, and `README.md` is a model card. Loading builds the
original architecture and cuts it down by the recipe in the record; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..core.copies import clone
from ..core.drift import allowed_drift, logit_drift
from ..core.outputs import logits_alone
from ..errors import CheckpointError, DataError
from ..removal.recipe import Recipe, compose
from ..reports.model_card import model_card
from ..reports.purified import Purified
from ..reports.report import Report
from ..utils.randomness import private_randomness
from ..utils.tensors import placement
from .architecture import check_size, complete, create, fill_
from .image_processor import preprocessing_of
from .limits import MAX_BYTES
from .record_file import (
    CARD,
    FILES,
    LIBRARY,
    RECORD,
    REPORT,
    WEIGHTS,
    purified_folder,
    read_record,
    record_of,
    sha256_of,
    to_json,
)
from .remote import refuse_address
from .safetensors_file import PURIFIED, read_safetensors, write_safetensors
from .transformers_models import HF, config_of, dtype_of, filled, write_folder

try:
    import fcntl
except ImportError:  # Windows, where drafts that a killed process left are not told apart
    fcntl = None  # type: ignore[assignment]

_PROBE = 2**16  # bytes written to see whether the disk takes any


def save_purified(
    purified: Purified,
    folder: str | os.PathLike[str],
    *,
    arch: str | None,
    model_args: Mapping[str, Any] | None = None,
    earlier: Recipe | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a purified model, with a record of how it was made, to a folder.

    The folder is complete or not there at all: after any error, the disk is as it was before. With
    a timm architecture, the model is loaded back from the new folder and its logits are compared,
    so that a wrong `arch` or argument is noticed now.

    Args:
        folder: a new folder, or with `overwrite` one that this function wrote.
        arch: name of the original architecture, as for `load_model`. None if it has none; then
            `load_purified` needs a network of that architecture. With "hf", and nothing removed
            from the tensors, the folder is also one that `from_pretrained` of transformers loads.
        model_args: other arguments of the architecture, as plain data. num_classes, in_chans and
            img_size are read from the weights where they are not given.
        earlier: for a model that was purified before: the recipe in the record of that.
        overwrite: replace a folder that this function wrote.

    Returns:
        The absolute path of the folder.

    Raises:
        CheckpointError: the folder exists or appears meanwhile, cannot be written, an argument is
            not plain data, or the model that is loaded back does not fit the weights or computes
            other logits.
        UnknownNameError: there is no such architecture.
        UnsupportedModelError: `arch` is not the architecture that was purified.
    """
    check_encodable(Path(folder))
    folder = Path(folder).resolve()
    state = tensors_of(purified.model)
    check_free(folder, overwrite=overwrite, size=sum(tensor.nbytes for tensor in state.values()))
    arguments = _plain_arguments(model_args or {})
    if arch == HF:
        arguments = {"config": config_of(purified.model), **arguments}
    if arch is not None:
        arguments = _plain_arguments(complete(arch, arguments, state))
    elif arguments:
        raise CheckpointError("model_args are for a timm architecture; give arch too")
    recipe = compose(earlier or Recipe(), purified.recipe)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _draft(folder) as draft:
            _write(purified, draft, state, arch, arguments, recipe=recipe)
            _move(draft, folder, overwrite)
            _sync(folder.parent)
    except (OSError, SafetensorError, UnicodeError) as error:
        raise CheckpointError(
            f"{folder}: cannot be written ({error}); free space on the disk, or give another folder"
        ) from error
    return folder


def _write(
    purified: Purified,
    draft: Path,
    state: dict[str, Tensor],
    arch: str | None,
    arguments: dict[str, Any],
    *,
    recipe: Recipe,
) -> None:
    """Write all files into the draft, and load the model back from there."""
    if arch == HF and not recipe:
        write_folder(clone(purified.model).cpu(), draft, _processor_of(purified, arguments))
    else:
        write_safetensors(draft / WEIGHTS, state, {"format": "pt", PURIFIED: "purified"})
    report = purified.to_dict()
    sha256 = sha256_of(draft / WEIGHTS)
    record = record_of(purified, report, arch, arguments, sha256=sha256, recipe=recipe)
    for name, content in ((RECORD, record), (REPORT, report)):
        (draft / name).write_text(to_json(content), encoding="utf-8")
    card = model_card(Report.of(purified), arch=arch, sha256=sha256)
    (draft / CARD).write_text(card, encoding="utf-8")
    (draft / WEIGHTS).chmod((draft / RECORD).stat().st_mode)  # safetensors: owner only
    if arch is not None:
        _check_logits(purified, draft)
    for path in (*draft.iterdir(), draft):
        _sync(path)


def _processor_of(purified: Purified, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """What preprocessor_config.json is to say; None where the images were prepared otherwise."""
    processor, used = arguments.get("processor"), purified.source.get("preprocessing")
    if processor is None:
        return None
    try:
        alike = used in (None, preprocessing_of(processor).to_dict())
    except DataError:  # it says what cannot be done here
        alike = used is None
    return dict(processor) if alike else None


def load_purified(
    folder: str | os.PathLike[str], *, model: nn.Module | None = None, max_bytes: int = MAX_BYTES
) -> nn.Module:
    """The model that `save_purified` wrote; on the same machine, with exactly the same logits.

    Args:
        folder: the folder that `save_purified` wrote, or model.safetensors in it.
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
    refuse_address(folder)
    folder = purified_folder(Path(folder)) or Path(folder)
    record = read_record(folder)
    weights = read_safetensors(folder / WEIGHTS, max_bytes=max_bytes)
    if sha256_of(folder / WEIGHTS) != record["weights"].get("sha256"):
        raise CheckpointError(
            f"{folder / WEIGHTS}: the SHA-256 is not the one in the record, so the file is "
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
    elif name == HF and not recipe:
        check_size(name, arguments, max_bytes=max_bytes)
        return filled(arguments["config"], weights, str(folder), dtype_of(weights))
    else:
        arguments = arguments if name == HF else _tuples(arguments)
        network = create(name, arguments, max_bytes=max_bytes)
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
    shape = purified.given.example.shape
    with private_randomness(0), torch.no_grad():
        images = torch.randn(2, *shape)
        model = logits_alone(purified.model, images).cpu()
        loaded = load_purified(draft, max_bytes=sys.maxsize)
        images = images.to(**placement(model))
        expected = model(images)
        try:
            logits = logits_alone(loaded, images)(images)
            drift = logit_drift(expected, logits)
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


def check_free(folder: Path, *, overwrite: bool = False, size: int = 0) -> None:
    """Raise CheckpointError if `save_purified` could not write this folder.

    It is meant to be called before long work.

    Args:
        size: bytes that will be written at least.
    """
    check_encodable(folder)
    try:
        parent = next(parent for parent in folder.parents if parent.exists())
        _delete_stale(parent / folder.name)
        if folder.exists():
            _check_replaceable(folder, overwrite)
        # to ask for access rights is not enough: the disk may be read-only, the name too long
        with _draft(parent / folder.name) as draft:
            (draft / WEIGHTS).write_bytes(bytes(_PROBE))  # a full disk still makes folders
        free = shutil.disk_usage(parent).free
    except OSError as error:
        raise CheckpointError(
            f"{folder}: {folder.parent} cannot be written to ({error.strerror}); give another "
            "folder"
        ) from error
    if free < size:
        raise CheckpointError(
            f"{folder}: {size:,} bytes do not fit on the disk, which has {free:,} left; free "
            "space, or give another folder"
        )


def check_encodable(path: Path) -> None:
    """Raise CheckpointError unless the path is text that can be written and printed anywhere.

    Python holds bytes of a command line that are not UTF-8 as lone surrogates.
    """
    try:
        os.fspath(path).encode("utf-8")
        os.fsencode(path)
        if "\0" in os.fspath(path):
            raise ValueError("a null byte is in it")
    except ValueError as error:
        raise CheckpointError(
            f"{str(path)!a}: the name cannot be written here ({error}); give a name in UTF-8"
        ) from error


@contextlib.contextmanager
def _draft(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder`, to be written first and renamed when complete.

    It is deleted at the end. Those that dead processes left are deleted too: the lock on a draft
    is the operating system's, so that it ends with the process, whatever killed it.
    """
    _delete_stale(folder)
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}")
    lock = draft.with_name(f"{draft.name}.lock")
    with _locked(lock):
        try:
            draft.mkdir()
            yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _delete_stale(folder: Path) -> None:
    """Delete drafts of this folder whose process is dead; without locks none is."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{12}}\.lock")
    for lock in folder.parent.iterdir() if fcntl is not None else ():
        if not pattern.fullmatch(lock.name) or lock.is_symlink():
            continue
        draft = lock.with_suffix("")
        with contextlib.suppress(OSError), _locked(lock, new=False):  # BlockingIOError: it lives
            _put_back(draft.with_name(f"{draft.name}.old"), folder)
            shutil.rmtree(draft, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _put_back(old: Path, folder: Path) -> None:
    """What a process that died while it replaced `folder` had set aside: back, or away."""
    if not old.is_dir():
        return
    try:
        old.replace(folder)  # fails where the new one is in its place
    except OSError:
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _locked(lock: Path, *, new: bool = True) -> Iterator[None]:
    """Hold the lock of a draft; BlockingIOError where another process or thread does."""
    flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if new else 0) | getattr(os, "O_NOFOLLOW", 0)
    handle = os.open(lock, flags, 0o600)
    try:
        if fcntl is not None:
            with contextlib.nullcontext() if not new else contextlib.suppress(OSError):  # no locks
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if new else fcntl.LOCK_NB))
        yield
    finally:
        os.close(handle)


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: a file is there; give the name of a new folder")
    names = {path.name for path in folder.iterdir()}
    if not names:
        return
    if not overwrite:
        raise CheckpointError(f"{folder}: not empty; give another folder, or overwrite=True")
    if others := sorted(names - set(FILES)):
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


def _move(draft: Path, folder: Path, overwrite: bool) -> None:
    """Rename the draft to `folder`; the old folder is deleted last, or put back on errors.

    What is there is looked at again, since it may have appeared meanwhile. To rename a folder onto
    another one fails, unless that is empty, so of several that save to one name one succeeds.
    """
    old = draft.with_name(f"{draft.name}.old")
    taken = f"{folder}: appeared while this model was saved; give another folder"
    try:
        if overwrite and folder.exists():
            _check_replaceable(folder, overwrite)
            folder.replace(old)
            _check_replaceable(old, overwrite)  # nothing was added between
        elif os.name == "nt" and folder.is_dir():
            folder.rmdir()  # Windows renames onto no folder, not even an empty one
        try:
            draft.replace(folder)
        except OSError as error:
            if os.path.lexists(folder):
                raise CheckpointError(taken) from error
            raise
    except BaseException:
        if old.exists():
            _put_back(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Flush to the disk, so that a crash cannot leave a name without its content."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
