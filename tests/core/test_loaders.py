"""Reading loaders: what is read is copied, has an end and is what was meant, or it is refused."""

from __future__ import annotations

import collections
import itertools
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from helpers.images import noise_images
from helpers.networks import build
from nnprune_backdoor import CleanData, PurifyError, create_criterion, purify, scan
from nnprune_backdoor.criteria import TAC, Magnitude
from nnprune_backdoor.errors import DataError
from nnprune_backdoor.selectors import LowestFraction, TriggerGone
from nnprune_backdoor.triggers import Inversion

X = noise_images(40)[:, :, :4, :4].contiguous()
Y = torch.arange(40) % 10

# ---- what is read is copied ----------------------------------------------------------------------


def one_buffer() -> Iterator[Any]:
    images, labels = torch.empty(8, 3, 4, 4), torch.empty(8, dtype=torch.long)
    for x, y in zip(X.split(8), Y.split(8), strict=True):
        yield images.copy_(x), labels.copy_(y)


def numpy_buffer() -> Iterator[Any]:
    images, labels = np.empty((8, 3, 4, 4), np.float32), np.empty(8, np.int64)
    for x, y in zip(X.split(8), Y.split(8), strict=True):
        images[:], labels[:] = x.numpy(), y.numpy()
        yield torch.from_numpy(images), labels


def prefetcher() -> Iterator[Any]:
    """Two buffers in turn, in dictionaries."""
    buffers = [
        {"image": torch.empty(8, 3, 4, 4), "label": torch.empty(8, 1, dtype=torch.long)}
        for _ in range(2)
    ]
    for x, y, batch in zip(X.split(8), Y.split(8), itertools.cycle(buffers)):
        batch["image"].copy_(x)
        batch["label"].copy_(y[:, None])
        yield batch


def cleared() -> Iterator[Any]:
    """What was given is overwritten at the end."""
    images, labels = X.clone(), Y.clone()
    yield images, labels
    images.zero_()
    labels.zero_()


@pytest.mark.parametrize("loader", [one_buffer, numpy_buffer, prefetcher, cleared])
def test_a_loader_may_use_its_memory_again(loader: Callable[[], Iterator[Any]]) -> None:
    data = CleanData.collect(loader())
    assert torch.equal(data.images, X)
    assert torch.equal(data.targets, Y)


@pytest.mark.parametrize("batch_size", [None, 8])
def test_what_is_read_stays_when_the_data_set_is_changed(batch_size: int | None) -> None:
    dataset = TensorDataset(X.clone()[None], Y.clone()[None])  # its samples are whole batches
    loader: Any = DataLoader(dataset, batch_size=None)
    if batch_size:
        loader = DataLoader(TensorDataset(X.clone(), Y.clone()), batch_size=batch_size)
    data = CleanData.collect(loader)
    for tensor in loader.dataset.tensors:
        tensor.zero_()
    assert torch.equal(data.images, X)
    assert torch.equal(data.targets, Y)


def test_purify_reads_a_loader_that_uses_its_memory_again() -> None:
    images, labels = noise_images(40), torch.arange(40) % 10

    def again() -> Iterator[Any]:
        buffer = torch.empty(8, 3, 32, 32)
        for x, y in zip(images.split(8), labels.split(8), strict=True):
            yield buffer.copy_(x), y

    how: dict[str, Any] = {"selector": LowestFraction(0.1), "removal": "none", "progress": False}
    found = [
        purify(build("test_resnet"), loader, "fp", **how)
        for loader in (again(), [(images, labels)])
    ]
    assert torch.equal(found[0].scores.flat, found[1].scores.flat)
    assert found[0].given.sha256["clean"] == found[1].given.sha256["clean"]


@pytest.mark.parametrize("inside", [False, True])
def test_images_and_labels_of_inference_mode_can_be_trained_on(inside: bool) -> None:
    with torch.inference_mode():
        images, labels = X.clone(), Y.clone()
    for loader in (CleanData(images, labels), [(images, labels)]):
        with torch.inference_mode(inside):
            data = CleanData.collect(loader)
        assert not data.images.is_inference() and not data.targets.is_inference()
        assert torch.equal(data.images, X) and torch.equal(data.targets, Y)


# ---- two candidates ------------------------------------------------------------------------------

