"""Clean images from a folder of files that need not be trusted.

Class folders give labels as in torchvision's ImageFolder: their names, sorted, are the classes 0,
1, ..., but names that are all numbers are sorted as numbers. A list of names in the model's order
may say otherwise. A folder without class folders gives images without labels. Only plain raster
formats are decoded, never beyond the limits below.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..core.data import CleanData
from ..errors import DataError, unknown_name
from ..utils.progress import progress_bar
from .preprocessing import Preprocessing

MAX_FILE = 64 * 2**20  # bytes of one file

MAX_PIXELS = 89_478_485  # of one image, where Pillow begins to warn of decompression bombs

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")  # none runs a program, as EPS does

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # eight bits a channel


@dataclass(frozen=True)
class FolderImages:
    """What `read_images` found."""

    data: CleanData  # preprocessed, in order of class and file name
    files: tuple[str, ...]  # of each image, relative to the folder
    classes: tuple[str, ...]  # names by label; empty: no labels
    found: int  # files that were there to choose from
    skipped: tuple[str, ...]  # "file: why", of all that was looked at and left out
    notice: str = ""  # on the order of the classes, where ImageFolder has another

    def mapping(self) -> str:
        """Which class folder stands for which label, in one line each."""
        assert self.data.labels is not None
        counts = torch.bincount(self.data.labels, minlength=len(self.classes)).tolist()
        pairs = zip(self.classes, counts, strict=True)
        return "\n".join(f"{i:5} {shown(name)}: {n} images" for i, (name, n) in enumerate(pairs))


def read_images(
    folder: str | os.PathLike[str],
    preprocessing: Preprocessing,
    *,
    classes: Sequence[str] | None = None,
    num_classes: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    max_file: int = MAX_FILE,
    progress: bool = False,
) -> FolderImages:
    """Read the images of a folder, in an order that depends on names alone.

    What is no image (or is damaged, or a link that leads out of the folder) is skipped and named.

    Args:
        classes: names of class folders in the model's order; by default the folders' own names,
            sorted, as numbers where all are. With it folders may be missing, but none may have
            another name.
        num_classes: of the model; class folders must be as many, or `classes` names.
        limit: most images to take, drawn at random and balanced over the class folders.
        max_file: bytes of the largest file that is opened.

    Raises:
        DataError: no such folder, no image in it, not as many classes as the model has, a file
            or an image over the limits (which may be there to exhaust memory).
        UnknownNameError: a class folder that `classes` does not name.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give one that holds images, or class folders")
    if limit is not None and limit < 1:
        raise DataError(f"expected at least one image, got a limit of {limit}")
    skipped: list[str] = []
    groups, names, notice = _groups(root, classes, num_classes, skipped)
    found = sum(map(len, groups.values()))
    if found == 0:
        raise DataError(f"{root}: no file in it{_why(skipped)}")
    generator = np.random.default_rng(seed)
    queues = {label: list(files) for label, files in groups.items()}
    if limit is not None:
        queues = {
            c: [files[i] for i in generator.permutation(len(files))] for c, files in queues.items()
        }
    transform = preprocessing.transform()
    mode = "L" if preprocessing.channels == 1 else "RGB"
    longest = MAX_PIXELS * (preprocessing.crop_pct / max(preprocessing.size)) ** 2
    taken: list[tuple[int, str, torch.Tensor]] = []
    most = found if limit is None else min(limit, found)
    with progress_bar(most, "reading images", progress) as bar:
        for label, path in _turns(queues):
            if len(taken) == most:
                break
            name = path.relative_to(root).as_posix()
            try:
                taken.append((label, name, transform(_decode(path, mode, max_file, longest))))
                bar.update()
            except _NoImage as reason:
                skipped.append(f"{shown(name)}: {reason}")
    if not taken:
        raise DataError(f"{root}: no image in it{_why(skipped)}")
    taken.sort(key=lambda entry: entry[:2])
    labels = torch.tensor([label for label, _, _ in taken]) if names else None
    images = torch.stack([image for _, _, image in taken])
    files = tuple(name for _, name, _ in taken)
    return FolderImages(CleanData(images, labels), files, names, found, tuple(skipped), notice)


