"""Clean data: every shape of loader in, every bad input its own error, fair splits and batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.images import noise_images
from nnprune_backdoor import CleanData, create_criterion, list_criteria
from nnprune_backdoor.core.checks import check_label_order, validate_model
from nnprune_backdoor.criteria import criterion_class
from nnprune_backdoor.errors import DataError, UnsupportedModelError

quick = settings(max_examples=60, deadline=None)


def net(classes: int = 10) -> nn.Module:
    """A classifier of 3-channel images of any size."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)
    ).eval()


def images(count: int, channels: int = 3, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, channels, size, size, generator=generator)


def numbered(labels: Tensor | None, count: int | None = None) -> CleanData:
    """Images of one pixel whose value is their number, so that each can be followed."""
    count = len(labels) if labels is not None else count
    assert count is not None
    return CleanData(torch.arange(count, dtype=torch.float32).reshape(-1, 1, 1, 1), labels)


def numbers(data: CleanData) -> list[int]:
    return [int(value) for value in data.images.flatten()]


# --- collect: what is accepted ---

X, Y = images(6), torch.tensor([0, 1, 2, 0, 1, 9])
LOADERS: dict[str, Callable[[], Any]] = {
    "pairs": lambda: [(X[:4], Y[:4]), (X[4:], Y[4:])],
    "lists": lambda: [[X[:4], Y[:4]], [X[4:], Y[4:]]],
    "pairs, labels a list": lambda: [(X, Y.tolist())],
    "pairs, labels int32": lambda: [(X, Y.int())],
    "pairs, labels a column": lambda: [(X, Y[:, None])],
    "triples": lambda: [(X, Y, ["a file name"] * 6)],
    "dictionaries": lambda: [{"image": X[:4], "label": Y[:4]}, {"image": X[4:], "label": Y[4:]}],
    "other keys": lambda: [{"pixel_values": X, "labels": Y}],
    "a generator": lambda: ((x, y) for x, y in zip(X.split(2), Y.split(2), strict=True)),
    "a DataLoader": lambda: DataLoader(TensorDataset(X, Y), batch_size=4),
    "images that need a gradient": lambda: [(X.clone().requires_grad_(), Y)],
    "clean data": lambda: CleanData(X, Y),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_collect_reads_labelled_loaders_in_order(kind: str) -> None:
    data = CleanData.collect(LOADERS[kind]())
    assert torch.equal(data.images, X)
    assert not data.images.requires_grad
    assert torch.equal(data.targets, Y)
    assert data.targets.dtype == torch.int64
    assert len(data) == 6


@pytest.mark.parametrize(
    "loader",
    [[(X[:4],), (X[4:],)], [X[:4], X[4:]], [{"image": X}], CleanData(X)],
    ids=["tuples of one", "plain images", "dictionaries", "clean data"],
)
def test_collect_reads_unlabelled_loaders(loader: Any) -> None:
    data = CleanData.collect(loader)
    assert torch.equal(data.images, X)
    assert data.labels is None
    validate_model(net(), data)


def test_collect_returns_clean_data_itself() -> None:
    data = CleanData(X, Y)
    assert CleanData.collect(data) is data


@pytest.mark.parametrize("labels", [Y.int(), Y[:, None], Y.to(torch.uint8)])
def test_targets_are_int64_and_flat_however_the_data_was_made(labels: Tensor) -> None:
    targets = CleanData(X, labels).targets
    assert targets.dtype == torch.int64
    assert torch.equal(targets, Y)


# --- bad input: one clear error each ---

NAN, INF = X.clone(), X.clone()
NAN[2, 0, 3, 3] = float("nan")
INF[[1, 4], 0, 0, 0] = float("inf")

BAD_LOADERS: dict[str, tuple[Any, str]] = {
    "empty": ([], "loader is empty; give at least a few images"),
    "no images in a batch": ([(X[:0], Y[:0])], r"N > 0, got \(0, 3, 8, 8\)"),
    "a bare tensor": (X, r"got a tensor; wrap it: CleanData\(images, labels\)"),
    "single samples": ([(X[0], 1)], r"batch 0: expected images \(B, C, H, W\), got shape \(3, 8,"),
    "numpy images": ([(X.numpy(), Y)], r"batch 0: expected \(images, labels\).* got tuple"),
    "unknown keys": ([{"picture": X, "label": Y}], r"got dict with keys \['label', 'picture'\]"),
    "shapes differ": (
        [(X[:3], Y[:3]), (images(3, size=9), Y[3:])],
        r"\(3, 8, 8\) as in batch 0, got \(3, 9, 9\) in batch 1; resize",
    ),
    "labels come": ([X[:3], (X[3:], Y[3:])], "batch 1: some batches have labels and some have non"),
    "labels go": ([(X[:3], Y[:3]), X[3:]], "batch 1: some batches have labels and some have none"),
    "float labels": ([(X, Y.float())], r"expected 6 integer labels.*float32; class indices"),
    "one-hot labels": ([(X, torch.eye(10, dtype=torch.long)[Y])], r"shape \(6, 10\).*not one-hot"),
    "too few labels": ([(X, Y[:5])], r"expected 6 integer labels.* got shape \(5,\)"),
    "class names as labels": ([(X, list("abcdef"))], "expected 6 integer labels"),
    "integer images": ([((X * 99).to(torch.uint8), Y)], "floating-point images.*got torch.uint8"),
    "NaN": ([(NAN, Y)], "1 of 6 clean images hold NaN or inf; drop or repair"),
    "inf": ([(X, Y), (INF, Y)], "2 of 12 clean images hold NaN or inf"),
}


@pytest.mark.parametrize("kind", BAD_LOADERS)
def test_collect_refuses(kind: str) -> None:
    loader, message = BAD_LOADERS[kind]
    with pytest.raises(DataError, match=message):
        CleanData.collect(loader)


BAD_FOR_MODEL: dict[str, tuple[CleanData, str]] = {
    "label too high": (CleanData(X, Y + 1), r"expected labels in \[0, 10\), got 10; is the loader"),
    "label below 0": (CleanData(X, Y - 1), r"expected labels in \[0, 10\), got -1"),
    "one class": (CleanData(X, torch.full((6,), 3)), "all clean images have label 3; give"),
    "too few": (CleanData(X, Y), r"at least one clean image per class \(10\), .* got 6"),
    "channels": (CleanData(images(20, channels=1)), r"does not accept images of shape \(1, 8, 8\)"),
}


@pytest.mark.parametrize("kind", BAD_FOR_MODEL)
def test_validate_model_refuses_data(kind: str) -> None:
    data, message = BAD_FOR_MODEL[kind]
    with pytest.raises(DataError, match=message):
        validate_model(net(), data)


def test_a_hundred_labelled_images_do_for_a_thousand_classes() -> None:
    labels = torch.arange(100) * 7
    assert validate_model(net(1000), CleanData(images(100), labels)) == 1000
    with pytest.raises(DataError, match=r"class \(1000\), or 100 where .* got 99"):
        validate_model(net(1000), CleanData(images(99), labels[:99]))


@pytest.mark.parametrize("name", [n for n in list_criteria() if criterion_class(n).needs_labels])
def test_a_criterion_that_needs_labels_says_so(name: str) -> None:
    with pytest.raises(DataError, match=r"expected labelled clean images.*need no labels"):
        create_criterion(name)(net(), [(images(20),)])


def test_targets_of_unlabelled_data_are_refused() -> None:
    with pytest.raises(DataError, match="expected labelled clean images, got images alone"):
        CleanData(X).targets  # noqa: B018 - the property raises


# --- bad models ---


class Returns(nn.Module):
    """A model that returns whatever it is told to make of its logits."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.make = net(), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.net(x))


BAD_OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a tuple": (lambda y: (y, y), r"output \(N, classes\), got tuple; have its forward"),
    "a dictionary": (lambda y: {"logits": y}, r"output \(N, classes\), got dict"),
    "a map": (lambda y: y[:, :, None, None], r"output \(N, classes\), got \(2, 10, 1, 1\)"),
    "one logit": (lambda y: y[:, :1], r"\(N, classes\), got \(2, 1\)"),
    "NaN": (lambda y: y * float("nan"), "logits hold NaN or inf"),
}


@pytest.mark.parametrize("kind", BAD_OUTPUTS)
def test_validate_model_refuses_outputs(kind: str) -> None:
    make, message = BAD_OUTPUTS[kind]
    with pytest.raises(UnsupportedModelError, match=message):
        validate_model(Returns(make), CleanData(images(20)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["0.weight", "3.bias"])
def test_validate_model_refuses_weights_that_are_not_finite(name: str, value: float) -> None:
    model = net()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    with pytest.raises(UnsupportedModelError, match=f"the model's '{name}' holds NaN or inf"):
        validate_model(model, CleanData(images(20)))


def test_validate_model_gives_the_number_of_classes() -> None:
    assert validate_model(net(7), CleanData(images(20), torch.arange(20) % 7)) == 7


# --- split ---


@st.composite
def labels_and_shares(draw: st.DrawFn) -> tuple[Tensor, list[float]]:
    """Classes of many sizes or all of one, in any order; two to four parts, none too small."""
    uneven = st.lists(st.integers(1, 40), max_size=9).map(lambda counts: [40, *counts])
    even = st.builds(lambda size, classes: [size] * classes, st.integers(20, 50), st.integers(2, 9))
    counts = draw(uneven | even)
    weights = draw(st.lists(st.integers(2, 12), min_size=2, max_size=4))
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    order = torch.randperm(
        len(labels), generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))
    )
    return labels[order], [weight / sum(weights) for weight in weights]


@quick
@given(labels_and_shares(), st.booleans(), st.integers(0, 99))
def test_split_is_a_partition_by_size(
    case: tuple[Tensor, list[float]], labelled: bool, seed: int
) -> None:
    labels, shares = case
    data = numbered(labels if labelled else None, len(labels))
    parts = data.split(*shares, seed=seed)
    assert sorted(number for part in parts for number in numbers(part)) == list(range(len(labels)))
    for part, share in zip(parts, shares, strict=True):
        assert abs(len(part) - share * len(labels)) < 1 + 1e-3
        if labelled:
            assert torch.equal(part.targets, labels[numbers(part)])
        else:
            assert part.labels is None


@pytest.mark.slow
@quick
@given(labels_and_shares(), st.integers(0, 99))
def test_split_is_stratified(case: tuple[Tensor, list[float]], seed: int) -> None:
    labels, shares = case
    for part, share in zip(numbered(labels).split(*shares, seed=seed), shares, strict=True):
        wanted = share * labels.bincount()
        got = part.targets.bincount(minlength=len(wanted))
        assert (got - wanted).abs().max() < 1 + 1e-3, f"{got.tolist()} of {wanted.tolist()}"


def test_split_of_balanced_classes_is_balanced() -> None:
    """Ten classes of 50 images, the split that `purify` makes by default."""
    scoring, selecting, certifying = numbered(torch.arange(500) % 10).split(0.6, 0.25, 0.15)
    assert scoring.targets.bincount(minlength=10).tolist() == [30] * 10
    assert set(selecting.targets.bincount(minlength=10).tolist()) == {12, 13}
    assert set(certifying.targets.bincount(minlength=10).tolist()) == {7, 8}


@pytest.mark.parametrize("labels", [None, torch.arange(60) % 4])
def test_split_depends_on_the_seed_alone(labels: Tensor | None) -> None:
    data = numbered(labels, 60)
    state = torch.get_rng_state()
    first = [numbers(part) for part in data.split(0.5, 0.3, 0.2, seed=3)]
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    torch.rand(7)
    assert [numbers(part) for part in data.split(0.5, 0.3, 0.2, seed=3)] == first
    assert [numbers(part) for part in data.split(0.5, 0.3, 0.2, seed=4)] != first


@pytest.mark.parametrize("shares", [(0.5, 0.4), (0.5, 0.6), (1.2, -0.2), (1.0, 0.0)])
def test_split_refuses_shares_that_are_none(shares: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="expected positive shares that sum to 1"):
        numbered(None, 30).split(*shares)


def test_split_refuses_an_empty_part() -> None:
    with pytest.raises(DataError, match="2 clean images are too few to split into"):
        numbered(torch.tensor([0, 1])).split(0.6, 0.25, 0.15)


# --- batches ---

counts_and_sizes = st.tuples(st.integers(1, 60), st.integers(2, 20))


@quick
@given(counts_and_sizes, st.integers(0, 99))
def test_batches_cover_each_image_once_and_none_is_alone(case: tuple[int, int], seed: int) -> None:
    count, size = case
    generator = torch.Generator().manual_seed(seed)
    batches = list(numbered(torch.arange(count)).batches(size, generator))
    assert sorted(n for batch in batches for n in numbers(batch)) == list(range(count))
    assert all(torch.equal(batch.targets, torch.tensor(numbers(batch))) for batch in batches)
    assert len(batches) == 1 or all(len(batch) > 1 for batch in batches)
    assert all(len(batch) == size for batch in batches[:-1])
    assert len(batches[-1]) <= size + 1


@quick
@given(counts_and_sizes, st.integers(0, 99))
def test_batches_with_replacement_are_full(case: tuple[int, int], seed: int) -> None:
    count, size = case
    generator = torch.Generator().manual_seed(seed)
    batches = list(numbered(torch.arange(count)).batches(size, generator, replacement=True))
    assert [len(batch) for batch in batches] == [size] * -(-count // size)
    assert all(torch.equal(batch.targets, torch.tensor(numbers(batch))) for batch in batches)


def test_batches_with_replacement_repeat_images() -> None:
    generator = torch.Generator().manual_seed(0)
    (batch,) = numbered(None, 100).batches(100, generator, replacement=True)
    assert len(set(numbers(batch))) < 80  # 63 expected; 100 without replacement


@pytest.mark.parametrize("options", [{}, {"replacement": True}, {"shift": 1}])
def test_batches_follow_the_generator_alone(options: dict[str, Any]) -> None:
    data = CleanData(images(30), torch.arange(30))

    def epoch(generator: torch.Generator) -> list[Tensor]:
        return [batch.images for batch in data.batches(8, generator, **options)]

    generator = torch.Generator().manual_seed(5)
    state = torch.get_rng_state()
    first, second = epoch(generator), epoch(generator)
    again = epoch(torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(torch.cat(first), torch.cat(second)), "two epochs in the same order"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shifted_batches_keep_shape_dtype_and_labels(dtype: torch.dtype) -> None:
    labels = torch.arange(24)
    flat = (labels + 1).to(dtype)[:, None, None, None].expand(-1, 2, 5, 7).contiguous()
    seen: list[int] = []
    for batch in CleanData(flat, labels).batches(7, torch.Generator().manual_seed(0), shift=3):
        assert batch.images.shape[1:] == (2, 5, 7)
        assert batch.images.dtype == dtype
        assert torch.equal(batch.images.amax((1, 2, 3)).long(), batch.targets + 1)
        seen += batch.targets.tolist()
    assert sorted(seen) == labels.tolist()


def test_shifted_images_are_translations_and_mirror_images() -> None:
    """Each of the 3 x 3 x 2 ways appears, and nothing else."""
    picture = torch.arange(1.0, 41.0).reshape(1, 2, 4, 5)
    padded = torch.zeros(1, 2, 6, 7)
    padded[:, :, 1:-1, 1:-1] = picture
    crops = [padded[:, :, i : i + 4, j : j + 5] for i in range(3) for j in range(3)]
    ways = {tuple(way.flatten().tolist()) for crop in crops for way in (crop, crop.flip(-1))}
    data = CleanData(picture.repeat(500, 1, 1, 1))
    (batch,) = data.batches(500, torch.Generator().manual_seed(0), shift=1)
    assert {tuple(image.flatten().tolist()) for image in batch.images} == ways


def test_images_go_where_the_model_is_and_labels_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    data = CleanData(torch.randn(6, 3, 4, 4), torch.arange(6))
    elsewhere, size = nn.Linear(1, 1, device="meta"), 6 * 3 * 4 * 4 * 4
    assert data.moved_to(elsewhere).images is data.images  # a device that cannot be asked for room
    monkeypatch.setattr("nnprune_backdoor.core.data._free", lambda device: 8 * size)
    there = data.moved_to(elsewhere)
    assert there.images.device.type == "meta" and there.targets.device.type == "cpu"
    assert there.take(torch.tensor([0, 2])).images.shape == (2, 3, 4, 4)
    monkeypatch.setattr("nnprune_backdoor.core.data._free", lambda device: 8 * size - 1)
    assert data.moved_to(elsewhere).images is data.images  # too little room
    assert data.moved_to(nn.Linear(1, 1)).images is data.images


# ---- the order of classes, and images that must not change ---------------------------------------


@pytest.mark.parametrize("shift", [1, 3])
def test_labels_of_another_order_are_refused(shift: int) -> None:
    said = torch.arange(60) % 10
    with pytest.raises(DataError, match=r"0% of the clean images right, but would get 100% if"):
        check_label_order((said + shift) % 10, said)


def test_folders_in_the_order_of_their_digits_are_refused() -> None:
    names = sorted(str(number) for number in range(12))  # 0, 1, 10, 11, 2, ...
    said = torch.arange(120) % 12
    labels = torch.tensor([names.index(str(n)) for n in said.tolist()])
    with pytest.raises(DataError, match=r"17% of the clean images right.* is mostly labelled"):
        check_label_order(labels, said)


@pytest.mark.parametrize("accuracy", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("classes", [2, 4, 10, 500])
@pytest.mark.parametrize("count", [12, 50, 300])
def test_a_poor_model_is_no_matter_of_order(accuracy: float, classes: int, count: int) -> None:
    for seed in range(10):
        draw = torch.Generator().manual_seed(seed)
        labels = torch.randint(classes, (count,), generator=draw)
        guessed = torch.randint(classes, (count,), generator=draw)
        right = torch.rand(count, generator=draw) < accuracy
        check_label_order(labels, torch.where(right, labels, guessed))


def test_a_model_that_always_says_the_same_is_no_matter_of_order() -> None:
    check_label_order(torch.arange(40) % 4, torch.full((40,), 3))


class InPlace(nn.Module):
    def __init__(self, write: str) -> None:
        super().__init__()
        self.write, self.layer = write, nn.Linear(3 * 32 * 32, 4)

    def forward(self, images: Tensor) -> Tensor:
        images.clamp_(-9, 9) if self.write == "clamp_" else images.sub_(0.1).div_(0.5)
        return self.layer(images.flatten(1))


@pytest.mark.parametrize("write", ["clamp_", "sub_"])
def test_a_model_that_writes_into_the_images_is_refused_and_writes_into_none(write: str) -> None:
    """Also where it changes nothing that can be seen, as clamping does."""
    images = noise_images(8)
    data = CleanData(images.clone(), torch.arange(8) % 4)
    with pytest.raises(UnsupportedModelError, match="writes into the images"):
        validate_model(InPlace(write).eval(), data)
    assert torch.equal(data.images, images)
