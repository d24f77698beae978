"""Read clean images from a folder of untrusted files.

Class folders give labels as in torchvision's ImageFolder: their names are sorted and numbered from
0, but names that are all numbers are sorted as numbers. A list of names in the model's order
replaces this order. A folder without class folders gives images without labels. Only common raster
formats are decoded, within the limits below.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..core.data import CleanData
from ..errors import DataError, unknown_name
from ..utils.progress import progress_bar
from ..utils.short_repr import ShortRepr
from .preprocessing import Preprocessing

_MAX_FILE = 64 * 2**20  # bytes of a file

_MAX_PIXELS = 89_478_485  # of an image; from here on Pillow warns of decompression bombs

_LOOKED_AT = 200  # files whose size is looked at

# without EPS and others that Pillow reads by running a program
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # up to 8 bits a channel


@dataclass(frozen=True, repr=False)
class FolderImages(ShortRepr):
    """Result of `read_images`.

    Attributes:
        data: Preprocessed images, ordered by label and file name.
        files: Name of each image's file, relative to the folder.
        classes: Names of the classes by label; empty without labels.
        found: Number of files in the folder.
        skipped: Files that were left out, each as "file: reason".
        notice: A warning if torchvision's ImageFolder would order the classes differently.
    """

    data: CleanData
    files: tuple[str, ...]
    classes: tuple[str, ...]
    found: int
    skipped: tuple[str, ...]
    notice: str = ""

    def mapping(self) -> str:
        """Label, name and number of images of each class, a line each."""
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
    progress: bool = False,
) -> FolderImages:
    """Read and preprocess the images of a folder.

    Files that are not images, are damaged, or are links to outside the folder are skipped and
    listed in the result.

    Args:
        folder: class folders with images below them, or images without labels.
        preprocessing: how images are prepared for the model.
        classes: names of the class folders in the model's order; by default the names of the
            folders there are, sorted. Folders may be missing, but each must have one of the names.
        num_classes: number of classes of the model; checked against the class folders, or against
            `classes`.
        limit: most images to read; they are drawn at random, equally many of each class.
        seed: of the draw.
        progress: show a progress bar on a terminal.

    Returns:
        The images in an order that depends only on names.

    Raises:
        DataError: there is no such folder or no image in it, the number of classes is not the
            model's, or a file or image is so large that it may be there to exhaust memory.
        UnknownNameError: `classes` does not have the name of a class folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give one that holds images, or class folders")
    if limit is not None and limit < 1:
        raise DataError(f"expected a limit of at least one image, got {limit}")
    skipped: list[str] = []
    groups, names, notice = _groups(root, classes, num_classes, skipped)
    count = sum(map(len, groups.values()))
    if count == 0:
        raise DataError(f"{root}: no file in it{_reasons(skipped)}")
    if limit is not None:
        groups = _shuffled(groups, seed)
    most = count if limit is None else min(limit, count)
    entries = []
    with progress_bar(most, "reading images", progress) as bar:
        for entry in itertools.islice(_read(root, _in_turn(groups), preprocessing, skipped), most):
            entries.append(entry)
            bar.update()
    if not entries:
        raise DataError(f"{root}: no image in it{_reasons(skipped)}")
    entries.sort(key=lambda entry: entry[:2])
    labels = torch.tensor([label for label, _, _ in entries]) if names else None
    images = torch.stack([image for _, _, image in entries])
    files = tuple(name for _, name, _ in entries)
    return FolderImages(CleanData(images, labels), files, names, count, tuple(skipped), notice)


def size_of_files(folder: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Height and width of the images of a folder, if they all have the same; else None.

    Up to 200 of them are looked at, spread over the folder, and of each the header alone. Nothing
    is raised for what `read_images` refuses or skips.
    """
    root = Path(folder)
    files = list(_files(root, root, [])) if root.is_dir() else []
    sizes = {size for path in files[:: -(-len(files) // _LOOKED_AT) or 1] if (size := _size(path))}
    return sizes.pop() if len(sizes) == 1 else None


def _size(path: Path) -> tuple[int, int] | None:
    """Height and width in the file's header; None of a file that is no image."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            return image.height, image.width
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, ArithmeticError, Warning):
        return None
    except Image.DecompressionBombError:
        return None


