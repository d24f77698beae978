"""Files of scores and of selections: safetensors, with all that is no tensor as JSON in the header.

No pickle is involved. A file says what it was made from, so that it is not used for anything else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import DataError
from ..utils.short_repr import ShortRepr
from ..utils.whole_file import write_whole
from .recovered import RecoveredTrigger
from .sites import Site

_PLAIN = ("target", "success", "tested", "steps")  # of a trigger

_SHOWN = 120  # characters of a value that a message shows


@dataclass(frozen=True, eq=False, repr=False)
class Stored(ShortRepr):
    """What such a file holds.

    Attributes:
        header: What is neither a tensor nor one of the others.
        sites: The layers scored.
        triggers: Recovered triggers.
        tensors: Tensors by name, without those of the triggers.
    """

    header: dict[str, Any]
    sites: tuple[Site, ...]
    triggers: tuple[RecoveredTrigger, ...]
    tensors: dict[str, Tensor]


def write_stored(path: str | os.PathLike[str], kind: str, stored: Stored) -> None:
    """Write the file whole, or leave what was there before.

    Args:
        kind: "scores" or "selection".

    Raises:
        DataError: the header is not plain data.
        OutputError: it cannot be written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in stored.tensors.items()}
    for i, trigger in enumerate(stored.triggers):
        tensors |= {f"mask{i}": trigger.mask.contiguous()}
        tensors |= {f"pattern{i}": trigger.pattern.contiguous()}
    header = {
        **stored.header,
        "sites": [asdict(site) for site in stored.sites],
        "triggers": [{name: getattr(t, name) for name in _PLAIN} for t in stored.triggers],
    }
    try:
        text = json.dumps(header)
    except TypeError as error:
        raise DataError(
            f"{kind} with details that are not plain data cannot be saved ({error}); give numbers, "
            "texts, lists and dictionaries alone"
        ) from error
    write_whole(path, save(tensors, {kind: text}))


def read_stored(path: str | os.PathLike[str], kind: str, names: Sequence[str]) -> Stored:
    """Read what `write_stored` wrote.

    Args:
        kind: as it was written.
        names: entries that the header must have.

    Raises:
        DataError: the file holds something else, or is damaged.
        OSError: there is no such file.
    """
    shown = repr(os.fspath(path))
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            text = (file.metadata() or {}).get(kind)
            if text is None:
                raise DataError(f"{shown} holds no {kind}; give a file that save() wrote")
            header = json.loads(text)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        sites = tuple(Site(**site) for site in header.pop("sites"))
        triggers = tuple(
            RecoveredTrigger(mask=tensors.pop(f"mask{i}"), pattern=tensors.pop(f"pattern{i}"), **t)
            for i, t in enumerate(header.pop("triggers", []))
        )
        if not all(isinstance(header.get(name, {}), dict) for name in ("made_from", "details")):
            raise TypeError("made_from and details are no dictionaries")
        if missing := [name for name in names if name not in header]:
            raise KeyError(*missing)
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{shown} is damaged ({type(error).__name__}: {error}); delete it, and it is written "
            "anew"
        ) from error
    return Stored(header, sites, triggers, tensors)


def check_made_from(where: str, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Raise DataError where scores or a selection were made from something else.

    Args:
        where: the file, for the message.
        found: what they were made from.
        wanted: what they would be made from now.
    """
    for name, value in wanted.items():
        if (there := found.get(name)) != value:
            was = "not recorded" if there is None else _short(there)
            raise DataError(
                f"{where} was made from other things ({name}: {was}; here {_short(value)}); give "
                "the same model, images, seed and settings, or the name of a new file"
            )


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
