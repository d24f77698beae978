"""How passes are run must not change what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.images import noise_images
from helpers.memory import SmallMemory
from helpers.networks import build
from nnprune_backdoor import CleanData, Compute, Criterion
from nnprune_backdoor.core.compute import mean_gradients
from nnprune_backdoor.core.masks import MaskedModel
from nnprune_backdoor.criteria import ANP, CNP, MNP, RNP, MaskTraining, Response, Unlearning
from nnprune_backdoor.errors import DataError, ScoringError

UNLEARNING = Unlearning(
    lr=0.01, epochs=2, stop=0.0, missed="flag", statistics="running", batch_size=32
)
RESPONSE = Response(batch_size=32, probe_size=32)
TRAINING = MaskTraining(steps=4, batch_size=32, statistics="running")
RESPONDING = RNP(unlearning=UNLEARNING, ranking=RESPONSE)


@pytest.fixture
def exact(net: nn.Module, clean: CleanData) -> tuple[nn.Module, CleanData]:
    """In float64: rounding turns signs of small gradients, and ANP's noise follows the sign."""
    return net.double(), CleanData(clean.images.double(), clean.targets)


def darker(images: Tensor) -> Tensor:
    return images - 1


# running statistics: then a batch is the mean of its parts
QUICK: dict[str, Criterion] = {
    "anp": ANP(ranking=replace(RESPONSE, rounds=2)),
    "anp masks": ANP(ranking=TRAINING, alpha=0.2),
    "rnp": RESPONDING,
    "rnp masks": RNP(unlearning=UNLEARNING, ranking=replace(TRAINING, steps=None, epochs=2)),
    "mnp": MNP(unlearning=UNLEARNING, ranking=RESPONSE),
    "mnp masks": MNP(unlearning=UNLEARNING, ranking=replace(TRAINING, closed_share=0.1)),
    "cnp": CNP(stamp=darker, ranking=replace(RESPONSE, stages=4)),
}
EXACT = [name for name in QUICK if name != "cnp"]  # its parts find their noise by themselves


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallMemory]:
    """Masked models that can take 10 images with gradients."""
    memory = SmallMemory(MaskedModel.__call__, 10)

    def call(self: MaskedModel, images: Tensor, **noise: Tensor) -> Any:
        return memory(self, images, **noise)

    monkeypatch.setattr(MaskedModel, "__call__", call)
    yield memory


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_out_of_memory_halves_the_parts_and_keeps_the_batch(
    exact: tuple[nn.Module, CleanData], little: SmallMemory, name: str
) -> None:
    little.fits = 64
    whole = QUICK[name](*exact)
    little.fits, little.seen = 10, []
    parts = QUICK[name](*exact)
    torch.testing.assert_close(parts.flat, whole.flat, rtol=1e-3, atol=1e-4)
    assert max(little.seen[-4:]) <= 10
    # 32 -> 16 -> 8, and no trying again with what did not fit
    assert little.refused == 2


@pytest.mark.slow
def test_cnp_goes_on_when_memory_runs_out(
    net: nn.Module, clean: CleanData, little: SmallMemory
) -> None:
    scores = QUICK["cnp"](net, clean)
    assert torch.isfinite(scores.flat).all()
    assert little.refused == 2
    assert torch.equal(scores.flat, QUICK["cnp"](net, clean).flat)


def test_one_image_that_does_not_fit_is_an_error(
    net: nn.Module, clean: CleanData, little: SmallMemory
) -> None:
    little.fits = 0
    with pytest.raises(torch.OutOfMemoryError):
        QUICK["anp"](net, clean)


def test_memory_that_runs_out_while_unlearning_halves_too() -> None:
    sizes: list[int] = []

    def passes(part: CleanData) -> tuple[tuple[Tensor, ...], Tensor]:
        if len(part) > 3:
            raise torch.OutOfMemoryError
        sizes.append(len(part))
        return (part.images.mean(0),), part.images.sum((1, 2, 3))

    images = noise_images(10)
    (mean,), rows = mean_gradients(CleanData(images), passes)
    torch.testing.assert_close(mean, images.mean(0))
    assert rows is not None
    torch.testing.assert_close(rows, images.sum((1, 2, 3)))
    assert sum(sizes) == 10
    assert max(sizes) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_small_parts_give_the_scores_of_whole_batches(
    exact: tuple[nn.Module, CleanData], name: str
) -> None:
    whole = QUICK[name](*exact)
    parts = QUICK[name](*exact, compute=Compute(micro_batch=9))
    torch.testing.assert_close(parts.flat, whole.flat, rtol=1e-3, atol=1e-4)


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(DataError, match="micro_batch of at least 1, got 0"):
        Compute(micro_batch=0)
    with pytest.raises(DataError, match="precision 'float32' or 'bfloat16', got 'half'"):
        Compute(precision="half")  # type: ignore[arg-type]


