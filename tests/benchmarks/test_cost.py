"""The benchmark of cost in small: what the library saves must not be lost again.

Operations and bytes are counted, not timed, so a busy machine changes nothing.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.cost import speed
from helpers.images import noise_images
from helpers.networks import build
from nnprune_backdoor import CleanData
from nnprune_backdoor.core.sites import find_sites

# at most so much of the published loop's operations and peak memory; measured in the remarks
MOST = {
    "anp": (0.75, 0.60),  # .74, .47
    "rnp": (0.90, 1.00),  # .89, .90: unlearning needs all gradients
    "cnp": (0.80, 0.60),  # .72, .30
    "mnp": (0.85, 0.70),  # .78, .55
}


@pytest.mark.slow
@pytest.mark.parametrize("method", list(MOST))
def test_the_loop_as_published_costs_more_and_ranks_alike(method: str) -> None:
    model, clean = build("test_resnet"), CleanData(noise_images(32), torch.arange(32) % 10)
    sites = find_sites(model, clean.images[:2])
    criterion = speed.criteria(16, 1)[method]
    doing = speed.ways(criterion, model, clean, sites)
    reference, library = doing["reference"](), doing["library"]()
    assert (reference.clamp(0, 1) - library.clamp(0, 1)).abs().max() < 1e-4
    assert (library < 1).any(), "no mask has moved, so nothing was compared"
    published, ours, floor = (speed.count(doing[way]) for way in ("reference", "library", "floor"))
    operations, memory = MOST[method]
    assert ours["gflop"] <= operations * published["gflop"]
    assert ours["peak_mb"] <= memory * published["peak_mb"]
    # beside the passes of the algorithm: a look at two images, a success rate of the trigger
    assert ours["gflop"] <= 1.3 * floor["gflop"]
