"""Folders of transformers: the same logits and images come out, and nothing in them is run."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("transformers")

from helpers.networks import take_statistics_
from helpers.states import assert_same_state, hooks_of, state_of
from helpers.transformers_models import (
    CLASSES,
    SMALL,
    images_for,
    logits_of,
    small,
    transformers,
)
from nnprune_backdoor import (
    CleanData,
    Preprocessing,
    Purified,
    load_model,
    load_purified,
    purify,
    save_purified,
)
from nnprune_backdoor.errors import CheckpointError, DataError
from nnprune_backdoor.evidence import Scan
from nnprune_backdoor.files import read_preprocessing, read_record
from nnprune_backdoor.selectors import AccuracyBudget, LowestFraction
from nnprune_backdoor.triggers import Inversion, UniversalPerturbation


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may reach for the network."""

    def refuse(*_: Any) -> None:
        raise AssertionError("somebody opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A ViT as save_pretrained wrote it."""
    small("ViT").save_pretrained(tmp_path / "vit")  # type: ignore[operator]
    return tmp_path / "vit"


def purified_of(name: str, removal: Any) -> Purified:
    data = CleanData(images_for(name, 40), torch.arange(40) % CLASSES)
    how: dict[str, Any] = {"selector": LowestFraction(0.1), "progress": False}
    return purify(small(name), data, "magnitude", removal=removal, **how)


@pytest.mark.parametrize("name", SMALL)
def test_a_folder_gives_the_logits_that_were_saved(name: str, tmp_path: Path) -> None:
    given, images = small(name), images_for(name, 3)
    given.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = load_model(tmp_path, "hf")
    assert type(loaded) is type(given) and not loaded.training
    assert torch.equal(logits_of(loaded, images), logits_of(given, images))
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert torch.equal(logits_of(load_model(tmp_path, "hf"), images), logits_of(given, images))
    (tmp_path / "pytorch_model.bin").unlink()
    given.save_pretrained(tmp_path, max_shard_size="4KB")  # type: ignore[operator]
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits_of(load_model(tmp_path, "hf"), images), logits_of(given, images))


def test_half_precision_is_loaded_in_single(tmp_path: Path) -> None:
    given = small("ViT").half()
    given.save_pretrained(tmp_path)  # type: ignore[operator]
    assert next(load_model(tmp_path, "hf").parameters()).dtype == torch.float32


def with_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def with_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return write


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no configuration": (lambda f: (f / "config.json").unlink(), "save_pretrained"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "no plain JSON"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "a folder without model",
    ),
    "unknown type": (with_config(model_type="mine"), "no image classifier of model_type 'mine'"),
    "type is a list": (with_config(model_type=["vit"]), "no image classifier"),
    "no classifier": (with_config(architectures=["ViTModel"]), "'ViTModel' is no image classifier"),
    "text": (with_config(model_type="bert"), "no image classifier of model_type 'bert'"),
    "timm inside": (with_config(model_type="timm_wrapper"), "timm_wrapper"),
    "quantised": (with_config(quantization_config={"bits": 4}), "quantised"),
    "many layers": (with_config(num_hidden_layers=10**6), "over 65,536"),
    "too wide": (with_config(hidden_size=65_000, intermediate_size=65_000), "over the limit"),
    "other values": (with_config(hidden_size="wide"), "cannot"),
    "missing": (with_weights(lambda w: w.pop("classifier.bias")), "1 missing: classifier.bias"),
    "more": (with_weights(lambda w: w.update(x=torch.ones(2))), "1 unexpected: x"),
    "other shape": (
        with_weights(lambda w: w.update({"classifier.bias": torch.ones(9)})),
        "1 of another shape: .*classifier.bias",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused(kind: str, folder: Path) -> None:
    change, message = REFUSED[kind]
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder, "hf")


def test_code_in_the_folder_is_not_run(folder: Path) -> None:
    images = images_for("ViT", 2)
    wanted = logits_of(load_model(folder, "hf"), images)
    (folder / "mine.py").write_text("raise SystemExit('it was run')")
    with_config(
        auto_map={
            "AutoConfig": "mine.Config",
            "AutoModelForImageClassification": "mine.Model",
        },
        attn_implementation="somebody/kernel",
        _attn_implementation="somebody/kernel",
        fusion_config={"patch_embeddings": True},
    )(folder)
    assert torch.equal(logits_of(load_model(folder, "hf"), images), wanted)


