"""Images from folders: order, classes, links, hostile files, and what timm would compute."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from nnprune_backdoor import Preprocessing, read_images
from nnprune_backdoor.errors import DataError, UnknownNameError
from nnprune_backdoor.files import FolderImages
from nnprune_backdoor.files.images import read_classes, size_of_files

PLAIN = Preprocessing(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)


def draw(path: Path, grey: int, size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (grey, grey, grey)).save(path)
    return path


def folders(root: Path, names: Sequence[str], each: int = 3) -> Path:
    """Class folders whose images are grey, 20 * class + number."""
    for label, name in enumerate(names):
        for number in range(each):
            draw(root / name / f"{number}.png", 20 * label + number)
    return root


def greys(found: FolderImages) -> list[int]:
    return [round(x) for x in (255 * PLAIN.pixels(found.data.images)[:, 0, 0, 0]).tolist()]


def labels(found: FolderImages) -> list[int]:
    return found.data.targets.tolist()


def test_class_folders_are_labels_by_sorted_name(tmp_path: Path) -> None:
    root = folders(tmp_path, ["a", "b", "c"], each=2)
    draw(root / "b" / "deep" / "x.png", 33)
    found = read_images(root, PLAIN, num_classes=3)
    assert found.classes == ("a", "b", "c")
    assert labels(found) == [0, 0, 1, 1, 1, 2, 2]
    assert greys(found) == [0, 1, 20, 21, 33, 40, 41]
    assert found.files[4] == "b/deep/x.png"
    assert "b: 3 images" in found.mapping()
    assert found.skipped == ()


def test_names_in_the_models_order_decide(tmp_path: Path) -> None:
    root = folders(tmp_path, ["a", "c"], each=1)
    found = read_images(root, PLAIN, classes=["c", "b", "a"], num_classes=3)
    assert (labels(found), greys(found)) == ([0, 2], [20, 0])
    with pytest.raises(UnknownNameError, match="did you mean 'cat'"):
        read_images(folders(tmp_path / "x", ["cats"]), PLAIN, classes=["cat", "dog"])


def test_folders_named_by_numbers_are_labels_by_value(tmp_path: Path) -> None:
    names = [str(number) for number in range(12)]
    found = read_images(folders(tmp_path / "bare", names, each=1), PLAIN, num_classes=12)
    assert found.classes == tuple(names)
    assert greys(found) == [20 * label for label in range(12)]
    assert "label 2 is 2. " in found.notice
    assert "where label 2 is 10; " in found.notice
    as_text = read_images(tmp_path / "bare", PLAIN, classes=sorted(names))
    assert (as_text.classes[2], as_text.notice) == ("10", "")
    for kind, others in {"padded": ["00", "01", "10"], "words": ["1", "10", "2", "a"]}.items():
        found = read_images(folders(tmp_path / kind, others, each=1), PLAIN)
        assert (found.classes, found.notice) == (tuple(others), "")


def test_as_many_classes_as_the_model_has(tmp_path: Path) -> None:
    root = folders(tmp_path, ["a", "b"], each=1)
    with pytest.raises(DataError, match=r"2 class folders \(a, b\).*3 classes.*--classes"):
        read_images(root, PLAIN, num_classes=3)
    with pytest.raises(DataError, match="2 class names"):
        read_images(root, PLAIN, classes=["a", "b"], num_classes=3)


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for grey in (3, 1, 2):
        draw(tmp_path / f"{grey}.png", grey)
    found = read_images(tmp_path, PLAIN, num_classes=10)
    assert found.data.labels is None
    assert found.classes == ()
    assert greys(found) == [1, 2, 3]


def test_a_draw_is_balanced_and_follows_the_seed(tmp_path: Path) -> None:
    root = folders(tmp_path, ["a", "b"], each=8)
    draw(folders(tmp_path, ["c"], each=0) / "c" / "only.png", 99)
    drawn = [read_images(root, PLAIN, limit=9, seed=seed) for seed in (0, 0, 1)]
    for found in drawn:
        assert torch.bincount(found.data.targets).tolist() == [4, 4, 1]
        assert found.found == 17
    assert drawn[0].files == drawn[1].files != drawn[2].files
    assert len(read_images(root, PLAIN, limit=100).files) == 17
    with pytest.raises(DataError, match="at least one"):
        read_images(root, PLAIN, limit=0)


def test_a_bad_file_in_a_draw_is_replaced(tmp_path: Path) -> None:
    root = folders(tmp_path, ["a", "b"], each=4)
    for name in ("a", "b"):
        for number in (0, 1):
            (root / name / f"{number}.png").write_text("no picture")
    found = read_images(root, PLAIN, limit=4)
    assert labels(found) == [0, 0, 1, 1]
    assert all("no image" in line for line in found.skipped)


def test_what_is_no_image_is_skipped_and_named(tmp_path: Path) -> None:
    root = folders(tmp_path, ["a", "b"], each=1)
    (root / "notes.txt").write_text("x")
    (root / ".cache").mkdir()
    (root / "a" / "Thumbs.db").write_bytes(b"\0" * 99)
    cut = draw(root / "a" / "cut.png", 5, size=64)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(cut)
    cut.write_bytes(cut.read_bytes()[:-4000])
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(root / "b" / "deep.png")
    (root / "b" / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    os.mkfifo(root / "b" / "pipe.png")
    found = read_images(root, PLAIN, num_classes=2)
    assert found.files == ("a/0.png", "b/0.png")
    reasons = "\n".join(found.skipped)
    for what in (
        "notes.txt: in no class folder",
        ".cache: a hidden folder",
        "a/Thumbs.db: no image",
        "a/cut.png: damaged",
        "b/deep.png: mode 'I;16'",
        "b/page.eps: no image",
        "b/pipe.png: no regular file",
    ):
        assert what in reasons


def test_links_do_not_lead_out(tmp_path: Path) -> None:
    secret = draw(tmp_path / "secret" / "s.png", 200)
    root = folders(tmp_path / "in", ["a", "b"], each=1)
    (root / "a" / "out.png").symlink_to(secret)
    (root / "a" / "up.png").symlink_to(Path("../../secret/s.png"))
    (root / "a" / "dead.png").symlink_to(root / "nowhere")
    (root / "a" / "all").symlink_to(secret.parent)
    (root / "c").symlink_to(secret.parent)
    (root / "b" / "same.png").symlink_to(root / "a" / "0.png")
    (root / "b" / "round").symlink_to(root)
    found = read_images(root, PLAIN, num_classes=2)
    assert found.files == ("a/0.png", "b/0.png", "b/same.png")
    assert sum("a link out of the folder" in line for line in found.skipped) == 2
    assert any("c: a link to a folder" in line for line in found.skipped)
    assert read_images(_link(tmp_path, root), PLAIN).files == found.files, "the root itself may be"


def _link(tmp_path: Path, root: Path) -> Path:
    (tmp_path / "link").symlink_to(root)
    return tmp_path / "link"


def _bomb(width: int, height: int) -> bytes:
    """The head of a PNG of that size, and almost nothing in it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_500, 12_000, 60_000])
