"""torchvision's classifiers by name: what is read from the weights, saved, and loaded again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision

from helpers.images import noise_images
from nnprune_backdoor import CleanData, load_model, load_purified, purify, save_purified
from nnprune_backdoor.errors import CheckpointError, UnknownNameError
from nnprune_backdoor.files.architecture import complete, create
from nnprune_backdoor.files.preprocessing import Preprocessing
from nnprune_backdoor.files.torchvision_models import config_of
from nnprune_backdoor.selectors import LowestFraction

NAME = "torchvision:squeezenet1_1"


def test_it_is_loaded_purified_saved_and_loaded_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = torchvision.models.squeezenet1_1(num_classes=7).eval()
    torch.save({"model": given.state_dict()}, tmp_path / "model.pth")
    images = noise_images(40)
    model = load_model(tmp_path / "model.pth", NAME)
    assert torch.equal(model(images), given(images))
    how = {"selector": LowestFraction(0.05), "progress": False}
    purified = purify(model, CleanData(images), "magnitude", **how)  # type: ignore[arg-type]
    assert purified.removal is not None and purified.removal.removed
    save_purified(purified, tmp_path / "out", arch=NAME)
    assert torch.equal(load_purified(tmp_path / "out")(images), purified.model(images))


@pytest.mark.parametrize(
    ("name", "made_with"),
    [
        ("resnet18", {"num_classes": 7}),
        ("squeezenet1_1", {"num_classes": 7}),
        ("densenet121", {"num_classes": 7}),
        ("vit_b_32", {"num_classes": 7, "image_size": 64}),
    ],
)
def test_sizes_are_read_from_the_weights(name: str, made_with: dict[str, int]) -> None:
    with torch.device("meta"):
        weights = getattr(torchvision.models, name)(**made_with).state_dict()
    assert complete(f"torchvision:{name}", {}, weights) == made_with


def test_bad_names_and_arguments_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'torchvision:resnet18'"):
        create("torchvision:resnet_18", {})
    with pytest.raises(UnknownNameError, match="no classifier"):
        create("torchvision:fcn_resnet50", {})  # for segmentation
    for name in ("weights", "weights_backbone"):
        with pytest.raises(CheckpointError, match="is no argument"):
            create("torchvision:resnet18", {name: "DEFAULT"})


def test_images_are_prepared_as_torchvision_does() -> None:
    made = Preprocessing.of(config_of("torchvision:resnet18"))
    assert made.size == (224, 224) and made.crop_pct == 224 / 256
    assert made.interpolation == "bilinear"
    for name in torchvision.models.list_models(module=torchvision.models):
        Preprocessing.of(config_of(f"torchvision:{name}"))
