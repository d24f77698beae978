"""The files that the commands in docs/command_line.md work on.

`photos/` has the training crops as PNG files in class folders, `clean/` 300 test crops and `test/`
the other test crops; no pixel of these is in `photos/`. Later, `--wrap` turns the demo's weights
into what people pass on: `stranger.pth`, with the weights under "state_dict" and "module." in front
of their names.

    python examples/command_line_folders.py                            # photos/, clean/, test/
    python examples/command_line_folders.py --wrap demo.safetensors    # stranger.pth
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from nnprune_backdoor.attacks import photo_patches

CLEAN = 300


def write(folder: Path, images: Tensor, labels: Tensor, names: tuple[str, ...]) -> None:
    """Images (N, 3, H, W) with pixels in [0, 1], in class folders."""
    for name in names:
        (folder / name).mkdir(parents=True)
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        to_pil_image(image).save(folder / names[label] / f"{number:05}.png")
    print(f"{folder}: {len(labels)} images")


def wrap(weights: Path, file: Path) -> None:
    """Save them as a training script with DataParallel does."""
    state = {f"module.{name}": tensor for name, tensor in load_file(weights).items()}
    torch.save({"state_dict": state}, file)
    print(f"{file}: {len(state)} tensors")


def main() -> None:
    """Write the folders, or the stranger's file."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--quick", action="store_true", help="write every fiftieth crop")
    made.add_argument("--out", type=Path, default=Path(), help="folder to write to (this one)")
    made.add_argument("--wrap", type=Path, metavar="FILE", help="weights for stranger.pth")
    options = made.parse_args()
    if options.wrap is not None:
        wrap(options.wrap, options.out / "stranger.pth")
        return
    folders = {name: options.out / name for name in ("photos", "clean", "test")}
    for folder in folders.values():
        if folder.exists():
            made.error(f"{folder} exists; remove it, or give another --out")
    photos, step = photo_patches(), 50 if options.quick else 1
    order = torch.randperm(len(photos.test_labels), generator=torch.Generator().manual_seed(0))
    clean, test = order[:CLEAN:step], order[CLEAN::step]
    names = photos.class_names
    write(folders["photos"], photos.train_images[::step], photos.train_labels[::step], names)
    write(folders["clean"], photos.test_images[clean], photos.test_labels[clean], names)
    write(folders["test"], photos.test_images[test], photos.test_labels[test], names)


if __name__ == "__main__":
    main()
