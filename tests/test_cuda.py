"""What holds on the CPU holds on a GPU. Skipped where there is none: CI has none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.handmade import Handmade, pictures
from helpers.memory import SmallMemory
from helpers.networks import SMALL, build
from helpers.settings import ALL, SCAN, SELECTOR
from helpers.states import assert_same_state, state_of
from helpers.threads import overlap
from nnprune_backdoor import (
    CleanData,
    Compute,
    create_criterion,
    load_purified,
    purify,
    save_purified,
)
from nnprune_backdoor.core.masks import MaskedModel
from nnprune_backdoor.core.sites import find_sites
from nnprune_backdoor.criteria import ANP, RNP, Response, Unlearning
from nnprune_backdoor.evidence import relearn
from nnprune_backdoor.selectors import LowestCount
from nnprune_backdoor.utils.randomness import private_randomness

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@pytest.fixture
def on_gpu(trained: nn.Module) -> nn.Module:
    return trained.cuda()


@pytest.fixture(autouse=True)
def same_numbers() -> Iterator[None]:
    """TF32 rounds convolutions to ten bits; here they are to be compared with the CPU's."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.parametrize("which", ALL)
def test_every_criterion_scores_there_and_leaves_the_model(
    on_gpu: nn.Module, clean: CleanData, which: str
) -> None:
    name, settings = ALL[which]
    before, random = state_of(on_gpu), torch.cuda.get_rng_state()
    scores, again = (create_criterion(name, **settings)(on_gpu, clean) for _ in range(2))
    assert scores.flat.device.type == "cpu"
    torch.testing.assert_close(scores.flat, again.flat, rtol=1e-3, atol=1e-4)
    assert_same_state(before, state_of(on_gpu))
    assert torch.equal(random, torch.cuda.get_rng_state())


@pytest.mark.parametrize("name", ["rnp", "anp", "mnp", "clp", "bnp", "fp"])
def test_the_order_is_the_cpus(net: nn.Module, clean: CleanData, name: str) -> None:
    quick = {
        "rnp": {"unlearning": Unlearning(lr=0.01, stop=0.5)},
        "anp": {"ranking": Response(rounds=12)},
    }
    quick["mnp"] = quick["rnp"]
    criterion = create_criterion(name, **quick.get(name, {}))  # type: ignore[arg-type]
    here = criterion(net, clean).flat
    there = criterion(net.cuda(), clean).flat
    ranks = torch.stack([one.argsort(stable=True).argsort().double() for one in (here, there)])
    assert torch.corrcoef(ranks)[0, 1] > 0.98


@pytest.mark.parametrize(
    "criterion", [ANP(ranking=Response()), RNP(unlearning=Unlearning(epochs=2, missed="flag"))]
)
@pytest.mark.parametrize("loader_there", [False, True])
def test_bfloat16_and_channels_last_and_images_there(
    on_gpu: nn.Module, clean: CleanData, criterion: ANP | RNP, loader_there: bool
) -> None:
    data = CleanData(clean.images.cuda(), clean.targets.cuda()) if loader_there else clean
    compute = Compute(precision="bfloat16", channels_last=True)
    scores = criterion(on_gpu, data, compute=compute)
    assert torch.isfinite(scores.flat).all()
    assert all(weight.is_contiguous() for weight in on_gpu.parameters())


def test_too_little_memory_halves_the_batch(
    on_gpu: nn.Module, clean: CleanData, monkeypatch: pytest.MonkeyPatch
) -> None:
    criterion = ANP(ranking=Response(batch_size=32), noise_budget=0.0)
    whole = criterion(on_gpu, clean).flat
    memory = SmallMemory(MaskedModel.__call__, 10)

    def call(self: MaskedModel, images: Tensor, **noise: Tensor) -> Any:
        return memory(self, images, **noise)

    monkeypatch.setattr(MaskedModel, "__call__", call)
    parts = criterion(on_gpu, clean).flat
    assert memory.refused
    torch.testing.assert_close(whole, parts, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_a_purified_model_stays_there_and_can_be_saved(
    clean: CleanData, name: str, tmp_path: Path
) -> None:
    model = build(name).cuda()
    found = purify(model, clean, ANP(ranking=Response()), selector=LowestCount(4), progress=False)
    assert next(found.model.parameters()).is_cuda
    assert found.removal is not None and found.removal.drift < 1e-4
    logits = found.model(clean.images[:4].cuda())
    small: dict[str, Any] = {"arch": name, "model_args": {**SMALL[name], "num_classes": 10}}
    loaded = load_purified(save_purified(found, tmp_path / "out", **small))
    torch.testing.assert_close(loaded(clean.images[:4]), logits.cpu(), rtol=1e-3, atol=1e-3)


def test_the_search_the_scan_and_the_repair_run_there() -> None:
    model, data = Handmade(3, target=1).eval().cuda(), pictures(3)
    diagnosis = SCAN(model, CleanData(data.images), silencing="constant")
    assert diagnosis.suspicions[0].label == 1
    assert len(diagnosis.suspicious(data.images)) == len(data)
    found = purify(
        model,
        data,
        create_criterion("tac", target=1, steps=120),
        selector=replace(SELECTOR, max_fraction=1.0),
        silencing="constant",
        removal="none",
        repair="unlearn",
        progress=False,
    )
    assert len(found.selection) and next(found.model.parameters()).is_cuda
    trigger = found.scores.triggers[0]
    assert relearn(model, data, trigger, 1, progress=False).steps_to_half == 0


def test_sites_are_those_of_the_cpu(clean: CleanData) -> None:
    model = build("test_convnext")
    here = find_sites(model, clean.images[:2])
    assert find_sites(model.cuda(), clean.images[:2].cuda()) == here


@pytest.mark.parametrize("first_out", [0, 1])
def test_overlapping_threads_leave_its_generator(first_out: int) -> None:
    before = torch.cuda.get_rng_state()
    overlap(partial(private_randomness, 3), first_out, lambda _: None)
    assert torch.equal(torch.cuda.get_rng_state(), before)