def test_a_folder_takes_no_further_arguments(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json says all"):
        load_model(folder, "hf", num_classes=3)


def test_a_folder_of_timm_is_told_from_one_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(CheckpointError, match="leave out the architecture, or give 'resnet18'"):
        load_model(tmp_path, "hf")


PROCESSORS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {"size": {"height": 40, "width": 40}},
    "DeiTImageProcessor": {"size": {"height": 40, "width": 40}, "crop_size": 32},
    "ConvNextImageProcessor": {"size": {"shortest_edge": 40}, "crop_pct": 0.9},
    "BitImageProcessor": {"size": {"shortest_edge": 41}, "crop_size": 37},
    "MobileViTImageProcessor": {"size": {"shortest_edge": 40}, "crop_size": 32},
    "EfficientNetImageProcessor": {"size": 40, "rescale_factor": 1 / 127.5},
    "PoolFormerImageProcessor": {"size": {"shortest_edge": 40}, "crop_size": 40},
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_images_are_prepared_as_transformers_does(kind: str, tmp_path: Path) -> None:
    processor = getattr(transformers, kind)(**PROCESSORS[kind])
    processor.save_pretrained(tmp_path)
    ramp = np.linspace(0, 255, 60 * 50 * 3).reshape(60, 50, 3)[..., [2, 0, 1]]
    image = Image.fromarray((255 - ramp[::-1] * [1, 0.5, 0.25]).astype(np.uint8))
    wanted = processor(image, return_tensors="pt")["pixel_values"][0]
    preprocessing = read_preprocessing(tmp_path)
    made = preprocessing.transform()(image)
    assert made.shape == wanted.shape
    # they may round to whole grey levels at other steps
    assert ((made - wanted).abs() * torch.tensor(preprocessing.std)[:, None, None]).max() < 3 / 255
    assert Preprocessing.from_dict(preprocessing.to_dict()) == preprocessing
    pixels = preprocessing.pixels(made[None])
    assert torch.allclose(preprocessing.normalise(pixels), made[None], atol=1e-5)
    red, _, blue = pixels[0].mean((1, 2))
    assert red < blue  # in RGB again, whatever the model takes


def test_old_names_and_defaults_are_read(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(
        '{"feature_extractor_type": "ViTFeatureExtractor", "size": 224, "auto_map": {"a": "b.c"}}'
    )
    made = read_preprocessing(tmp_path)
    assert (made.size, made.mean, made.crop_mode) == ((224, 224), (0.5, 0.5, 0.5), "squash")


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"image_processor_type": "Mine"},
        {"image_processor_type": "ViTImageProcessor", "do_resize": False},
        {"image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": 30}},
        {"image_processor_type": "ViTImageProcessor", "resample": 1},
        {"image_processor_type": "ViTImageProcessor", "image_std": [0, 0, 0]},
        {"image_processor_type": "BitImageProcessor", "size": 20, "crop_size": 32},
        {"image_processor_type": "SegformerImageProcessor", "size": "wide"},
        {"image_processor_type": "BeitImageProcessor", "do_normalize": 3, "image_mean": "x"},
    ],
)
def test_other_preprocessing_is_refused(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(DataError):
        read_preprocessing(tmp_path)


def test_in_its_shape_transformers_loads_it_and_so_does_load_purified(tmp_path: Path) -> None:
    purified, images = purified_of("ViT", "none"), images_for("ViT", 3)
    wanted = logits_of(purified.model, images)
    save_purified(purified, tmp_path / "out", arch="hf")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(model, images), wanted)
    assert torch.equal(logits_of(load_purified(tmp_path / "out"), images), wanted)
    assert torch.equal(logits_of(load_model(tmp_path / "out", "hf"), images), wanted)
    save_purified(purified, tmp_path / "out", arch="hf", overwrite=True)


@pytest.mark.parametrize("half", [False, True])
def test_compacted_it_goes_through_load_purified(half: bool, tmp_path: Path) -> None:
    purified, images = purified_of("Swin", "exact"), images_for("Swin", 3)
    assert purified.removal is not None and purified.removal.removed
    if half:
        purified.model.bfloat16()
        images = images.bfloat16()
    save_purified(purified, tmp_path / "out", arch="hf")
    assert not (tmp_path / "out" / "config.json").exists()  # transformers would not fit it
    loaded = load_purified(tmp_path / "out")
    assert torch.equal(logits_of(loaded, images), logits_of(purified.model, images))
    assert read_record(tmp_path / "out")["architecture"]["name"] == "hf"


def test_only_models_of_transformers_are_saved_so(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 900, CLASSES))
    data = CleanData(images_for("ViT", 40))
    how: dict[str, Any] = {"selector": LowestFraction(0.1), "progress": False}
    with pytest.raises(CheckpointError, match="no model of transformers"):
        save_purified(purify(net, data, "magnitude", **how), tmp_path / "out", arch="hf")


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_each_kind_is_purified_and_scanned(name: str) -> None:
    count = 96 if name == "MobileViT" else 64
    labels = torch.arange(count) % CLASSES
    tints = torch.eye(CLASSES)[labels][:, :3, None, None] * 3
    data = CleanData(images_for(name, count) / 2 + tints, labels)
    model = small(name).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2 if name == "MobileViT" else 3e-3)
    for _ in range(25 if name == "MobileViT" else 40):
        loss = nn.functional.cross_entropy(model(data.images).logits, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    take_statistics_(model, data.images)
    before = state_of(model)
    purified = purify(model, data, "rnp", selector=AccuracyBudget(points=10), progress=False)
    assert_same_state(before, state_of(model))
    assert purified.accuracy is not None and purified.accuracy.before.value > 0.9
    assert purified.accuracy.after.value > 0.8
    assert len(purified.selection) and type(purified.model) is type(model)
    assert not any(any(counts) for counts in hooks_of(purified.model))
    quick = Scan(
        search=Inversion(steps=5, batch_size=8),
        universal=UniversalPerturbation(steps=5, batch_size=8),
    )
    diagnosis = quick(purified.model, data)
    assert len(diagnosis.suspicions) == 2
