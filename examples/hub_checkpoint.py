"""A checkpoint as hubs have it: `config.json` beside `model.safetensors`, and a folder of images.

timm's models on Hugging Face come as these two files. The configuration names the architecture, its
arguments, the labels in the model's order, and how images were prepared in training. All of that
matters: another mean makes the model worse, and accuracy means nothing if the labels are in another
order. Here a demo writes such a folder. Reading it needs no network and runs no code from it.

    python examples/hub_checkpoint.py    # about two minutes on two cores
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from _shared import parser, plant
from safetensors.torch import save_file
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

DEMO = Demo(width=0.25)


def write_checkpoint(folder: Path, weights: dict, names: tuple[str, ...]) -> None:
    """What the stranger uploads."""
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    config = {
        "architecture": DEMO.arch,
        "num_classes": len(names),
        "label_names": names,
        "model_args": {"channels": DEMO.arguments()["channels"]},
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_images(folder: Path, step: int) -> None:
    """Your own images, in class folders: every `step`-th test photograph."""
    photos = photo_patches()
    for i in range(0, len(photos.test_labels), step):
        place = folder / photos.class_names[photos.test_labels[i]]
        place.mkdir(parents=True, exist_ok=True)
        to_pil_image(photos.test_images[i]).save(place / f"{i}.png")


def main() -> None:
    """Read configuration, weights and images; purify; save; load."""
    options = parser(__doc__).parse_args()
    given = plant(DEMO, options)
    with TemporaryDirectory() as scratch:
        hub, folder = Path(scratch) / "hub", Path(scratch) / "photos"
        write_checkpoint(hub, given.model.state_dict(), photo_patches().class_names)
        write_images(folder, 20 if options.quick else 5)

        # from here on as with any such folder
        config = json.loads((hub / "config.json").read_text())
        arch, names, arguments = (config[k] for k in ("architecture", "label_names", "model_args"))
        model = load_model(hub / "model.safetensors", arch, **arguments)
        preprocessing = Preprocessing.of(config["pretrained_cfg"])
        print(f"\npreprocessing: {preprocessing}")
        images = read_images(folder, preprocessing, classes=names, num_classes=len(names))
        print(f"{len(images.data)} of {images.found} files, as\n{images.mapping()}")

        usual = Preprocessing.of(None, size=preprocessing.size)  # what is usual with timm
        for how, found in (
            ("as configured", images),
            (f"mean {usual.mean[0]:g}, ...", read_images(folder, usual, classes=names)),
            ("labels in the order of folder names", read_images(folder, preprocessing)),
        ):
            print(f"ACC {accuracy(model, found.data.images, found.data.targets)}  {how}")
        try:
            read_images(folder, preprocessing, classes=sorted(names)[1:])
        except PurifyError as refusal:
            print(f"refused: {refusal}")

        settings = given.unless_quick(method="tac", selector="trigger", repair="unlearn")
        purified = purify(model, images.data, seed=options.seed, **settings)
        print(f"\n{purified.summary()}\n")

        out = save_purified(purified, Path(scratch) / "purified", arch=arch, model_args=arguments)
        for file in sorted(out.iterdir()):
            print(f"{file.name:20} {file.stat().st_size:10,} bytes")
        again = load_purified(out)
        print(f"ACC {accuracy(again, images.data.images, images.data.targets)}  loaded again")


if __name__ == "__main__":
    main()