RAW = (X * 50 + 100).clamp(0, 255)
Named = collections.namedtuple("Named", "raw pixel_values label")
Placed = collections.namedtuple("Placed", "image classes")
SURE: dict[str, Any] = {
    "raw bytes": {"image": RAW.to(torch.uint8), "pixel_values": X, "label": Y},
    "raw bytes, channels last": {"image": RAW.byte().permute(0, 2, 3, 1), "x": X, "y": Y},
    "raw arrays": {"image": RAW.numpy(), "pixel_values": X, "label": Y},
    "file names": {"data": ["name"] * 40, "inputs": X, "label": Y},
    "none": {"image": None, "pixel_values": X, "label": None, "labels": Y},
    "the same twice": {"image": X, "pixel_values": X.clone(), "label": Y, "labels": Y.int()},
    "class names": {"image": X, "label": ["name"] * 40, "target": Y},
    "one-hot labels": {"image": X, "label": torch.eye(10)[Y], "targets": Y.tolist()},
    "an object": types.SimpleNamespace(image=RAW.byte(), pixel_values=X, label=Y),
    "a plain object": types.SimpleNamespace(images=X, targets=Y),
    "a named tuple": Named(RAW, X, Y),
    "a named tuple without a name for the labels": Placed(X, Y),
    "a dictionary of one's own": collections.UserDict(image=X, label=Y),
}


@pytest.mark.parametrize("kind", SURE)
def test_of_two_candidates_the_only_usable_one_is_taken(kind: str) -> None:
    data = CleanData.collect([SURE[kind]])
    assert torch.equal(data.images, X)
    assert torch.equal(data.targets, Y)


