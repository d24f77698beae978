"""Small files that would take hours or gigabytes to read, and numbers that fit nowhere."""

from __future__ import annotations

import json
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from nnprune_backdoor import load_weights
from nnprune_backdoor.errors import CheckpointError
from nnprune_backdoor.files.fitting import fitted
from nnprune_backdoor.files.shards import hub_config


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<i", len(data)) + data


def listing(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def entries(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(name) + item for name, item in items.items()) + b"u"


def tensor(size: bytes, stride: bytes) -> bytes:
    """A tensor in the storage of `written`, of this size and stride."""
    storage = listing(text("storage"), b"ctorch\nFloatStorage\n", text("0"), text("cpu"), b"K\x08")
    arguments = listing(storage + b"Q", b"K\x00", size, stride, b"\x89", b"}")
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


EIGHT = tensor(listing(b"K\x08"), listing(b"K\x01"))


def written(path: Path, content: bytes, storage: int = 32) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", content + b".")
        file.writestr("archive/data/0", bytes(storage))
    return path


@pytest.mark.parametrize(
    ("size", "stride"),
    [
        (listing(*[number(2**2000)] * 40), listing(*[b"K\x01"] * 40)),
        (listing(b"K\x00", number(2**62), number(2**62)), listing(*[b"K\x01"] * 3)),
        (listing(b"K\x01", b"K\x08"), listing(number(2**70), b"K\x01")),
    ],
    ids=["a size of 600 digits", "empty, but of endless sides", "a stride of 70 bits"],
)
def test_sizes_that_fit_no_number_of_the_machine(
    tmp_path: Path, size: bytes, stride: bytes
) -> None:
    with pytest.raises(CheckpointError, match=r"expected a size|more elements than can be counted"):
        load_weights(written(tmp_path / "w.pt", entries(w=tensor(size, stride))))


def module(*children: bytes, **state: bytes) -> bytes:
    inner = entries(**{str(number): child for number, child in enumerate(children)})
    return b"ca\nM\n)\x81" + entries(_modules=inner, **state) + b"b"


MANY = b"}(" + b"".join(text(f"p{n}") + b"N" for n in range(20_000)) + b"uq\x020"  # memo: 2
SHARED = b"h\x02"
DOUBLED = b"".join(b"q\x030" + module(b"h\x03", b"h\x03", _parameters=SHARED) for _ in range(25))
BYTES = b"(cbuiltins\nbytes\nq\x000\x96" + struct.pack("<Q", 10**6) + bytes(10**6) + b"q\x010"

SLOW = {
    "memo of colliding indices": (
        b"}" + b"".join(b"p%d\n" % (n * (2**61 - 1)) for n in range(1, 20_000)),
        "an index that no pickle needs",
    ),
    "bytes copied over and over": (BYTES + b"h\x00h\x01\x85R" * 2000 + b"l", "steps"),
    "a name for the regular expressions": (
        entries(**{"loss_" * 20_000 + "!": EIGHT, "module.w": EIGHT}),
        "a name of 100,001 characters",
    ),
    "one dictionary under many names": (
        MANY + b"}(" + b"".join(text(f"a{n}") + SHARED for n in range(20_000)) + b"u",
        "no weights in it",
    ),
    "modules that share their parameters": (
        MANY + module() + DOUBLED,
        "of more than 100,000 parts",
    ),
    "one tensor under many names": (
        EIGHT + b"q\x010}(" + b"".join(text(f"w{n}") + b"h\x01" for n in range(100_001)) + b"u",
        "100,001 names, over the limit",
    ),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_small_file_does_not_take_long(tmp_path: Path, name: str) -> None:
    content, reason = SLOW[name]
    path = written(tmp_path / "w.pt", content)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=reason):
        load_weights(path)
    assert time.process_time() - start < 5


def test_parts_of_an_archive_that_overlap_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    written(path, entries(w=EIGHT))
    with zipfile.ZipFile(path) as file:
        inner = path.read_bytes()[file.getinfo("archive/data/0").header_offset : file.start_dir]
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/data/1", inner)  # a part within a part
    content = bytearray(path.read_bytes())
    directory = content.rindex(b"archive/data/0") - 46
    content[directory + 42 : directory + 46] = struct.pack("<I", content.rindex(inner))
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"overlap"):
        load_weights(path)


def test_tensors_that_share_memory_may_not_fill_it(tmp_path: Path) -> None:
    shared = torch.zeros(1000)
    state = {f"w{n}": shared for n in range(200)}
    torch.save(dict(list(state.items())[:24]), tmp_path / "w.pt")  # layers that are one
    assert len(load_weights(tmp_path / "w.pt")) == 24
    content = tensor(listing(number(100_000)), listing(b"K\x01")) + b"q\x010}("
    content += b"".join(text(f"w{n}") + b"h\x01" for n in range(100)) + b"u"
    with pytest.raises(CheckpointError, match="may be there to exhaust memory"):
        load_weights(written(tmp_path / "w.pt", content, storage=400_000))


def test_buffers_of_a_pickled_module_are_told_apart_by_names_alone(tmp_path: Path) -> None:
    state = {"_buffers": entries(w=EIGHT), "_non_persistent_buffers_set": b"K\x05"}
    assert list(load_weights(written(tmp_path / "w.pt", module(**state)))) == ["w"]


def test_large_arrays_beside_the_weights_do_not_matter(tmp_path: Path) -> None:
    content = {"net": {"w": torch.ones(2)}, "seen": np.zeros(6_000_000, np.uint8)}
    torch.save(content, tmp_path / "w.pt", pickle_protocol=2)
    assert list(load_weights(tmp_path / "w.pt")) == ["w"]


def test_a_hub_s_configuration_of_endless_numbers_is_left_out(tmp_path: Path) -> None:
    config = {"mean": [10**400, 0, 0], "std": [1.0, float("nan"), 1.0], "crop_pct": 0.9}
    content = json.dumps({"architecture": "resnet18", "pretrained_cfg": config})
    (tmp_path / "config.json").write_text(content)
    assert hub_config(tmp_path)["pretrained_cfg"] == {"crop_pct": 0.9}


def test_a_function_of_timm_that_takes_too_long_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To resize a patch embedding takes time by the fourth power of its side."""
    monkeypatch.setattr("nnprune_backdoor.files.fitting._MAX_SECONDS", 0.5)

    def endless(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
        while True:
            timm.layers.resample_patch_embed(torch.ones(1, 1, 32, 32), (16, 16))

    torch.save({"v": torch.ones(1, 2)}, tmp_path / "w.pt")
    weights = load_weights(tmp_path / "w.pt")
    assert list(fitted(weights, nn.Linear(2, 1), endless)) == ["v"]