# ---- precision and layout -----------------------------------------------------------------------


class Viewing(nn.Module):
    """Flattens with `view`, which needs contiguous activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, stride=4), nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(images)))
        logits: Tensor = self.head(x.view(len(x), -1))
        return logits


def test_a_layout_that_the_model_cannot_take_is_left_alone(clean: CleanData) -> None:
    torch.manual_seed(0)
    model = Viewing().eval()
    plain = QUICK["anp"](model, clean)
    assert torch.equal(
        QUICK["anp"](model, clean, compute=Compute(channels_last=True)).flat, plain.flat
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_channels_last_changes_rounding_alone(clean: CleanData, name: str) -> None:
    model = build(name)
    criterion = ANP(ranking=Response(batch_size=32, statistics="batch"))
    plain = criterion(model, clean)
    other = criterion(model, clean, compute=Compute(channels_last=True))
    assert rank_correlation(plain.flat, other.flat) > 0.99
    assert all(parameter.is_contiguous() for parameter in model.parameters()), (
        "the user's own model was laid out anew"
    )


def test_bfloat16_is_used_and_ranks_alike(net: nn.Module, clean: CleanData) -> None:
    seen: set[torch.dtype] = set()
    handle = net.conv1.register_forward_hook(lambda _, x, y: seen.add(y.dtype))
    criterion = RESPONDING
    compute = Compute(precision="bfloat16")
    other = criterion(net, clean, compute=compute)
    handle.remove()
    assert torch.bfloat16 in seen
    plain = criterion(net, clean)
    assert not torch.equal(plain.flat, other.flat)
    assert rank_correlation(plain.flat, other.flat) > 0.9
    assert not torch.is_autocast_enabled("cpu")


def test_under_autocast_unlearning_sees_the_weights_of_each_step(
    net: nn.Module, clean: CleanData
) -> None:
    """A cache of cast weights would keep those of the first step for ever."""
    criterion = replace(RESPONDING, unlearning=replace(UNLEARNING, epochs=6))
    scores = criterion(net, clean, compute=Compute(precision="bfloat16"))
    accuracies = scores.details["unlearn_accuracies"]
    assert accuracies[-1] < accuracies[0] - 0.2


def rank_correlation(a: Tensor, b: Tensor) -> float:
    ranks = [each.argsort(stable=True).argsort().double() for each in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


# --- batch statistics need two images ----------------------------------------------------------


def needs_two(fits: int, sizes: list[int]) -> Any:
    """Passes of a network with a BatchNorm on one value a channel, on a device of a size."""

    def passes(part: CleanData) -> tuple[tuple[Tensor, ...], Tensor]:
        if len(part) > fits:
            raise torch.OutOfMemoryError
        F.batch_norm(part.images.mean((2, 3)), None, None, training=True)
        sizes.append(len(part))
        return (part.images.mean(0),), part.images.sum((1, 2, 3))

    return passes


@pytest.mark.parametrize(("limit", "count"), [(2, 7), (2, 3), (3, 7), (3, 4), (5, 11), (2, 8)])
def test_no_part_is_left_with_one_image(limit: int, count: int) -> None:
    sizes: list[int] = []
    images = noise_images(count)
    with Compute(micro_batch=limit).applied(torch.device("cpu")):
        (mean,), rows = mean_gradients(CleanData(images), needs_two(99, sizes))
    torch.testing.assert_close(mean, images.mean(0))
    assert rows is not None and len(rows) == sum(sizes) == count
    assert min(sizes) >= 2
    assert max(sizes) <= max(limit, 3)


def test_no_part_is_left_with_one_image_when_memory_runs_out() -> None:
    sizes: list[int] = []
    mean_gradients(CleanData(noise_images(7)), needs_two(3, sizes))
    assert sum(sizes) == 7 and min(sizes) >= 2


@pytest.mark.parametrize(("limit", "fits"), [(1, 9), (2, 1), (3, 2)])
def test_one_image_without_statistics_is_refused_in_our_words(limit: int, fits: int) -> None:
    passes = needs_two(fits, [])
    refused = pytest.raises(ScoringError, match="micro_batch=2 or more")
    with Compute(micro_batch=limit).applied(torch.device("cpu")), refused:
        mean_gradients(CleanData(noise_images(3)), passes)


def test_other_complaints_are_let_through() -> None:
    def passes(part: CleanData) -> Any:
        raise ValueError("of the model's own")

    with pytest.raises(ValueError, match="of the model's own"):
        mean_gradients(CleanData(noise_images(1)), passes)