@pytest.mark.parametrize("limit", [None, 89_478_485])
def test_a_bomb_is_refused(
    tmp_path: Path, side: int, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # programs switch Pillow's off
    (tmp_path / "bomb.png").write_bytes(_bomb(side, side))
    with pytest.raises(DataError, match=r"bomb\.png: it may be a decompression bomb"):
        read_images(tmp_path, PLAIN)


@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
def test_a_bomb_that_pillow_only_warns_of_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(_bomb(9_500, 9_500))
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(DataError, match="bomb"):
        read_images(tmp_path, PLAIN)


def test_reading_leaves_the_programs_filters_of_warnings_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They belong to the whole process: another thread may save and restore them meanwhile."""
    draw(tmp_path / "a.png", 1)
    opened, filters, seen = Image.open, warnings.filters, []

    def noting(*args: Any, **how: Any) -> Image.Image:
        seen.append(warnings.filters)
        return opened(*args, **how)

    monkeypatch.setattr(Image, "open", noting)
    read_images(tmp_path, PLAIN)
    assert len(seen) == 1
    assert seen[0] is filters


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    picture = Image.fromarray(colours).convert("P")
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "b.png", transparency=bytes(range(256)))
    plain, transparent = read_images(tmp_path, PLAIN).data.images
    assert torch.equal(plain, transparent)


def test_a_file_that_pillow_warns_of_is_skipped_only_where_warnings_are_errors(
    tmp_path: Path,
) -> None:
    head = b"\x89PNG\r\n\x1a\n"
    draw(tmp_path / "a.png", 1)
    whole = (tmp_path / "a.png").read_bytes()
    animation = b"acTL" + struct.pack(">II", 0, 0)  # of no frames
    chunk = struct.pack(">I", 8) + animation + struct.pack(">I", zlib.crc32(animation))
    header = len(head) + 25
    (tmp_path / "b.png").write_bytes(whole[:header] + chunk + whole[header:])
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("default")
        assert read_images(tmp_path, PLAIN).files == ("a.png", "b.png")
    found = read_images(tmp_path, PLAIN)  # the tests have warnings raised
    assert found.files == ("a.png",)
    assert found.skipped[0].startswith("b.png: damaged (Invalid APNG")


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_a_thin_image_is_refused_before_it_is_resized(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    """Two hundred bytes; with the short side at 224 it would be 224 x 13,440,000."""
    Image.new("L", size).save(tmp_path / "line.png")
    large = Preprocessing(size=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(DataError, match=r"line\.png: it may be a decompression bomb"):
        read_images(tmp_path, large)
    draw(tmp_path / "line.png", 1).unlink()
    Image.new("RGB", (8, 800)).save(tmp_path / "long.png")
    assert len(read_images(tmp_path, PLAIN).files) == 1, "long, but not absurd"


def test_a_file_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnprune_backdoor.files.images._MAX_FILE", 10)
    draw(tmp_path / "a.png", 1)
    with pytest.raises(DataError, match=r"a\.png: .* bytes, over the limit of 10"):
        read_images(tmp_path, PLAIN)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_images(tmp_path / "none", PLAIN)
    with pytest.raises(DataError, match="no file in it"):
        read_images(tmp_path, PLAIN)
    (tmp_path / "a.png").write_text("x")
    with pytest.raises(DataError, match=r"no image in it \(skipped: a.png: no image"):
        read_images(tmp_path, PLAIN)


def test_names_on_a_terminal_are_harmless(tmp_path: Path) -> None:
    evil = "\x1b[2J\x07" + "x" * 120
    (tmp_path / evil).write_text("x")
    draw(tmp_path / "a.png", 1)
    (line,) = read_images(tmp_path, PLAIN).skipped
    assert line.isprintable()
    assert len(line) < 160


def test_other_kinds_of_images(tmp_path: Path) -> None:
    for mode, suffix in (
        ("L", "png"),
        ("RGBA", "png"),
        ("P", "gif"),
        ("CMYK", "jpg"),
        ("1", "bmp"),
    ):
        Image.new(mode, (8, 8)).save(tmp_path / f"{mode}.{suffix}")
    found = read_images(tmp_path, PLAIN)
    assert found.data.images.shape == (5, 3, 8, 8)
    grey = Preprocessing(size=(8, 8), mean=(0.5,), std=(0.5,))
    assert read_images(tmp_path, grey).data.images.shape == (5, 1, 8, 8)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [("a\n\nb\n", "line 2: an empty line"), ("a\nb\na\n", "line 3: the name 'a'")],
)
def test_lists_of_classes_that_are_refused(tmp_path: Path, text: str, wrong: str) -> None:
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=wrong):
        read_classes(path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="UTF-8"):
        read_classes(path)
    with pytest.raises(DataError, match="expected a text file"):
        read_classes(tmp_path / "none")


def test_a_list_of_classes(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeffb\r\n a \r\n\r\n".encode())
    assert read_classes(path) == ("b", "a")


# --- preprocessing ---


@pytest.mark.parametrize("arch", ["test_resnet", "resnet18", "vit_base_patch16_224"])
def test_pixels_are_those_of_timms_transform(tmp_path: Path, arch: str) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    config = timm.get_pretrained_cfg(arch).to_dict()
    ours = read_images(tmp_path, Preprocessing.of(config)).data.images[0]
    theirs = create_transform(**resolve_data_config({}, pretrained_cfg=config))
    assert torch.equal(ours, theirs(Image.fromarray(picture)))


def test_what_is_given_overrides_timm() -> None:
    config = timm.get_pretrained_cfg("resnet18").to_dict()
    made = Preprocessing.of(config, size=(32, 48), mean=(0.1, 0.2, 0.3), crop_pct=1.0, std=None)
    assert (made.size, made.mean, made.crop_pct) == ((32, 48), (0.1, 0.2, 0.3), 1.0)
    assert made.std == tuple(config["std"])
    assert Preprocessing.from_dict(made.to_dict()) == made
    assert Preprocessing.of(config, channels=1, mean=(0.5,), std=(0.2,)).channels == 1
    with pytest.raises(DataError, match=r"takes 1 channel.*--mean"):
        Preprocessing.of(config, channels=1)
    with pytest.raises(DataError, match=r"takes 1 channel.*configuration has.*of 3.*--mean"):
        Preprocessing.of(config, channels=1, mean=(0.5,))


@pytest.mark.parametrize("given", [{"mean": (0.5,)}, {"std": (0.5,)}, {"mean": (0.5, 0.5)}])
def test_a_value_a_channel_is_asked_of_who_gave_it(given: dict[str, tuple[float, ...]]) -> None:
    config = timm.get_pretrained_cfg("resnet18").to_dict()
    (name,) = given
    with pytest.raises(DataError, match=rf"takes 3 channel.*{name} was given as 0\.5"):
        Preprocessing.of(config, **given)


@pytest.mark.parametrize("config", [None, {}])
def test_no_configuration_is_what_timm_does_without_one(config: dict[str, object] | None) -> None:
    made = Preprocessing.of(config)
    assert made.size == (224, 224)
    assert made.mean == (0.485, 0.456, 0.406)


def test_pixels_and_back() -> None:
    made = Preprocessing(size=(4, 4), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    pixels = torch.rand(2, 3, 4, 4)
    assert torch.allclose(made.pixels(made.normalise(pixels)), pixels, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": (0, 8)},
        {"size": (8, 99_999)},
        {"mean": (0.5, 0.5)},
        {"std": (0.0, 0.5, 0.5)},
        {"mean": (float("nan"), 0.5, 0.5)},
        {"crop_pct": 0.0},
        {"interpolation": "sinc"},
        {"crop_mode": "corner"},
    ],
)
def test_preprocessing_that_cannot_be(wrong: dict[str, object]) -> None:
    with pytest.raises(DataError, match="expected"):
        Preprocessing(**{**vars(PLAIN), **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [None, [], {}, {**PLAIN.to_dict(), "size": 8}, "x"])
def test_a_damaged_record_of_preprocessing(data: object) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        Preprocessing.from_dict(data)


def test_the_size_of_files_that_are_alike(tmp_path: Path) -> None:
    root = folders(tmp_path / "alike", ["a", "b"])
    (root / "notes.txt").write_text("no image")
    assert size_of_files(root) == (8, 8)
    Image.new("RGB", (10, 6)).save(root / "a" / "wide.png")
    assert size_of_files(root) is None
    assert size_of_files(tmp_path / "missing") is None
    (tmp_path / "empty").mkdir()
    assert size_of_files(tmp_path / "empty") is None
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (10, 6)).save(flat / "wide.png")
    assert size_of_files(flat) == (6, 10)
