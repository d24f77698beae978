"""The logits are found in whatever a model returns, and the model stays the user's own."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.images import noise_images
from helpers.settings import SCAN
from helpers.states import assert_same_state, hooks_of, state_of
from nnprune_backdoor import CleanData, create_criterion, purify
from nnprune_backdoor.attacks.evaluation import accuracy
from nnprune_backdoor.core.outputs import logits_named
from nnprune_backdoor.core.prepared import Prepared
from nnprune_backdoor.core.sites import find_classifiers, find_sites
from nnprune_backdoor.errors import UnsupportedModelError
from nnprune_backdoor.removal import compact
from nnprune_backdoor.selectors import LowestCount
from nnprune_backdoor.training import Distillation, FineTuning, distil, fine_tune

CLASSES = 4


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...] = ()


class Slotted:
    __slots__ = ("logits",)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


Pair = collections.namedtuple("Pair", ["scores", "maps"])


class Net(nn.Module):
    """Two convolutions and a classifier; what it returns is for a function to say."""

    def __init__(self, returned: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, CLASSES)
        self.other = nn.Linear(8, 5)
        self.returned = returned

    def forward(self, images: Tensor) -> Any:
        maps = self.second(self.norm(self.first(images)).relu()).relu()
        features = maps.mean((2, 3))
        return self.returned(maps, features, self.head(features))


class Keyword(Net):
    """As some models of transformers: images by name alone."""

    def forward(self, *, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        return super().forward(pixel_values)


def plain(maps: Tensor, features: Tensor, logits: Tensor) -> Tensor:
    return logits


FOUND: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "object": lambda m, f, z: Output(z, (m,)),
    "slots": lambda m, f, z: Slotted(z),
    "named beside one of the same shape": lambda m, f, z: {"out": 2 * z, "logits": z},
    "tuple of one": lambda m, f, z: (z,),
    "tuple with maps": lambda m, f, z: (m, z),
    "namedtuple": lambda m, f, z: Pair(z, m),
    "features after": lambda m, f, z: (z, f),
    "features before": lambda m, f, z: [f, z],
    "features, detached": lambda m, f, z: (z, f.detach()),
    "probabilities": lambda m, f, z: {"p": z.softmax(1), "log": z.log_softmax(1), "z": z},
    "all of it": lambda m, f, z: {"f": f, "p": z.softmax(1), "z": z, "label": z.argmax(1)},
    "nested": lambda m, f, z: {"loss": None, "output": {"head": (z, m)}},
    "twice the same": lambda m, f, z: {"out": z, "aux": z},
}


def net(returned: Callable[[Tensor, Tensor, Tensor], Any], kind: type[Net] = Net) -> Net:
    torch.manual_seed(0)
    return kind(returned).eval()


@pytest.fixture(scope="module")
def images() -> CleanData:
    return CleanData(noise_images(48)[:, :, :16, :16], torch.arange(48) % CLASSES)


@pytest.mark.parametrize("form", FOUND)
def test_the_logits_are_found(form: str, images: CleanData) -> None:
    model = net(FOUND[form])
    some = images.images[:4]
    assert torch.equal(Prepared.of(model, images).model(some), net(plain)(some))


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], str]] = {
    "two heads": (lambda m, f, z: (z, z.flip(1) * f.mean()), r"\[0\] \(2, 4\), \[1\] \(2, 4\)"),
    "scaled": (lambda m, f, z: {"z": z, "hot": z / 2}, "several tensors"),
    "two of that name": (lambda m, f, z: {"a": Output(z), "b": Output(z + 1)}, r"\['a'\].logits"),
    "maps alone": (lambda m, f, z: {"logits": m}, r"expected a classifier .* got \(2, 8, 16, 16\)"),
    "labels": (lambda m, f, z: (z.argmax(1), m), "nothing is"),
    "no tensor": (lambda m, f, z: {"loss": None}, "no tensor"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_cannot_be_told_is_refused(form: str, images: CleanData) -> None:
    returned, message = REFUSED[form]
    with pytest.raises(UnsupportedModelError, match=message):
        Prepared.of(net(returned), images)


@pytest.mark.parametrize("kind", [Net, Keyword])
def test_purify_gives_what_it_gives_for_the_logits_alone(
    kind: type[Net], images: CleanData
) -> None:
    how: dict[str, Any] = {"selector": LowestCount(3), "progress": False}
    given = net(FOUND["object"], kind).train()
    given.norm.eval()
    before, hooks = state_of(given), hooks_of(given)
    purified = purify(given, images, "magnitude", **how)
    assert_same_state(before, state_of(given))
    assert hooks_of(given) == hooks
    assert [m.training for m in given.modules()] == [m.training for m in purified.model.modules()]
    assert not any(any(counts) for counts in hooks_of(purified.model))

    reference = purify(net(plain), images, "magnitude", **how)
    assert purified.selection.neurons == reference.selection.neurons
    assert purified.removal is not None and purified.removal.removed
    assert purified.accuracy == reference.accuracy
    some = images.images[:4]
    model = purified.model.eval()
    output = model(some) if kind is Net else model(pixel_values=some)
    assert isinstance(output, Output)
    assert torch.equal(output.logits, reference.model(some))


def test_scan_and_scores_are_those_of_the_logits_alone(images: CleanData) -> None:
    given = net(FOUND["features after"])
    wanted, found = (SCAN(model, images, labels=[1]) for model in (net(plain), given))
    assert found.suspicions == wanted.suspicions
    criterion = create_criterion("magnitude")
    scores = [criterion(model, images).flat for model in (net(plain), given)]
    assert torch.equal(*scores)
    assert not any(any(counts) for counts in hooks_of(given))


def test_other_functions_take_it_too(images: CleanData) -> None:
    given, reference = net(FOUND["object"]), net(plain)
    some = images.images[:4]
    assert find_sites(given, some) == find_sites(reference, some)
    assert find_classifiers(given, some) == ("head",)
    both = (accuracy(model, images.images, images.targets) for model in (given, reference))
    assert len(set(both)) == 1
    tuned = fine_tune(given, images, FineTuning(epochs=1), progress=False)
    learned = distil(tuned, given, images, Distillation(epochs=1, stamped=0), progress=False)
    assert isinstance(tuned(some), Output) and isinstance(learned(some), Output)
    scores = create_criterion("magnitude")(given, images)
    smaller, _ = compact(given, LowestCount(0)(scores), some)
    assert isinstance(smaller(some), Output)
    assert not any(any(counts) for counts in hooks_of(given))


def test_the_logits_can_be_named_where_they_cannot_be_told(clean: CleanData) -> None:
    two = Net(lambda maps, features, logits: {"a": logits, "b": (features, -logits)}).eval()
    before = state_of(two)
    with pytest.raises(UnsupportedModelError, match=r"logits_named\(model, name\)"):
        Prepared.of(two, CleanData(clean.images))
    for name, sign in (("a", 1), ("b.1", -1)):
        named = logits_named(two, name)
        with torch.no_grad():
            wanted = sign * two(clean.images[:4])["a"]
            assert torch.equal(named(clean.images[:4]), wanted)
        assert Prepared.of(named, CleanData(clean.images)).classes == CLASSES
    assert_same_state(before, state_of(two))
    with pytest.raises(UnsupportedModelError, match=r"no tensor named 'c'.*\['a'\] \(2, 4\)"):
        Prepared.of(logits_named(two, "c"), CleanData(clean.images))


def test_what_is_made_of_a_named_model_returns_the_same(clean: CleanData) -> None:
    two = Net(lambda maps, features, logits: (logits, -logits)).eval()
    images = CleanData(clean.images)
    done = purify(
        logits_named(two, 1), images, create_criterion("clp"), selector=LowestCount(2),
        progress=False,
    )  # fmt: skip
    with torch.no_grad():
        assert done.model(clean.images[:4]).shape == (4, CLASSES)
