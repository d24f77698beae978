"""Seeds, private random generators, and the settings that passes are run under."""

from __future__ import annotations

import contextlib
import operator
import random
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, SupportsIndex

import numpy as np
import torch

from ..errors import DataError


@contextlib.contextmanager
def private_randomness(seed: int) -> Iterator[None]:
    """Global generators (torch, numpy, random) start from `seed` inside and come back as before.

    Loaders draw from them: for shuffling, for the seeds of workers, for augmentation. What else a
    caller may have set is off inside as well, see `usual_passes`. The generators belong to the
    whole process: threads that work at the same time draw from them in turn, so that results are
    only repeatable where one works at a time. What the program had set comes back in any case.

    Raises:
        DataError: the seed is no integer, negative or too large.
    """
    plain = checked_seed(seed)
    devices = range(torch.cuda.device_count())
    with (
        _PROGRAM.kept(),
        _GPUS.kept(),
        usual_passes(),
        torch.random.fork_rng(devices=devices),
    ):
        states = random.getstate(), np.random.get_state()
        try:
            torch.manual_seed(plain)
            np.random.seed(plain % 2**32)
            random.seed(plain)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextlib.contextmanager
def usual_passes() -> Iterator[None]:
    """Passes inside are run as usual, whatever the caller has set; all of it comes back.

    The default precision is single. Inference mode, in which nothing can be differentiated, is
    left. Autocast is off, because it keeps casts of weights for as long as the caller's block
    lasts, so that a weight which is trained inside would never be seen to change; `Compute` has one
    without that. PyTorch's fused encoder layers are off: they call none of the layers inside, so
    masks and hooks on these do nothing, and no operation of theirs is counted.
    """
    with _PROGRAM.kept(), contextlib.ExitStack() as stack:
        if not _USUAL.get():  # the autocast that is on further inside is `Compute`'s
            stack.callback(_USUAL.reset, _USUAL.set(True))
            for kind in _DEVICES:
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        torch.set_default_dtype(torch.float32)
        torch.backends.mha.set_fastpath_enabled(False)
        yield


class _Kept:
    """What the program itself has set for the whole process, kept while any thread works.

    Where blocks of several threads overlap, what one finds may be what another has set; so the
    first to enter saves, and the last to leave restores.

    Args:
        read: gives what is set.
        put_back: sets what `read` gave.
    """

    def __init__(self, read: Callable[[], Any], put_back: Callable[[Any], None]) -> None:
        self._read, self._put_back = read, put_back
        self._lock = threading.Lock()
        self._users = 0
        self._saved: Any = None

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        with self._lock:
            if self._users == 0:
                self._saved = self._read()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._put_back(self._saved)


def _read_program() -> tuple[Any, ...]:
    return (
        torch.get_rng_state(),
        np.random.get_state(),
        random.getstate(),
        torch.get_default_dtype(),
        torch.backends.mha.get_fastpath_enabled(),
    )


def _put_program_back(saved: tuple[Any, ...]) -> None:
    drawn, drawn_numpy, drawn_python, precision, fused = saved
    torch.set_rng_state(drawn)
    np.random.set_state(drawn_numpy)
    random.setstate(drawn_python)
    torch.set_default_dtype(precision)
    torch.backends.mha.set_fastpath_enabled(fused)


_PROGRAM = _Kept(_read_program, _put_program_back)

# apart, because reading them makes PyTorch set up CUDA, which passes on the CPU do not need
_GPUS = _Kept(torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all)

_USUAL: ContextVar[bool] = ContextVar("usual_passes", default=False)

_DEVICES = ("cpu", "cuda", "mps", "xpu")  # that autocast may be on for


def checked_seed(seed: int) -> int:
    """A seed as a plain integer, whatever kind of integer it was; DataError if it cannot be one."""
    plain = as_integer(seed, "seed")
    if not 0 <= plain < 2**63:
        raise DataError(f"expected a seed in [0, 2**63), got {plain}")
    return plain


def as_integer(value: SupportsIndex, name: str) -> int:
    """An integer of numpy or a tensor of one as a plain one; DataError if it is no integer."""
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"expected {name} to be an integer, got {value!r}") from None
