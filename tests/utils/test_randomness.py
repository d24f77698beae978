"""What the program has set for the whole process comes back, also where threads overlap."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import numpy as np
import pytest
import torch

from nnprune_backdoor.utils.randomness import private_randomness, usual_passes


def state() -> tuple[object, ...]:
    drawn = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
    settings = torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()
    return *drawn, *settings


@pytest.mark.parametrize("block", [partial(private_randomness, 3), usual_passes])
@pytest.mark.parametrize("first_out", [0, 1])
def test_overlapping_threads_leave_the_programs_settings(
    block: Callable[[], AbstractContextManager[None]], first_out: int
) -> None:
    inside = [threading.Event(), threading.Event()]
    leave = [threading.Event(), threading.Event()]
    seen: list[tuple[torch.dtype, bool]] = []

    def work(number: int) -> None:
        with block():
            inside[number].set()
            assert leave[number].wait(30)
            seen.append((torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    torch.set_default_dtype(torch.float64)
    try:
        before = state()
        for thread, entered in zip(threads, inside, strict=True):
            thread.start()
            assert entered.wait(30)
        for number in (first_out, 1 - first_out):
            leave[number].set()
            threads[number].join(30)
        assert state() == before
    finally:
        torch.set_default_dtype(torch.float32)
        torch.backends.mha.set_fastpath_enabled(True)
    assert seen == [(torch.float32, False)] * 2  # the second one's too, when the first has left


def test_a_block_inside_another_leaves_its_stream_where_it_was() -> None:
    with private_randomness(0):
        alone = torch.rand(2), torch.rand(2)
    with private_randomness(0):
        first = torch.rand(2)
        with private_randomness(5):
            torch.rand(9)
        assert torch.equal(first, alone[0])
        assert torch.equal(torch.rand(2), alone[1])