UNSURE: dict[str, tuple[Any, str]] = {
    "images": ({"image": RAW, "pixel_values": X, "label": Y}, "'image' and 'pixel_values' .*image"),
    "the other order": ({"pixel_values": X, "image": RAW, "label": Y}, "could each be the images"),
    "another size": ({"x": X, "input": X[:, :, :2, :2]}, "'x' and 'input' could each be the imag"),
    "another precision": ({"x": X, "data": X.double()}, "'x' and 'data' could each be the images"),
    "labels": ({"image": X, "label": Y, "labels": Y // 2}, "'label' and 'labels' .* the labels"),
    "lists": ({"image": X, "target": Y.tolist(), "y": [0] * 40}, "'target' and 'y' could each be"),
    "an object": (types.SimpleNamespace(image=RAW, pixel_values=X), "could each be the images"),
    "an object's labels": (types.SimpleNamespace(x=X, y=Y, target=Y + 1), "each be the labels"),
}


@pytest.mark.parametrize("kind", UNSURE)
def test_of_two_usable_candidates_neither_is_taken(kind: str) -> None:
    batch, message = UNSURE[kind]
    with pytest.raises(DataError, match=f"batch 0: .*{message}.*, and differ; leave out all but"):
        CleanData.collect([batch])


# ---- loaders without an end ----------------------------------------------------------------------


class Claims(list[Any]):
    """A list that claims another length."""

    length = 3

    def __len__(self) -> int:
        return self.length


class Repeats(Claims):
    def __iter__(self) -> Iterator[Any]:
        return until_noticed(self[0])


def until_noticed(batch: Any, most: int = 150_000) -> Iterator[Any]:
    """One batch again and again."""
    for _ in range(most):
        yield batch
    pytest.fail("read far too much")


PIXEL = torch.zeros(1000, 1, 1, 1)
ENDLESS: dict[str, tuple[Any, str]] = {
    "images": ((PIXEL, torch.zeros(1000).long()), r"gave 101,000 images \(.*\) in 101 batches"),
    "images alone": ({"image": PIXEL}, r"gave 101,000 images \(.*\) in 101 batches"),
    "empty batches": (PIXEL[:0], r"gave 0 images \(0.0 GiB\) in 100,001 batches"),
}


@pytest.mark.parametrize("claim", [False, True])
@pytest.mark.parametrize("kind", ENDLESS)
def test_an_endless_loader_is_not_read_for_ever(kind: str, claim: bool) -> None:
    batch, message = ENDLESS[kind]
    loader = Repeats([batch]) if claim else until_noticed(batch)
    with pytest.raises(DataError, match=f"{message} and may have no end; .*islice.*Subset"):
        CleanData.collect(loader)


def test_endless_labels_to_search_are_not_read_for_ever() -> None:
    search = Inversion(steps=1)
    with pytest.raises(DataError, match=r"expected different labels in \[0, 2\), got \[0, 0, 0\]"):
        search.recover(two_classes(), CleanData(X), until_noticed(0), progress=False)


def test_images_that_fill_the_memory_are_not_copied() -> None:
    large = torch.zeros(1).expand(1000, 1, 10**6, 10**6)  # four petabytes, if it were copied
    with pytest.raises(DataError, match=r"gave 1,000 images \(.* GiB\) in 1 batches"):
        CleanData.collect([large])


@pytest.mark.parametrize("length", [0, 1, 10**9])
def test_a_wrong_length_does_not_matter(length: int) -> None:
    loader = Claims([(X[:20], Y[:20]), (X[20:], Y[20:])])
    loader.length = length
    assert torch.equal(CleanData.collect(loader).images, X)


# ---- things that are no loader -------------------------------------------------------------------


class Photos(Dataset[Any]):
    """As a data set without a transform."""

    def __getitem__(self, index: int) -> Any:
        return Image.new("RGB", (4, 4)), 0


class Holder:
    """As what `read_images` returns."""

    data = CleanData(X, Y)


NO_LOADER: dict[str, tuple[Any, str]] = {
    "a data set": (TensorDataset(X, Y), r"got shape \(3, 4, 4\).*wrap.*DataLoader\(dataset"),
    "its samples": (list(zip(X, Y, strict=True)), r"DataLoader\(dataset, batch_size"),
    "dictionaries of samples": ([{"image": X[0], "label": 0}], r"DataLoader\(dataset, batch_size"),
    "a data set of photos": (Photos(), r"with Image in .* normalised tensors.*DataLoader\("),
    "a data set of arrays": ([(X[0].numpy(), 1)], r"DataLoader\(dataset, batch_size"),
    "lists of samples": ([([X[0], X[1]], [0, 1])], r"stack them: torch.stack\(images\)"),
    "a path": (Path("images"), r"got a path; read it: read_images\(folder, preprocessing\).data"),
    "a path as text": ("images", "got a path; read it: read_images"),
    "files": (["a.png", "b.png"], "batch 0: .* got str; read the files: read_images"),
    "lists of files": ([(["a.png", "b.png"], [0, 1])], "read the files: read_images"),
    "a pair": ((X, Y), r"got images and labels; wrap them: CleanData\(images, labels\), or a list"),
    "a pair in a list": ([X, Y.tolist()], r"wrap .* \[\(images, labels\)\]"),
    "a pair with class names": ((X, ["name"] * 40), "got images and labels; wrap them"),
    "a pair without labels": ((X, None), "got images and labels; wrap them"),
    "a pair of arrays": ((X.numpy(), Y.numpy()), "got images and labels; wrap them"),
    "a triple": ((X, Y, ["name"] * 40), "got images and labels; wrap them"),
    "a dictionary": ({"image": X, "label": Y}, r"got a dictionary; for one batch, .* \[batch\]"),
    "arrays": ([(X.numpy(), Y.numpy())], r"got tuple with ndarray .*torch.from_numpy\(images\)"),
    "an array": (X.numpy(), r"got an array; make tensors \(torch.from_numpy\)"),
    "nothing": (None, "got NoneType; give a torch.utils.data.DataLoader, a list of batches"),
    "a number": (3, "got int; give a torch.utils.data.DataLoader"),
    "a function": (lambda: [(X, Y)], "got function; give what it returns"),
    "a class": (DataLoader, "got the class DataLoader; make one"),
    "images that were read": (Holder(), "got Holder; give its images: Holder.data"),
    "an iterator read before": (iter([]), "is empty .an iterator gives its batches once"),
    "none of the keys": ([{"label": Y}], r"a dictionary with one of .* keys \['label'\]"),
}


@pytest.mark.parametrize("kind", NO_LOADER)
def test_what_is_no_loader_is_told_how_to_be_one(kind: str) -> None:
    thing, message = NO_LOADER[kind]
    with pytest.raises(DataError, match=message):
        CleanData.collect(thing)


# ---- unusual tensors -----------------------------------------------------------------------------


def nested(*tensors: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that they are a prototype
        made: Tensor = torch.nested.nested_tensor(list(tensors))
    return made


UNUSUAL: dict[str, tuple[Any, str]] = {
    "sparse images": ((X.to_sparse(), Y), "batch 0: the images are of layout torch.sparse_coo; ma"),
    "sparse labels": ((X, Y.to_sparse()), "the labels are of layout torch.sparse_coo; make them d"),
    "nested images": (
        (nested(X[0], X[1, :, :2]), Y[:2]),
        "batch 0: the images are a nested tensor; resize them",
    ),
    "nested labels": ((X[:2], nested(Y[:1], Y[:1])), "the labels are a nest"),
    "images without values": ((X.to("meta"), Y), 'images are on the device "meta" and have no val'),
    "labels without values": ((X, Y.to("meta")), 'labels are on the device "meta" and have no val'),
    "complex images": ((X.to(torch.complex64), Y), "floating-point images.*got torch.complex64"),
    "images of bits": ((X > 0, Y), "floating-point images.*got torch.bool"),
    "images of 8 bits": ((X.to(torch.float8_e4m3fn), Y), "floating-point images.*float8"),
    "complex labels": ((X, Y.to(torch.complex64)), "expected 40 integer labels"),
    "labels of any size": ((X, [10**30] * 40), "expected 40 integer labels"),
    "no pixels": ((X[:, :, :0], Y), r"C, H, W and N > 0, got \(40, 3, 0, 4\)"),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_tensors_are_refused(kind: str) -> None:
    batch, message = UNUSUAL[kind]
    with pytest.raises(DataError, match=message):
        CleanData.collect([batch])
    with pytest.raises(DataError):
        CleanData(*batch)


def test_raw_bytes_are_not_joined_to_normalised_images() -> None:
    with pytest.raises(DataError, match=r"batch 1: expected floating-point images.*torch.uint8"):
        CleanData.collect([X, (X * 9).to(torch.uint8)])


@pytest.mark.parametrize("made", [lambda: CleanData(None), lambda: CleanData(X, Y.tolist())])
def test_clean_data_of_other_things_is_refused(made: Callable[[], Any]) -> None:
    with pytest.raises(DataError, match=r"as a tensor, got (NoneType|list)"):
        made()


@pytest.mark.parametrize(
    "work",
    [
        lambda net, data: purify(net, data, "magnitude", progress=False),
        create_criterion("magnitude"),
        lambda net, data: scan(net, data, progress=False),
        lambda net, data: CleanData.collect([(data.images, data.targets.tolist())]),
    ],
    ids=["purify", "criterion", "scan", "collect"],
)
def test_a_default_device_without_values_is_refused(work: Callable[[Any, Any], Any]) -> None:
    net, data = build("test_resnet"), CleanData(noise_images(40), Y)
    with torch.device("meta"):
        with pytest.raises(PurifyError, match=r"the default device is 'meta'; set it back, torch"):
            work(net, data)
        assert torch.get_default_device().type == "meta"


# ---- a loader that raises ------------------------------------------------------------------------


class Broken(Dataset[Any]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        if index == 17:
            raise FileNotFoundError("17.png")
        return X[index], int(Y[index])


def test_an_exception_of_the_loader_is_let_through_and_names_the_batch() -> None:
    with pytest.raises(FileNotFoundError, match=r"17\.png") as caught:
        CleanData.collect(DataLoader(Broken(), batch_size=8))
    assert caught.value.__notes__ == ["The clean loader raised this where batch 2 was to come."]


def test_an_exception_before_the_first_batch_names_it_too() -> None:
    class Fails:
        def __iter__(self) -> Iterator[Any]:
            raise RuntimeError

    with pytest.raises(RuntimeError) as caught:
        create_criterion("magnitude")(build("test_resnet"), Fails())  # type: ignore[arg-type]
    assert caught.value.__notes__ == ["The clean loader raised this where batch 0 was to come."]


def test_an_interrupt_is_let_through() -> None:
    def interrupted() -> Iterator[Any]:
        yield X, Y
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CleanData.collect(interrupted())


# ---- few images ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [10, 15])
def test_too_few_images_after_the_split_are_counted_as_given(count: int) -> None:
    loader = [(noise_images(count), torch.arange(count) % 10)]
    message = (
        f"^{count} clean images are too few: the split leaves [0-9]+ to score, [0-9]+ to select "
        "and [0-9]+ to measure, and scoring needs at least 10 for 10 classes; give at least 1[67]"
    )
    with pytest.raises(DataError, match=message):
        purify(build("test_resnet"), loader, "magnitude", progress=False)


def test_as_many_as_the_message_asks_for_do() -> None:
    loader = [(noise_images(17), torch.arange(17) % 10)]
    how: dict[str, Any] = {"selector": LowestFraction(0.1), "removal": "none", "progress": False}
    assert purify(build("test_resnet"), loader, "magnitude", **how).given.images == 17


@pytest.mark.parametrize("step", ["scoring", "selecting"])
def test_a_part_that_is_too_small_for_its_step_says_what_was_given(step: str) -> None:
    """Where a part is split again, to hold out images of it."""
    inversion = Inversion(steps=1, batch_size=2)
    method, selector = TAC(search_steps=1, steps=1), LowestFraction(0.1)
    if step == "selecting":
        method, selector = Magnitude(), TriggerGone(inversion=inversion)  # type: ignore[assignment]
    loader = [(noise_images(4), torch.arange(4) % 2)]
    with pytest.raises(
        DataError, match=r"too few to split .* \(of 4 clean images the split leaves"
    ):
        purify(two_classes(), loader, method, selector=selector, progress=False)


def two_classes() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ).eval()


def test_a_split_that_leaves_one_label_to_score_says_what_was_given() -> None:
    loader = [(noise_images(60), torch.tensor([5] * 59 + [0]))]  # as the network says
    how: dict[str, Any] = {"shares": (0.3, 0.6, 0.1), "progress": False}
    with pytest.raises(
        DataError, match=r"the 60 clean images .* leaves 18 to score.* label 5; giv"
    ):
        purify(build("test_resnet"), loader, "magnitude", **how)
