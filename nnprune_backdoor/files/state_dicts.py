"""Find the entry that holds the weights among all that a training script saved."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ..errors import CheckpointError
from .pickle_objects import StandIn
from .stored_tensors import StoredTensor

Kind = Literal["plain", "ema"]

Leaf = StoredTensor | Tensor  # a tensor in a file, or one read already
LEAF = (StoredTensor, Tensor)

# entries that hold the weights as they were trained, most usual first
_PLAIN = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")

# entries that hold their exponential moving average, or another average
_AVERAGED = (
    "state_dict_ema",
    "ema_state_dict",
    "model_ema_state_dict",
    "model_ema",
    "ema_model",
    "params_ema",
    "ema",
    "swa_model",
    "averaged_model",
)

_MAX_NESTING = 5

_MAX_PARTS = 100_000  # modules, parameters and buffers of a pickled module

_HOLDERS = ("_parameters", "_buffers", "_modules")  # attributes in which a module keeps them

_LOOKED_AT = 1000  # entries in which tensors are looked for, and as many in each of them


@dataclass
class Found:
    """The entry that holds the weights.

    Attributes:
        entries: Name -> what is under it, tensors and other things.
        path: The keys that led there.
        averaged: Whether it is an average of the weights.
        arch: The entry "arch" of the file, whatever it is.
        notes: What was passed over on the way, a sentence each.
    """

    entries: Mapping[Any, Any]
    path: list[str] = field(default_factory=list)
    averaged: bool = False
    arch: Any = None
    notes: list[str] = field(default_factory=list)


def unwrap(content: Any, key: str | None, weights: Kind | None) -> Found:
    """The innermost dictionary of weights.

    Args:
        content: of a file.
        key: its entry that holds the weights; None to look for one of the usual names.
        weights: "plain" or "ema" where both are there; None for plain ones, else averaged ones.

    Raises:
        CheckpointError: there are none, or several that might be meant; the text lacks the file.
    """
    found = Found({})
    for depth in range(_MAX_NESTING):
        entries = entries_of(content)
        if entries is None:
            break
        found.entries, found.arch = entries, entries.get("arch", found.arch)
        if isinstance(content, StandIn):
            found.notes.append(
                f"took the tensors of a pickled {content.name}; its code was not run"
            )
        chosen = _given(entries, key) if depth == 0 and key else _chosen(found, entries, weights)
        if chosen is None:
            return found
        found.path.append(chosen)
        found.averaged = found.averaged or chosen in _AVERAGED
        found.notes.append(f"took {chosen!r} of {listed(entries)}")
        content = entries[chosen]
    raise CheckpointError(
        f"expected a dictionary of tensors, got {_type(content)}"
        f" ({'; '.join(found.notes) or 'at the top'})"
    )


def entries_of(value: Any) -> Mapping[Any, Any] | None:
    """What is in a dictionary, or in what stands for one or for a module; None for all else."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, StandIn):
        return None
    if value.entries:
        return value.entries
    return _module_entries(value) if _is_module(value) else None


def _may_hold_tensors(value: Any, kinds: tuple[type, ...] = (*LEAF, dict, StandIn)) -> bool:
    """Whether one of these is near the top of it: settings may have a usual name too."""
    if _is_module(value) and not value.entries:
        inside = [value.state.get(holder) for holder in _HOLDERS]
        return any(_may_hold_tensors(entries) for entries in inside if isinstance(entries, dict))
    inner = value.entries if isinstance(value, StandIn) else value
    inner = inner.values() if isinstance(inner, dict) else ()
    return any(isinstance(entry, kinds) for entry in itertools.islice(inner, _LOOKED_AT))


def _given(entries: Mapping[Any, Any], key: str) -> str:
    if entries_of(entries.get(key)) is None:
        raise CheckpointError(f"no weights under the key {key!r}; it holds {listed(entries)}")
    return key


def _chosen(found: Found, entries: Mapping[Any, Any], weights: Kind | None) -> str | None:
    """The entry to go into; None where the weights are here."""
    plain, averaged = (
        [name for name in names if _may_hold_tensors(entries.get(name))]
        for names in (_PLAIN, _AVERAGED)
    )
    if found.averaged:
        weights = None  # chosen already
    if plain and averaged and weights is None:
        found.notes.append(
            f"the file holds averaged weights too, under {averaged[0]!r}, and the plain ones were "
            f"taken; for the averaged ones give --weights ema (in Python weights='ema')"
        )
    order = averaged if weights == "ema" and averaged else plain or averaged
    here = any(isinstance(value, LEAF) for value in entries.values())
    if weights == "plain" and averaged and not plain and not here:
        raise CheckpointError(
            f"it holds averaged weights alone, under {averaged[0]!r}; leave out weights='plain'"
        )
    if order and (plain or weights == "ema" or not here):
        return order[0]
    if here:
        return None
    # under a name that is not usual, but is the only one with tensors
    others = [
        name
        for name, value in itertools.islice(entries.items(), _LOOKED_AT)
        if isinstance(name, str) and _may_hold_tensors(value, LEAF)
    ]
    if len(others) > 1:
        raise CheckpointError(
            f"several entries hold tensors: {listed(others)}; say which by --key (key=...)"
        )
    return others[0] if others else None


# --- modules that were pickled whole ----------------------------------------------------------


def _is_module(value: Any) -> bool:
    state = value.state if isinstance(value, StandIn) else None
    return isinstance(state, dict) and isinstance(state.get("_modules"), dict)


def _module_entries(module: StandIn) -> dict[str, Any]:
    """The state dict of a pickled module, by the attributes in which PyTorch keeps it."""
    entries: dict[str, Any] = {}
    pending: list[tuple[str, Any]] = [("", module)]
    left = _MAX_PARTS
    while pending:
        prefix, inner = pending.pop()
        if not _is_module(inner):
            continue
        state = inner.state
        passing = state.get("_non_persistent_buffers_set")
        passing = {n for n in passing if isinstance(n, str)} if isinstance(passing, list) else set()
        left -= 1 + len(passing)
        left -= sum(len(state[n]) for n in _HOLDERS if isinstance(state.get(n), dict))
        if left < 0:
            raise CheckpointError(f"a pickled module of more than {_MAX_PARTS:,} parts")
        for holder in ("_parameters", "_buffers"):
            for name, tensor in _plain(state.get(holder)).items():
                if tensor is not None and not (holder == "_buffers" and name in passing):
                    entries[f"{prefix}{name}"] = tensor
        children = [
            (f"{prefix}{name}.", child) for name, child in _plain(state["_modules"]).items()
        ]
        pending += [child for child in reversed(children) if len(child[0]) < 1000]
    return entries


def _plain(value: Any) -> dict[str, Any]:
    entries = value if isinstance(value, dict) else {}
    return {name: entry for name, entry in entries.items() if isinstance(name, str)}


def listed(names: Iterable[Any]) -> str:
    """Up to eight names for a message; those from a hostile file may be endless."""
    texts = [short(name) for name in names]
    more = f" and {len(texts) - 8} more" if len(texts) > 8 else ""
    return ", ".join(texts[:8]) + more


def short(name: Any) -> str:
    """A key for a message."""
    if isinstance(name, StandIn):
        return f"({name.name})"[:60]
    return name[:60] if isinstance(name, str) else reprlib.repr(name)[:60]


def _type(value: Any) -> str:
    return value.name[:100] if isinstance(value, StandIn) else type(value).__name__
