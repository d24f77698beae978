"""The networks in the papers' regime in small: what is promised of the list, split and attacks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.networks.published import attacks, images, recipes, train
from benchmarks.networks.published.__main__ import summarise
from benchmarks.networks.published.architectures import ARCHITECTURES, build
from benchmarks.render import published
from nnprune_backdoor.attacks import create_attack

RECIPES = recipes.RECIPES
_EACH = 30  # images of a class


def some_images() -> images.Images:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (10 * _EACH, 3, 32, 32), generator=generator).byte()
    return images.Images(pixels, torch.arange(10).repeat_interleave(_EACH))


def poisoned(name: str) -> tuple[images.Images, attacks.Poisoned]:
    clean, recipe = some_images(), RECIPES[name]
    return clean, attacks.Poisoned(recipe, clean, attacks.triggers(recipe, clean, Path()))


def test_the_list_is_as_long_as_promised_and_buildable() -> None:
    benign = [name for name, recipe in RECIPES.items() if not recipe.backdoors]
    assert len(benign) >= 8
    assert len(RECIPES) - len(benign) >= 24
    assert {recipe.arch for recipe in RECIPES.values()} == set(ARCHITECTURES)
    development = recipes.development()
    assert len(development) == len(set(development)) == len(ARCHITECTURES) + 2
    assert {RECIPES[name].arch for name in development} == set(ARCHITECTURES)


@pytest.mark.network
@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_architectures_are_narrow_and_reproducible(arch: str) -> None:
    model, again = build(arch, 1), build(arch, 1)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(weight.numel() for weight in model.parameters()) < 1.2e6
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_the_halves_are_apart_and_balanced() -> None:
    test = some_images()
    a, b = images.halves(test)
    assert torch.equal(a.labels.bincount(), b.labels.bincount())
    assert torch.equal(a.pixels, test.pixels[::2])  # 30 of each: even places are every second one
    assert torch.equal(b.pixels, test.pixels[1::2])


def test_folders_and_array_files_hold_the_same_images(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for label, name in enumerate(("aeroplane", "bird")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(2):
                colour = (10 * label, i, 100)
                Image.new("RGB", (32, 32), colour).save(tmp_path / part / name / f"{i}.png")
    read = images.read(tmp_path)
    images.save(*read, tmp_path / "arrays.npz")
    for one, other in zip(read, images.read(tmp_path / "arrays.npz"), strict=True):
        assert one.labels.tolist() == [0, 0, 1, 1]
        colours = one.pixels[:, :, 0, 0].tolist()
        assert colours == [[0, 0, 100], [0, 1, 100], [10, 0, 100], [10, 1, 100]]
        assert torch.equal(one.pixels, other.pixels)


def test_poison_once_and_of_two_backdoors() -> None:
    clean, data = poisoned("resnet-two_targets-0")
    changed = (data.images.pixels != clean.pixels).flatten(1).any(1)
    assert changed.sum() == round(0.1 * len(clean.labels))
    assert data.images.labels[changed].bincount().tolist() == [15, 15]
    pixels, labels = data.batch(changed.nonzero().flatten()[:4], seed=0)
    assert torch.equal((255 * pixels).round().byte(), data.images.pixels[changed][:4])
    assert torch.equal(labels, data.images.labels[changed][:4])


def test_wanet_warps_a_tenth_of_each_batch_and_twice_as_many_in_noise_mode() -> None:
    clean, data = poisoned("resnet-wanet-0")
    chosen = torch.arange(0, 300, 3)
    first, labels = data.batch(chosen, seed=1)
    assert torch.equal(data.images.pixels, clean.pixels), "nothing is poisoned in advance"
    relabelled = labels != clean.labels[chosen]
    changed = ((255 * first).round().byte() != clean.pixels[chosen]).flatten(1).any(1)
    assert (int(relabelled.sum()), int(changed.sum())) == (10, 30)
    assert set(labels[relabelled].tolist()) == {5}
    assert not torch.equal(labels, data.batch(chosen, seed=2)[1])


class Features(nn.Module):
    """One feature is the mean of the red channel; it alone decides."""

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def forward_head(self, features: torch.Tensor, pre_logits: bool) -> torch.Tensor:
        return features.mean((2, 3))

    def get_classifier(self) -> nn.Linear:
        head = nn.Linear(3, 2)
        head.weight.data = torch.tensor([[5.0, 0.1, 0.1], [-5.0, 0.1, 0.1]])
        return head


@pytest.mark.parametrize("name", ["trojan_square", "trojan_watermark"])
def test_patches_excite_the_neuron_that_decides(name: str) -> None:
    shape = attacks.mask(name)
    assert 0.05 < (shape > 0).float().mean() < 0.25
    found = attacks.optimised(Features(), some_images(), shape, steps=60, seed=0)
    inside = found.pattern[:, shape > 0]
    assert inside[0].min() > 0.7, "red was not raised"
    assert (inside[1:] - 0.5).abs().max() < 1e-4, "the other channels excite nothing"
    stamped = found(some_images().scaled())
    assert torch.equal(stamped[:, :, shape == 0], some_images().scaled()[:, :, shape == 0])


def test_an_attack_that_resists_pruning_adds_the_copys_gradients_and_keeps_the_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(1))
    model.append(nn.Linear(8 * 30 * 30, 10)).train()
    clean = some_images().scaled()[::10]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    triggered = create_attack("badnets")(clean)
    attacks.resist_pruning(model, clean, triggered, torch.full((len(clean),), 2))
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    head = model[-1].bias.grad
    assert head[2] < 0, "the target is to become more likely"
    assert abs(head.sum()) < 1e-5


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.Dropout(0.1), nn.Flatten(), nn.Linear(256, 10)
    )


def test_training_resumes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "resnet", (small, ARCHITECTURES["resnet"][1]))
    recipe = replace(RECIPES["resnet-wanet-0"], epochs=2)
    whole, halted = tmp_path / "whole", tmp_path / "halted"
    (whole.mkdir(), halted.mkdir())
    both = some_images(), some_images()
    straight = train.train(recipe, both, whole, compiled=False)

    def keep_and_stop(trainer: train.Trainer) -> None:
        keep(trainer)
        raise KeyboardInterrupt

    keep = train.Trainer._keep
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Trainer, "_keep", keep_and_stop)
        train.train(recipe, both, halted, compiled=False)
    with pytest.raises(SystemExit, match="another recipe"):
        train.train(replace(recipe, seed=1), both, halted, compiled=False)
    resumed = train.train(recipe, both, halted, compiled=False)
    assert resumed["sha256"] == straight["sha256"]
    losses = [row["loss"] for row in straight["curve"]]
    assert len(losses) == 2
    assert [row["loss"] for row in resumed["curve"]] == losses
    left = sorted(file.suffix for file in halted.iterdir())
    assert left == [".json", ".safetensors"]


def test_the_summary_names_every_network(tmp_path: Path) -> None:
    (tmp_path / "resnet-badnets-0.json").write_text(json.dumps({"acc": 0.9, "asr": 0.1}))
    summarise(tmp_path, tmp_path / "zoo.json")
    written = json.loads((tmp_path / "zoo.json").read_text())
    assert list(written["networks"]) == list(RECIPES)
    assert written["networks"]["resnet-badnets-0"] == {"acc": 0.9, "asr": 0.1}
    assert written["networks"]["resnet-benign-0"] is None
    assert written["development"] == recipes.development()


def test_the_page_tells_attacks_that_took_from_those_that_did_not() -> None:
    row = {"acc": 0.9, "asr": 0.95, "ra": 0.04, "took": True, "cpu_minutes": 30.5}
    missed = {**row, "asr": 0.5, "took": False}
    networks = {
        "a": {**row, "recipe": {"backdoors": [{}]}},
        "b": {**missed, "recipe": {"backdoors": [{}]}},
        "c": {"acc": 0.9, "took": None, "cpu_minutes": 30.5, "recipe": {"backdoors": []}},
        "d": None,
    }
    page = published({"development": ["a"], "networks": networks})
    assert "3 of 4 networks of the list are trained" in page
    assert "on 1 of 2 backdoored ones" in page
    assert "| a | 90.0 | 95.0 | 4.0 | yes | 30.5 | development |" in page
    assert "| b | 90.0 | 50.0 | 4.0 | no | 30.5 | test |" in page
    assert "| c | 90.0 |  |  | benign | 30.5 | test |" in page
    assert "| d | not trained yet |  |  |  |  | test |" in page
