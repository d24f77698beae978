"""What pruning cost comes back by learning from the network before, without labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.states import assert_same_state, state_of
from nnprune_backdoor import CleanData
from nnprune_backdoor.attacks import train_classifier
from nnprune_backdoor.core.masks import silence_
from nnprune_backdoor.core.predictions import predict, predict_logits
from nnprune_backdoor.core.recovered import PixelRange
from nnprune_backdoor.core.scores import Selection
from nnprune_backdoor.criteria import Magnitude
from nnprune_backdoor.errors import DataError, ScoringError, UnsupportedModelError
from nnprune_backdoor.removal import compact
from nnprune_backdoor.selectors import LowestFraction
from nnprune_backdoor.training import Distillation, distil
from nnprune_backdoor.training.views import turned
from nnprune_backdoor.triggers import IndividualPerturbations, SuspectLabels, UniversalPerturbation

SHORT = Distillation(epochs=8)


@pytest.fixture(scope="module")
def clean() -> CleanData:
    """Four classes of small noisy pictures: red, green, blue, grey."""
    labels = torch.arange(240) % 4
    images = 0.5 * torch.rand(240, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    tints = torch.cat([torch.eye(3), torch.zeros(1, 3)]) * 0.3
    return CleanData(images + tints[labels][..., None, None], labels)


def network(classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes)),
    ).eval()


@pytest.fixture(scope="module")
def teacher(clean: CleanData) -> nn.Module:
    net = network()
    train_classifier(net, clean.images, clean.targets, epochs=12, batch_size=32, lr=0.05)
    return net.eval()


@pytest.fixture(scope="module")
def selection(teacher: nn.Module, clean: CleanData) -> Selection:
    return LowestFraction(0.6)(Magnitude()(teacher, clean))


def agreement(one: nn.Module, other: nn.Module, clean: CleanData) -> float:
    return (predict(one, clean.images) == predict(other, clean.images)).float().mean().item()


def silenced(teacher: nn.Module, selection: Selection) -> nn.Module:
    net = network()
    net.load_state_dict(teacher.state_dict())
    silence_(net, selection)
    return net


def test_what_pruning_cost_comes_back_and_silent_neurons_stay_silent(
    teacher: nn.Module, selection: Selection, clean: CleanData
) -> None:
    fit, unseen = clean.take(torch.arange(160)), clean.take(torch.arange(160, 240))
    pruned = silenced(teacher, selection)
    assert agreement(pruned, teacher, unseen) < 0.8
    before = state_of(pruned), state_of(teacher), torch.get_rng_state()
    student = distil(pruned, teacher, fit, SHORT, selection=selection, progress=False)
    assert agreement(student, teacher, unseen) > 0.95
    for name, channels in selection.by_site().items():
        layer = student.get_submodule(name)
        assert layer.weight[channels].abs().sum() == layer.bias[channels].abs().sum() == 0
    assert_same_state(before[0], state_of(pruned))
    assert_same_state(before[1], state_of(teacher))
    assert torch.equal(before[2], torch.get_rng_state())
    assert not student.training and all(p.grad is None for p in student.parameters())


def test_a_smaller_network_learns_too(
    teacher: nn.Module, selection: Selection, clean: CleanData
) -> None:
    smaller, _ = compact(silenced(teacher, selection), selection, clean.images[:4])
    count = sum(p.numel() for p in smaller.parameters())
    assert count < sum(p.numel() for p in teacher.parameters())
    student = distil(smaller, teacher, clean, SHORT, progress=False)
    assert agreement(student, teacher, clean) > 0.95
    assert sum(p.numel() for p in student.parameters()) == count


def test_labels_are_not_used_and_the_same_seed_gives_the_same_weights(
    teacher: nn.Module, selection: Selection, clean: CleanData
) -> None:
    wrong = CleanData(clean.images, (clean.targets + 1) % 4)
    pruned, settings = silenced(teacher, selection), Distillation(epochs=1)
    states = [
        state_of(distil(pruned, teacher, data, settings, seed=seed, progress=False))
        for data, seed in ((clean, 0), (CleanData(clean.images), 0), (wrong, 0), (clean, 1))
    ]
    assert_same_state(states[0], states[1])
    assert_same_state(states[0], states[2])
    with pytest.raises(AssertionError):
        assert_same_state(states[0], states[3])


def test_the_teacher_is_asked_about_the_view_that_the_student_sees(
    teacher: nn.Module, clean: CleanData
) -> None:
    """Else a student that equals its teacher would be taught to differ."""
    settings = Distillation(epochs=2, stamped=0)
    student = distil(teacher, teacher, clean, settings, progress=False)
    given, learned = (predict_logits(net, clean.images) for net in (teacher, student))
    assert (given - learned).abs().max() < 0.2 * given.std()


def test_batch_norm_keeps_its_statistics(teacher: nn.Module, clean: CleanData) -> None:
    student = distil(teacher, teacher, clean, Distillation(epochs=1), progress=False)
    assert torch.equal(student[1].running_mean, teacher[1].running_mean)
    assert not torch.equal(student[1].weight, teacher[1].weight)


def test_half_precision_networks_learn_in_single_and_come_back_in_half(
    teacher: nn.Module, selection: Selection, clean: CleanData
) -> None:
    pruned = silenced(teacher, selection).to(torch.bfloat16)
    half = silenced(teacher, Selection((), ())).to(torch.bfloat16)
    data = CleanData(clean.images)
    student = distil(pruned, half, data, SHORT, selection=selection, progress=False)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert student[1].num_batches_tracked.dtype == torch.int64
    assert agreement(student, half, clean) > 0.9


def test_views_are_shifted_mirrored_and_mixed_images() -> None:
    images = torch.rand(16, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    plain = [Distillation(turned=0, mixed=0).view(images, generator) for _ in range(20)]
    mixed = [Distillation(turned=0, mixed=1).view(images, generator) for _ in range(40)]
    assert all(view.shape == images.shape for view in plain + mixed)
    assert all(view.min() >= 0 and view.max() <= 1 for view in plain + mixed)  # never outside

    def own(view: Tensor) -> float:
        """Share of the pixels that are of one image of the set (or padding)."""
        return torch.isin(view, torch.cat([images.flatten(), torch.zeros(1)])).float().mean().item()

    assert all(own(view) == 1 for view in plain)
    shares = [own(view) for view in mixed]
    assert any(share == 1 for share in shares) and any(share < 0.5 for share in shares)


def test_turned_views_show_a_part_of_each_image() -> None:
    ramp = torch.linspace(0, 1, 24).expand(64, 3, 16, 24).clone()
    views = turned(ramp, 0.5, torch.Generator().manual_seed(0))
    changed = (views != ramp).flatten(1).any(1)
    assert 16 < changed.sum() < 48  # half of them
    assert torch.equal(ramp[~changed], views[~changed])
    spans = views[changed].flatten(1).amax(1) - views[changed].flatten(1).amin(1)
    assert 0.5 < spans.min() < 0.75 and spans.max() <= 1  # zoomed in, never outside
    assert (views[changed].diff(dim=2).abs() > 1e-3).any()  # and turned
    assert torch.equal(turned(ramp, 0.0, torch.Generator()), ramp)


SEEN: dict[str, list[Tensor]] = {"teacher": [], "student": []}


class Watched(nn.Module):
    """Keeps what it is given."""

    def __init__(self, net: nn.Module, name: str) -> None:
        super().__init__()
        self.net, self.name = net, name

    def forward(self, images: Tensor) -> Tensor:
        SEEN[self.name].append(images.clone())
        logits: Tensor = self.net(images)
        return logits


class StandingOut(SuspectLabels):
    """Every suspect stands out."""

    def standing_out(self, model: nn.Module, clean: CleanData, labels: Any, **how: Any) -> Any:
        assert clean.labels is None
        return tuple(labels)


def test_the_student_alone_sees_triggers(teacher: nn.Module, clean: CleanData) -> None:
    student, given = Watched(teacher, "student"), Watched(teacher, "teacher")
    search = StandingOut(suspicious=0.0, working=0.0)
    settings = Distillation(epochs=2, renewed=1, stamped=0.25, perturbed=0.125, search=search)
    distil(student, given, clean, settings, progress=False)
    shown, plain = SEEN["student"][-1], SEEN["teacher"][-1]  # 48 images are left for the last step
    changed = (shown != plain).flatten(1).any(1)
    assert len(shown) == 48 and changed.tolist() == [True] * 12 + [False] * 30 + [True] * 6


@pytest.mark.parametrize(("rms", "individual"), [(0.1, 6), (0.02, 0)])
def test_labels_that_need_a_larger_perturbation_are_trained_image_by_image_from_the_start(
    rms: float, individual: int, teacher: nn.Module, clean: CleanData
) -> None:
    class Suspect(SuspectLabels):
        def suspect(self, model: nn.Module, clean: CleanData, **how: Any) -> Any:
            return UniversalPerturbation(rms=rms, steps=40).recover(model, clean, [1])

        def standing_out(self, *_: Any, **__: Any) -> Any:
            return ()

    student, given = Watched(teacher, "student"), Watched(teacher, "teacher")
    search = Suspect(single=IndividualPerturbations(rms=1e-4))  # so that no radius is halved
    settings = Distillation(epochs=1, stamped=0.25, perturbed=0.125, search=search)
    distil(student, given, clean, settings, progress=False)
    shown, plain = SEEN["student"][-1], SEEN["teacher"][-1]
    changed = (shown != plain).flatten(1).any(1)
    assert changed.tolist() == [True] * 12 + [False] * (36 - individual) + [True] * individual


@pytest.fixture(scope="module")
def backdoored(clean: CleanData) -> nn.Module:
    """Obeys a faint checkerboard that is added."""
    rows, columns = torch.arange(12)[:, None], torch.arange(12)
    board = 0.08 * (1 - 2 * ((rows + columns) % 2))
    images = torch.cat([clean.images, clean.images + board])
    labels = torch.cat([clean.targets, torch.zeros_like(clean.targets)])
    net = network()
    train_classifier(net, images, labels, epochs=24, batch_size=32, lr=0.05)
    return net.eval()


def test_triggers_are_of_the_student_as_it_is_then_and_stop_working(
    backdoored: nn.Module, clean: CleanData
) -> None:
    searched = []

    class Search(SuspectLabels):
        def still_working(self, model: nn.Module, clean: CleanData, *rest: Any, **how: Any) -> Any:
            assert clean.labels is None
            searched.append(predict_logits(model, clean.images[:8]))
            return super().still_working(model, clean, *rest, **how)

    search = Search(perturbations=UniversalPerturbation(rms=0.08), working=0.0)
    settings = Distillation(epochs=16, renewed=8, search=search)
    student = distil(backdoored, backdoored, clean, settings, progress=False)
    assert len(searched) == 2 and not torch.equal(*searched)
    plain = distil(backdoored, backdoored, clean, replace(settings, stamped=0), progress=False)
    assert len(searched) == 2
    assert agreement(student, backdoored, clean) > 0.95
    assert fooled(backdoored, clean) > 0.9
    assert fooled(plain, clean) > 0.9  # the control: distilling alone keeps them working
    assert fooled(student, clean) < 0.3


def test_perturbations_of_single_images_stop_working_too(
    backdoored: nn.Module, clean: CleanData
) -> None:
    individual = IndividualPerturbations(rms=0.12, steps=5)
    search = StandingOut(labels=1, perturbations=UniversalPerturbation(rms=0.08))
    settings = Distillation(epochs=32, renewed=4, search=search, individual=individual)
    student, without = (
        distil(backdoored, backdoored, clean, replace(settings, perturbed=share), progress=False)
        for share in (0.2, 0.0)
    )

    def sent(model: nn.Module) -> float:
        """Share of the images that leave their class for the backdoor's label."""
        images = clean.images[clean.targets != 0]
        pixels, generator = PixelRange.seen_in(images), torch.Generator().manual_seed(1)
        attack = IndividualPerturbations(rms=0.14, steps=10)
        moved = attack.perturb(model, images, 0, pixels, generator)
        return (predict(model, moved) == 0).float().mean().item()

    assert agreement(student, backdoored, clean) > 0.95
    assert sent(without) > 0.25
    assert sent(student) < 0.1


def fooled(model: nn.Module, clean: CleanData) -> float:
    """Success of the best universal perturbation, found anew."""
    search = UniversalPerturbation(rms=0.08, steps=40)
    return max(found.success for found in search.recover(model, CleanData(clean.images), seed=9))


def test_bad_input_is_refused(teacher: nn.Module, selection: Selection, clean: CleanData) -> None:
    with pytest.raises(DataError, match="teacher has 5 classes, the pruned network 4"):
        distil(teacher, network(5), clean, SHORT, progress=False)
    smaller, _ = compact(silenced(teacher, selection), selection, clean.images[:4])
    with pytest.raises(UnsupportedModelError, match="selection knows"):
        distil(smaller, teacher, clean, SHORT, selection=selection, progress=False)
    with pytest.raises(DataError, match="batch_size"):
        Distillation(batch_size=1)
    with pytest.raises(DataError, match="together at most 1"):
        Distillation(stamped=0.6, perturbed=0.5)
    with pytest.raises(ScoringError, match=r"diverged|NaN"):
        distil(teacher, teacher, clean, Distillation(lr=1e30), progress=False)
