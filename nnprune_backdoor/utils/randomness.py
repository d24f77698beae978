"""Seeds, private random generators, and the settings that passes are run under."""

from __future__ import annotations

import contextlib
import operator
import random
from collections.abc import Iterator
from contextvars import ContextVar
from typing import SupportsIndex

import numpy as np
import torch

from ..errors import DataError


@contextlib.contextmanager
def private_randomness(seed: int) -> Iterator[None]:
    """Global generators (torch, numpy, random) start from `seed` inside and come back as before.

    Loaders draw from them: for shuffling, for the seeds of workers, for augmentation. What else a
    caller may have set is off inside as well, see `usual_passes`.

    Raises:
        DataError: the seed is no integer, negative or too large.
    """
    plain = checked_seed(seed)
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count())
    with usual_passes(), torch.random.fork_rng(devices=devices):
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
    precision = torch.get_default_dtype()
    fused = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        if not _USUAL.get():  # the autocast that is on further inside is `Compute`'s
            stack.callback(_USUAL.reset, _USUAL.set(True))
            for kind in _DEVICES:
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        try:
            torch.set_default_dtype(torch.float32)
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.set_default_dtype(precision)
            torch.backends.mha.set_fastpath_enabled(fused)


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