def read_classes(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Class names from a text file, one a line, in the model's order.

    Raises:
        DataError: no such file, no UTF-8, over a mebibyte, an empty line, a name twice.
    """
    path = Path(path)
    if not path.is_file() or path.stat().st_size > 2**20:
        raise DataError(f"{path}: expected a text file of class names, one a line, up to 1 MiB")
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error})") from error
    names = tuple(line.strip() for line in lines)
    seen: set[str] = set()
    for number, name in enumerate(names, 1):
        if not name or name in seen:
            what = f"the name {shown(name)!r} for the second time" if name else "an empty line"
            raise DataError(f"{path}, line {number}: {what}; give one name a line, each once")
        seen.add(name)
    return names


def shown(name: str) -> str:
    """A name from a stranger's disk, fit for a terminal: no control characters, not too long."""
    text = "".join(c if c.isprintable() else "?" for c in name)
    return text if len(text) <= 80 else text[:77] + "..."


class _NoImage(Exception):
    """This file is left out, for the reason given."""


def _groups(
    root: Path, classes: Sequence[str] | None, num_classes: int | None, skipped: list[str]
) -> tuple[dict[int, list[Path]], tuple[str, ...], str]:
    """Files by label, the labels' names and a notice; without class folders all are under 0."""
    entries = sorted(root.iterdir(), key=lambda entry: entry.name)
    folders = []
    for entry in entries:
        if entry.is_symlink() and entry.is_dir():
            skipped.append(f"{shown(entry.name)}: a link to a folder")
        elif entry.is_dir() and entry.name.startswith("."):
            skipped.append(f"{shown(entry.name)}: a hidden folder")
        elif entry.is_dir():
            folders.append(entry)
    if not folders:
        return {0: list(_files(root, root, skipped))}, (), ""
    skipped += [f"{shown(e.name)}: in no class folder" for e in entries if not e.is_dir()]
    notice = ""
    if classes is None:
        folders, notice = _ordered(folders)
    names = tuple(entry.name for entry in folders) if classes is None else tuple(classes)
    if num_classes is not None and len(names) != num_classes:
        what = "class folders" if classes is None else "class names"
        few = ", ".join(shown(name) for name in names[:6]) + (", ..." if len(names) > 6 else "")
        raise DataError(
            f"{root}: {len(names)} {what} ({few}), and the model has {num_classes} classes; give "
            "the names of all of them in the model's order (--classes FILE, one a line)"
        )
    for entry in folders:
        if entry.name not in names:
            raise unknown_name("class folder", shown(entry.name), map(shown, names))
    labels = {name: label for label, name in enumerate(names)}
    return {labels[e.name]: list(_files(e, root, skipped)) for e in folders}, names, notice


def _ordered(folders: list[Path]) -> tuple[list[Path], str]:
    """Sorted folders in the order of their labels, and what to say where ImageFolder has another.

    Who names folders by numbers means labels: 10 comes after 9, and not after 1.
    """
    if not all(folder.name.isascii() and folder.name.isdigit() for folder in folders):
        return folders, ""
    ordered = sorted(folders, key=lambda folder: int(folder.name))
    for label, (one, other) in enumerate(zip(ordered, folders, strict=True)):
        if one != other:
            return ordered, (
                f"class folders named by numbers are taken by value: label {label} is {one.name}. "
                f"torchvision's ImageFolder sorts them as text, where it is {other.name}; if the "
                "model was trained with that, give the names in that order by --classes FILE"
            )
    return folders, ""


def _files(folder: Path, root: Path, skipped: list[str]) -> Iterator[Path]:
    """Regular files below a folder, sorted; links that lead out of `root` are named as skipped."""
    home = root.resolve()
    for here, inner, names in os.walk(folder):  # follows no link to a folder
        inner.sort()
        for name in sorted(names):
            path = Path(here, name)
            relative = shown(path.relative_to(root).as_posix())
            if path.is_symlink() and not path.resolve().is_relative_to(home):
                skipped.append(f"{relative}: a link out of the folder")
            elif not path.is_file():  # a pipe or a device would block, or never end
                skipped.append(f"{relative}: no regular file")
            else:
                yield path


def _turns(queues: dict[int, list[Path]]) -> Iterator[tuple[int, Path]]:
    """One file of every class, then the next of every class, until all are through."""
    for turn in range(max(map(len, queues.values()))):
        for label, files in queues.items():
            if turn < len(files):
                yield label, files[turn]


def _decode(path: Path, mode: str, max_file: int, longest: float) -> Image.Image:
    """The image, in mode L or RGB; raises _NoImage, or DataError over the limits.

    `longest` is how often the short side may go into the long one: resizing brings the short side
    to what the model takes, so a line of pixels in a file of 200 bytes would become gigabytes.
    """
    if (size := path.stat().st_size) > max_file:
        raise DataError(
            f"{shown(path.name)}: {size:,} bytes, over the limit of {max_file:,}; take it out"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about metadata and palettes
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                width, height = image.size  # from the header; nothing is decoded yet
                if width * height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f"{width} x {height} pixels")
                if max(width, height) > longest * min(width, height):
                    raise Image.DecompressionBombError(f"{width} x {height} pixels, then resized")
                if image.mode not in _MODES:
                    raise _NoImage(f"pixels of kind {image.mode!r}; convert it to 8-bit RGB")
                return image.convert(mode)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{shown(path.name)}: it may be a decompression bomb ({error}), the limit is "
            f"{MAX_PIXELS:,} pixels; take it out, or make it smaller"
        ) from error
    except UnidentifiedImageError:
        raise _NoImage(f"no image ({', '.join(_FORMATS)} are read)") from None
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, ArithmeticError) as error:
        # what Pillow's decoders raise on damaged files
        raise _NoImage(f"damaged ({error})") from None


def _why(skipped: Sequence[str]) -> str:
    return f" (skipped: {'; '.join(skipped[:3])}{', ...' if len(skipped) > 3 else ''})" * bool(
        skipped
    )
