"""Take off what names show: wrappers, averages beside the network, losses, metrics."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..errors import CheckpointError
from .state_dicts import Found, Kind, listed

_WRAPPERS = ("module.", "_orig_mod.", "model.")

_COMPILED = "_orig_mod."  # torch.compile puts it before the names of each part that was compiled

_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel

_AVERAGED = re.compile(r"(\w+_)?ema(_\w+)?|(swa|averaged)_\w+")  # first part of a name

# what losses, metrics and averages keep beside the network, by the first part of the name
_BESIDE = re.compile(
    rf"{_COUNTER}|(\w+_)?(criterion|loss|loss_fn|loss_func|loss_function|metrics?|acc|accuracy"
    r"|auroc|f1|f1_score|confusion_matrix|confmat)(_\w+)?"
)


@dataclass
class Chosen:
    """Which tensors are taken.

    Attributes:
        names: Name in the file -> name without what was taken off.
        prefix: What was taken off before all of them.
        averaged: Whether they are an average of the weights.
        notes: What was done, a sentence each.
    """

    names: dict[str, str]
    prefix: str = ""
    averaged: bool = False
    notes: list[str] = field(default_factory=list)


def choose(
    names: Iterable[str],
    found: Found,
    *,
    prefix: str | None,
    drop: Sequence[str],
    weights: Kind | None,
) -> Chosen:
    """Leave out what is no part of the network, and take off prefixes.

    Args:
        names: of the tensors in the file.
        found: the entry they lie in.
        prefix, drop, weights: see `load_weights`.

    Raises:
        CheckpointError: an argument fits no name, or there are no weights of the kind asked for.
    """
    names = list(names)
    gone = _dropped_by(drop, names)
    notes = [f"dropped as asked: {listed(sorted(gone))}"] if gone else []
    names = [name for name in names if name not in gone]
    if prefix is not None:
        is_average = found.averaged or _COUNTER in names
        is_average = is_average or any(map(_AVERAGED.fullmatch, prefix.split(".")))
        if weights is not None and (weights == "ema") != is_average:
            raise CheckpointError(
                f"prefix={prefix!r} and weights={weights!r} ask for different weights; leave one "
                "of them out (--prefix, --weights)"
            )
        return _with_prefix(names, prefix, is_average, notes)
    plain, averaged = split_averaged(names)
    is_average = found.averaged or (weights == "ema" if averaged else _COUNTER in names)
    if weights == "ema" and not is_average:
        raise CheckpointError("it holds no averaged weights; leave out weights='ema' (--weights)")
    if weights == "plain" and is_average and not found.averaged:
        raise CheckpointError("it holds averaged weights alone; leave out weights='plain'")
    if averaged:
        left = plain if weights == "ema" else averaged
        notes.append(
            f"the {'plain' if weights == 'ema' else 'averaged'} weights beside the ones taken were "
            f"left out: {listed(sorted(left))}; --weights plain or ema (weights=...) says which"
        )
        names = [name for name in names if name not in left]
    beside = [name for name in names if is_beside(name)]
    inside = [name for name in names if name not in set(beside)]
    start = ""
    if weights == "ema" and averaged:
        start = _only([_start(name) for name in inside])
    start += wrappers([name.removeprefix(start) for name in inside])
    if start or _COUNTER in beside:
        notes += [f"removed the prefix {start!r}"] if start else []
        notes += [f"left out, beside the network: {listed(beside)}"] if beside else []
        names = inside
    return Chosen(_without_compiled(names, start, notes), start, is_average, notes)


def _only(starts: list[str]) -> str:
    several = sorted(set(starts))
    if len(several) != 1:
        raise CheckpointError(
            f"it holds several averages: {listed(several)}; say which by --prefix (prefix=...)"
        )
    return several[0]


def _with_prefix(names: list[str], prefix: str, averaged: bool, notes: list[str]) -> Chosen:
    taken = [name for name in names if name.startswith(prefix)]
    if not taken:
        raise CheckpointError(f"no tensor has the prefix {prefix!r}; it holds {listed(names)}")
    others = sorted(set(names).difference(taken))
    notes.append(f"removed the prefix {prefix!r} as asked")
    notes += [f"left out, since they lack it: {listed(others)}"] if others else []
    return Chosen({name: name[len(prefix) :] for name in taken}, prefix, averaged, notes)


def _without_compiled(names: list[str], start: str, notes: list[str]) -> dict[str, str]:
    """The names without the prefix, and as they were before parts of the network were compiled."""
    new = {name: name[len(start) :].replace(f".{_COMPILED}", ".") for name in names}
    if any(f".{_COMPILED}" in name[len(start) :] for name in names):
        notes.append(f"removed {_COMPILED!r} inside of names")
    if len(set(new.values())) < len(new):
        raise CheckpointError(f"names are equal without {_COMPILED!r}; say which by prefix=")
    return new


def is_beside(name: str) -> bool:
    """Whether a tensor belongs to a loss, a metric or an average by its name."""
    return _BESIDE.fullmatch(name.partition(".")[0]) is not None


def is_averaged(name: str) -> bool:
    """Whether a tensor belongs to an average of the network by its name."""
    return _AVERAGED.fullmatch(_start(name).split(".")[-2]) is not None


def _dropped_by(patterns: Sequence[str], names: Iterable[str]) -> set[str]:
    """The names that match a pattern of the shell's kind; CheckpointError if one matches none."""
    names = list(names)
    gone: set[str] = set()
    for pattern in patterns:
        matching = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            raise CheckpointError(
                f"no tensor to drop is named {pattern!r}; some that are there: {listed(names)}"
            )
        gone.update(matching)
    return gone


def split_averaged(names: Iterable[str]) -> tuple[set[str], set[str]]:
    """The plain names, and those of an average beside them, as in `net.a` and `net_ema.a`.

    The second set is empty unless it has all that the first one has, since a network may also have
    a layer of such a name.
    """
    plain, averaged, tails = set(), set(), set()
    for name in names:
        start = wrappers([name])
        first, _, rest = name[len(start) :].partition(".")
        if _AVERAGED.fullmatch(first) and rest:
            averaged.add(name)
            tails.add(_bare(rest))
        else:
            plain.add(name)
    twins = {_bare(name) for name in plain if not is_beside(_bare(name))}
    if len({name.partition(".")[0] for name in twins}) == 1:  # the network has a name of its own
        twins = {_bare(name.partition(".")[2]) for name in twins}
    if averaged and twins and twins <= tails:
        return plain, averaged
    return plain | averaged, set()


def _start(name: str) -> str:
    """Wrappers, and the part of the name behind them."""
    outer = wrappers([name])
    return f"{outer}{name[len(outer) :].partition('.')[0]}."


def _bare(name: str) -> str:
    return name[len(wrappers([name])) :]


def wrappers(names: Iterable[str]) -> str:
    """The prefix that wrappers put before all names, in whatever order; may be empty."""
    names = list(names)
    shared = ""
    while names:
        for prefix in _WRAPPERS:
            if all(name.startswith(shared + prefix) for name in names):
                shared += prefix
                break
        else:
            break
    return shared
