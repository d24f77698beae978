"""A checkpoint as hubs give it: `config.json` beside `model.safetensors`, and a folder of images.

timm's models on Hugging Face come as these two files. The configuration names the architecture, its
arguments, the labels in the model's order, and how images were prepared in training. All of that
matters: with another mean the model is a worse one, and with labels in another order accuracy says
nothing. Here a demo writes such a folder; reading it needs no network and runs no code from it.
Needs the extra `demo`.

    python examples/hub_checkpoint.py            # about two minutes on two cores
    python examples/hub_checkpoint.py --quick    # a network that has learned little, to see it run
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from nnprune_backdoor import (
    Preprocessing,
    PurifyError,
    load_model,
    load_purified,
    purify,
    read_images,
    save_purified,
)
from nnprune_backdoor.attacks import photo_patches
from nnprune_backdoor.attacks.evaluation import accuracy
from nnprune_backdoor.demo import Demo
from nnprune_backdoor.selectors import LowestFraction, TriggerGone


def publish(demo: Demo, folder: Path) -> tuple[Tensor, Tensor]:
    """What a stranger does: train, upload. Returns test photographs (N, 3, 32, 32) and labels."""
    photos = photo_patches()
    model = demo.train(photos, progress=True)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    arguments = demo.arguments()
    config = {
        "architecture": demo.arch,
        "num_classes": arguments.pop("num_classes"),
        "label_names": photos.class_names,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return photos.test_images, photos.test_labels


def main(arguments: list[str] | None = None) -> None:
    """Read configuration, weights and images; purify; save; load."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="so young that nothing is learned")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    demo = Demo(width=0.25, seed=options.seed)
    if options.quick:
        demo = replace(demo, epochs=1, images=640)

    with TemporaryDirectory() as scratch:
        hub, photographs = Path(scratch) / "hub", Path(scratch) / "photos"
        pixels, labels = publish(demo, hub)

        config = json.loads((hub / "config.json").read_text())
        names = config["label_names"]
        for i in range(0, len(labels), 20 if options.quick else 5):  # yours: a folder a class
            place = photographs / names[labels[i]]
            place.mkdir(parents=True, exist_ok=True)
            to_pil_image(pixels[i]).save(place / f"{i}.png")

        # from here on as with any such folder
        model = load_model(
            hub / "model.safetensors",
            config["architecture"],
            num_classes=config["num_classes"],
            **config.get("model_args", {}),
        )
        preprocessing = Preprocessing.of(config["pretrained_cfg"])
        print(f"\npreprocessing: {preprocessing}")
        images = read_images(photographs, preprocessing, classes=names, num_classes=len(names))
        print(f"{len(images.data)} of {images.found} files, as\n{images.mapping()}")

        wrong = Preprocessing.of(None, size=preprocessing.size)  # what is usual with timm
        others = read_images(photographs, wrong, classes=names)
        by_name = read_images(photographs, preprocessing)  # folders in the order of their names
        for what, found in (
            ("as configured", images),
            (f"mean {wrong.mean[0]:g}, ...", others),
            ("labels by folder name", by_name),
        ):
            print(f"ACC {accuracy(model, found.data.images, found.data.targets)}  {what}")
        try:
            read_images(photographs, preprocessing, classes=sorted(names)[1:])
        except PurifyError as refusal:
            print(f"refused: {refusal}")

        if options.quick:  # nothing to recover in so young a network
            purified = purify(model, images.data, "clp", selector=LowestFraction(0.05))
        else:
            purified = purify(model, images.data, "tac", selector=TriggerGone(), seed=options.seed)
        print(f"\n{purified.summary()}\n")

        out = save_purified(
            purified,
            Path(scratch) / "purified",
            arch=config["architecture"],
            model_args=config.get("model_args", {}),
        )
        for file in sorted(out.iterdir()):
            print(f"{file.name:20} {file.stat().st_size:10,} bytes")
        again = load_purified(out)
        print(f"ACC {accuracy(again, images.data.images, images.data.targets)}  loaded again")


if __name__ == "__main__":
    main()