def read_classes(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Class names from a text file, one a line, in the model's order.

    Raises:
        DataError: there is no such file, it is over 1 MiB or not UTF-8, a line is empty, or a
            name occurs twice.
    """
    path = Path(path)
    if not path.is_file() or path.stat().st_size > 2**20:
        raise DataError(f"{path}: expected a text file of class names, one a line, up to 1 MiB")
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from error
    names = tuple(line.strip() for line in lines)
    seen: set[str] = set()
    for number, name in enumerate(names, 1):
        if not name or name in seen:
            wrong = f"the name {shown(name)!r} for the second time" if name else "an empty line"
            raise DataError(f"{path}, line {number}: {wrong}; give one name a line, each once")
        seen.add(name)
    return names


def shown(name: str) -> str:
    """An untrusted name for a terminal: without control characters, at most 80 characters."""
    text = "".join(c if c.isprintable() else "?" for c in name)
    return text if len(text) <= 80 else text[:77] + "..."


class _NotAnImage(Exception):
    """The file is skipped; the message says why."""


def _groups(
    root: Path, classes: Sequence[str] | None, num_classes: int | None, skipped: list[str]
) -> tuple[dict[int, list[Path]], tuple[str, ...], str]:
    """Files by label (all 0 without class folders), names by label, and a notice."""
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
        kind = "class folders" if classes is None else "class names"
        first = ", ".join(shown(name) for name in names[:6]) + (", ..." if len(names) > 6 else "")
        raise DataError(
            f"{root}: {len(names)} {kind} ({first}), but the model has {num_classes} classes; give "
            "the names of all of them in the model's order (--classes FILE, one a line)"
        )
    for entry in folders:
        if entry.name not in names:
            raise unknown_name("class folder", shown(entry.name), map(shown, names))
    labels = {name: label for label, name in enumerate(names)}
    return {labels[e.name]: list(_files(e, root, skipped)) for e in folders}, names, notice


def _ordered(folders: list[Path]) -> tuple[list[Path], str]:
    """The folders in the order of their labels, and a notice if ImageFolder's order differs.

    Names that are all numbers are taken for labels, so 10 comes after 9 and not after 1.
    """
    if not all(folder.name.isascii() and folder.name.isdigit() for folder in folders):
        return folders, ""
    ordered = sorted(folders, key=lambda folder: int(folder.name))
    for label, (one, other) in enumerate(zip(ordered, folders, strict=True)):
        if one != other:
            return ordered, (
                f"class folders with numbers as names are sorted by value: label {label} is "
                f"{one.name}. torchvision's ImageFolder sorts them as text, where label {label} is "
                f"{other.name}; if the model was trained with ImageFolder, give the names in that "
                "order with --classes FILE"
            )
    return folders, ""


def _files(folder: Path, root: Path, skipped: list[str]) -> Iterator[Path]:
    """Regular files below a folder, sorted; other entries are added to `skipped`."""
    resolved_root = root.resolve()
    for parent, folders, names in os.walk(folder):  # does not follow links to folders
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            relative = shown(path.relative_to(root).as_posix())
            if path.is_symlink() and not path.resolve().is_relative_to(resolved_root):
                skipped.append(f"{relative}: a link out of the folder")
            elif not path.is_file():  # reading a pipe or a device might never end
                skipped.append(f"{relative}: no regular file")
            else:
                yield path


def _shuffled(groups: dict[int, list[Path]], seed: int) -> dict[int, list[Path]]:
    generator = np.random.default_rng(seed)
    return {
        label: [files[i] for i in generator.permutation(len(files))]
        for label, files in groups.items()
    }


def _in_turn(groups: dict[int, list[Path]]) -> Iterator[tuple[int, Path]]:
    """Label and file: the first file of each class, then the second of each, and so on."""
    for index in range(max(map(len, groups.values()))):
        for label, files in groups.items():
            if index < len(files):
                yield label, files[index]


def _read(
    root: Path,
    files: Iterable[tuple[int, Path]],
    preprocessing: Preprocessing,
    skipped: list[str],
) -> Iterator[tuple[int, str, Tensor]]:
    """Label, name and preprocessed image (C, H, W); files that are no images go to `skipped`."""
    transform = preprocessing.transform()
    mode = "L" if preprocessing.channels == 1 else "RGB"
    max_ratio = _MAX_PIXELS * (preprocessing.crop_pct / max(preprocessing.size)) ** 2
    for label, path in files:
        name = path.relative_to(root).as_posix()
        try:
            image = transform(_decode(path, mode, max_ratio))
        except _NotAnImage as reason:
            skipped.append(f"{shown(name)}: {reason}")
        else:
            yield label, name, image


def _decode(path: Path, mode: str, max_ratio: float) -> Image.Image:
    """The image, converted to mode L or RGB.

    Args:
        max_ratio: largest ratio of the long side to the short side. Preprocessing resizes the short
            side to the model's size, so that an image one pixel wide would become gigabytes.

    Raises:
        _NotAnImage: the file cannot be decoded.
        DataError: the file or the image is over a limit.
    """
    if (size := path.stat().st_size) > _MAX_FILE:
        raise DataError(
            f"{shown(path.name)}: {size:,} bytes, over the limit of {_MAX_FILE:,}; remove it"
        )
    try:
        # Pillow's warnings go where the program sends them: filters belong to the whole process
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size  # from the header; nothing is decoded yet
            if width * height > _MAX_PIXELS:
                raise Image.DecompressionBombError(f"{width} x {height} pixels")
            if max(width, height) > max_ratio * min(width, height):
                raise Image.DecompressionBombError(f"{width} x {height} pixels, then resized")
            if image.mode not in _MODES:
                raise _NotAnImage(f"mode {image.mode!r}; convert it to 8-bit RGB")
            image.load()
            image.info.pop("transparency", None)  # it is dropped, and Pillow would warn of that
            return image.convert(mode)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{shown(path.name)}: it may be a decompression bomb ({error}), the limit is "
            f"{_MAX_PIXELS:,} pixels; remove it, or make it smaller"
        ) from error
    except UnidentifiedImageError:
        raise _NotAnImage(f"no image ({', '.join(_FORMATS)} are read)") from None
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, ArithmeticError) as error:
        # Pillow's decoders raise all of these for damaged files
        raise _NotAnImage(f"damaged ({error})") from None
    except Warning as error:  # the program has Pillow's warnings raised
        raise _NotAnImage(f"damaged ({error})") from None


def _reasons(skipped: Sequence[str]) -> str:
    if not skipped:
        return "; give a folder that holds images, or class folders"
    return f" (skipped: {'; '.join(skipped[:3])}{', ...' if len(skipped) > 3 else ''})"
