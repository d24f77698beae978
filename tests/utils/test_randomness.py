"""What the program has set for the whole process comes back, also where threads overlap."""

from __future__ import annotations

import random
import threading
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.threads import Block, overlap
from nnprune_backdoor.attacks import train_classifier
from nnprune_backdoor.demo import Demo
from nnprune_backdoor.utils.randomness import private_randomness, usual_passes


def state() -> tuple[object, ...]:
    drawn = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
    settings = torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()
    return *drawn, *settings


@pytest.mark.parametrize("block", [partial(private_randomness, 3), usual_passes])
@pytest.mark.parametrize("first_out", [0, 1])
def test_overlapping_threads_leave_the_programs_settings(block: Block, first_out: int) -> None:
    seen: list[tuple[torch.dtype, bool]] = []

    def inside(_: int) -> None:
        seen.append((torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()))

    torch.set_default_dtype(torch.float64)
    try:
        before = state()
        overlap(block, first_out, inside)
        assert state() == before
    finally:
        torch.set_default_dtype(torch.float32)
        torch.backends.mha.set_fastpath_enabled(True)
    assert seen == [(torch.float32, False)] * 2  # the second one's too, when the first has left


@pytest.mark.parametrize("first_out", [0, 1])
def test_overlapping_threads_leave_the_gpus_generators(
    first_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two that are made up; tests/test_cuda.py has a real one."""
    states = [10, 20]

    def seed_all(seed: int) -> None:
        states[:] = [seed] * len(states)

    monkeypatch.setattr(torch.cuda, "manual_seed_all", seed_all)
    for module in (torch.cuda, torch.cuda.random):
        monkeypatch.setattr(module, "device_count", lambda: len(states))
        monkeypatch.setattr(module, "get_rng_state", states.__getitem__)
        monkeypatch.setattr(
            module, "set_rng_state", lambda new, device: states.__setitem__(device, new)
        )
    inside: list[list[int]] = []
    overlap(partial(private_randomness, 3), first_out, lambda _: inside.append(list(states)))
    assert inside[0] == [3, 3]
    assert states == [10, 20]


class Halting(nn.Module):
    """A classifier whose first training pass tells that it has begun, and waits."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2))
        self.begun, self.go_on = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        self.begun.set()
        assert self.go_on.wait(30)
        return self.bias.expand(len(x), 2)


def test_training_that_outlasts_another_threads_block_leaves_the_programs_stream() -> None:
    model, before = Halting(), state()
    images, labels = torch.zeros(8, 1), torch.arange(8) % 2
    training = threading.Thread(
        target=lambda: train_classifier(model, images, labels, epochs=1, batch_size=8)
    )
    with private_randomness(3):
        training.start()
        assert model.begun.wait(30)
    model.go_on.set()
    training.join(30)
    assert state() == before


def test_the_demos_network_leaves_the_programs_stream() -> None:
    before = state()
    first, again = (Demo(arch="test_resnet", width=1).model() for _ in range(2))
    assert state() == before
    weights = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)


def test_a_block_inside_another_leaves_its_stream_where_it_was() -> None:
    with private_randomness(0):
        alone = torch.rand(2), torch.rand(2)
    with private_randomness(0):
        first = torch.rand(2)
        with private_randomness(5):
            torch.rand(9)
        assert torch.equal(first, alone[0])
        assert torch.equal(torch.rand(2), alone[1])
