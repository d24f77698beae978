"""Files that somebody else wrote: weights come out, nothing runs, nothing fills the memory."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers.images import noise_images
from helpers.networks import build
from nnprune_backdoor import load_model, load_weights
from nnprune_backdoor.errors import CheckpointError, UnknownNameError
from nnprune_backdoor.files import architecture

LEGACY = {"_use_new_zipfile_serialization": False}


def small() -> dict[str, Tensor]:
    """Names and tensors of a layer or two, an integer among them."""
    torch.manual_seed(0)
    norm = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    return dict(norm.state_dict())


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor)
        assert got[name].dtype == tensor.dtype


# --- what is read ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.ckpt", "model_best.pth.tar"])
@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_both_formats_of_torch_are_read(tmp_path: Path, name: str, options: Any) -> None:
    torch.save(small(), tmp_path / name, **options)
    weights = load_weights(tmp_path / name)
    assert_same(weights, small())
    assert weights.notes == ()
    assert weights.arch is None


def test_safetensors_are_read_and_outlive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(small(), path)
    weights = load_weights(path)
    path.write_bytes(b"")  # what is mapped from a file that shrinks would crash the process
    assert_same(weights, small())


@pytest.mark.parametrize("nests", [["state_dict"], ["model"], ["net"], ["model", "state_dict"]])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_nestings_and_prefixes_are_taken_off_and_named(
    tmp_path: Path, nests: list[str], prefix: str
) -> None:
    content: Any = {prefix + name: tensor for name, tensor in small().items()}
    for nest in reversed(nests):
        content = {"epoch": 3, nest: content, "arch": "test_resnet", "args": Namespace(lr=0.1)}
    torch.save(content, tmp_path / "w.pt")
    weights = load_weights(tmp_path / "w.pt")
    assert_same(weights, small())
    text = "; ".join(weights.notes)
    for nest in nests:
        assert f"took {nest!r} of epoch, {nest}, arch, args" in text
    assert (f"prefix {prefix!r}" in text) == bool(prefix)
    assert weights.arch == "test_resnet"


def test_a_prefix_that_some_names_lack_stays(tmp_path: Path) -> None:
    torch.save({"model.a": torch.ones(1), "mean": torch.ones(1)}, tmp_path / "w.pt")
    assert list(load_weights(tmp_path / "w.pt")) == ["model.a", "mean"]


def test_averaged_weights_are_taken_on_request(tmp_path: Path) -> None:
    both = {"state_dict_ema": {"w": torch.ones(2)}, "state_dict": {"w": torch.zeros(2)}}
    torch.save(both, tmp_path / "w.pt")
    assert float(load_weights(tmp_path / "w.pt")["w"].sum()) == 0
    assert float(load_weights(tmp_path / "w.pt", key="state_dict_ema")["w"].sum()) == 2
    with pytest.raises(CheckpointError, match="'ema'; it holds state_dict_ema, state_dict"):
        load_weights(tmp_path / "w.pt", key="ema")


def test_what_is_no_tensor_is_skipped_and_named(tmp_path: Path) -> None:
    torch.save({**small(), "epoch": 3, "history": [1.0], 5: torch.ones(1)}, tmp_path / "w.pt")
    weights = load_weights(tmp_path / "w.pt")
    assert_same(weights, small())
    assert "skipped, no tensors: epoch, history, 5" in weights.notes


def test_shared_and_strided_tensors_become_plain_ones(tmp_path: Path) -> None:
    one = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": one, "b": one, "c": one.t(), "d": nn.Parameter(one[:, 1])}, tmp_path / "w.pt")
    weights = load_weights(tmp_path / "w.pt")
    assert torch.equal(weights["c"], one.t())
    assert torch.equal(weights["d"], one[:, 1])
    assert all(w.is_contiguous() and not w.requires_grad for w in weights.values())
    assert len({w.untyped_storage().data_ptr() for w in weights.values()}) == 4


# --- what is refused -------------------------------------------------------------------------


class Trap:
    """Unpickled by an unguarded reader, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class SystemTrap(Trap):
    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", [Trap, SystemTrap])
@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("forced", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(
    tmp_path: Path, kind: type[Trap], options: Any, forced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    torch.save({"state_dict": small(), "extra": kind(mark)}, tmp_path / "w.pt", **options)
    if forced:  # the switch by which torch.load trusts every file
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(CheckpointError, match=r"asks for .*so it is not loaded.*container"):
        load_weights(tmp_path / "w.pt")
    assert not mark.exists()
    torch.load(tmp_path / "w.pt", weights_only=False)  # the trap is a trap
    assert mark.exists()


def test_a_plain_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "w.pt").write_bytes(pickle.dumps({"w": SystemTrap(mark)}, protocol=2))
    with pytest.raises(CheckpointError, match=r"system"):
        load_weights(tmp_path / "w.pt")
    assert not mark.exists()


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_tensors_of_a_whole_module_are_taken_and_its_classes_are_not_imported(
    tmp_path: Path, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    module.register_buffer("passing", torch.ones(1), persistent=False)
    torch.save(nn.DataParallel(module), tmp_path / "w.pt", **options)
    wanted = dict(module.state_dict())
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(pickle, "Unpickler", None)
    monkeypatch.setattr(importlib, "import_module", None)
    weights = load_weights(tmp_path / "w.pt")
    assert_same(weights, wanted)
    text = "; ".join(weights.notes)
    assert "pickled torch.nn.parallel.data_parallel.DataParallel; its code was not run" in text
    assert "nothing of them was run: torch.nn.modules.batchnorm.BatchNorm2d" in text


# --- damage ----------------------------------------------------------------------------------


def wide(path: Path, **options: Any) -> bytes:
    """A file of tensors long enough to aim at."""
    torch.save({"first.weight": torch.arange(4096.0), "last.bias": torch.ones(64)}, path, **options)
    return path.read_bytes()


def damaged(content: bytes, at: int, hole: bytes) -> bytes:
    return content[:at] + hole + content[at + len(hole) :]


@pytest.mark.parametrize(
    ("where", "hole"),
    [
        (struct.pack("<f", 2000.0), bytes(32)),
        (struct.pack("<f", 512.0), b"\x01"),
        (b"first.weight", b"firsf"),
        (b"storage", b"storagf"),
        (b"last.bias", b"last.bia\0"),
    ],
)
def test_damage_inside_an_archive_is_refused(tmp_path: Path, where: bytes, hole: bytes) -> None:
    content = wide(tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes(damaged(content, content.index(where), hole))
    with pytest.raises(CheckpointError, match="damaged"):
        load_weights(tmp_path / "w.pth")


def test_any_damaged_byte_is_refused_or_harmless(tmp_path: Path) -> None:
    content = wide(tmp_path / "w.pth")
    good = load_weights(tmp_path / "w.pth")
    start = content.index(b"last.bias")
    for at in [*range(0, start + 400, 7), *range(len(content) - 1200, len(content), 3)]:
        (tmp_path / "w.pth").write_bytes(damaged(content, at, bytes([content[at] ^ 0x5A])))
        with contextlib.suppress(CheckpointError):
            assert_same(load_weights(tmp_path / "w.pth"), good)


def test_archives_without_checksums_are_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        content = wide(tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(load_weights(tmp_path / "w.pth")["first.weight"], torch.arange(4096.0))
    # a header that does not fit the directory is found nevertheless
    moved = damaged(content, content.rindex(b"PK\x03\x04"), b"PK\x03\x05")
    (tmp_path / "w.pth").write_bytes(moved)
    with pytest.raises(CheckpointError, match="damaged"):
        load_weights(tmp_path / "w.pth")


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"TorchScript archive, which carries code"):
        load_weights(tmp_path / "w.pt")


def parts_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {member.filename: archive.read(member) for member in archive.infolist()}


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    """A megabyte of zeros in a kilobyte; a bomb has a million times that."""
    torch.save({"w": torch.zeros(2**18)}, tmp_path / "w.pt")
    parts = parts_of(tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    assert (tmp_path / "bomb.pt").stat().st_size < 4096
    with pytest.raises(CheckpointError, match=r"compressed, .* bomb"):
        load_weights(tmp_path / "bomb.pt")


def test_archive_entries_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """All entries of the directory point to one member: sizes add up to more than the file."""
    torch.save({"w": torch.zeros(2**10)}, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt", "a") as archive:
        member = next(m for m in archive.infolist() if m.filename.endswith("data/0"))
        for number in range(1, 100):
            twin = copy.copy(member)
            twin.filename = f"w/data/{number}"
            archive.filelist.append(twin)
        archive.writestr("w/end", b"")  # has the directory written anew
    with pytest.raises(CheckpointError, match=r"parts claim .* bomb"):
        load_weights(tmp_path / "w.pt")


def test_a_huge_pickle_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({f"layer{number}": torch.zeros(1) for number in range(40)}, tmp_path / "w.pt")
    monkeypatch.setattr("nnprune_backdoor.files.torch_file.MAX_BYTES", 1000)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(CheckpointError, match=r"data.pkl' is .* over the limit"):
        load_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_a_tensor_spread_over_a_small_storage_is_refused(tmp_path: Path, options: Any) -> None:
    for side in (100, 10**6):  # within the limit, and over it
        torch.save({"w": torch.zeros(1).expand(side, side)}, tmp_path / "w.pt", **options)
        with pytest.raises(CheckpointError, match=rf"'w' claims shape \({side}, {side}\)"):
            load_weights(tmp_path / "w.pt")


def test_many_names_for_one_tensor_count_each(tmp_path: Path) -> None:
    one = torch.zeros(2**12)
    torch.save({f"w{number}": one for number in range(50)}, tmp_path / "w.pt")
    assert len(load_weights(tmp_path / "w.pt")) == 50
    with pytest.raises(CheckpointError, match=r"limit 100,000"):
        load_weights(tmp_path / "w.pt", max_bytes=100_000)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_file_over_the_limit_is_refused(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(10 * 2**30)  # a hole, no blocks on the disk
    with pytest.raises(CheckpointError, match=r"over the limit of 8,589,934,592; raise max_bytes"):
        load_weights(tmp_path / name)


def header_only(path: Path, **entry: Any) -> Path:
    """A safetensors file of one tensor "w" and four bytes of data."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **entry}})
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0\0\0\0")
    return path


def test_a_safetensors_header_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    assert load_weights(header_only(path))["w"].shape == (1,)
    for entry in (
        {"shape": [10**12]},
        {"shape": [10**12], "data_offsets": [0, 4 * 10**12]},
        {"shape": [2**62, 2**62]},
        {"shape": [2], "dtype": "F32"},
        {"dtype": "F64"},
        {"dtype": "OBJECT"},
        {"shape": [-1]},
        {"data_offsets": [4, 8]},
    ):
        with pytest.raises(CheckpointError, match="damaged, or no safetensors file"):
            load_weights(header_only(path, **entry))
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(CheckpointError, match="damaged"):
        load_weights(path)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_a_file_cut_short_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file(small(), path)
    else:
        torch.save(small(), path, **(LEGACY if kind == "legacy" else {}))
    whole = path.read_bytes()
    for length in (0, 3, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"damaged|empty"):
            load_weights(path)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")
def test_other_tensors_than_dense_ones_are_refused(tmp_path: Path) -> None:
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[0]]), torch.ones(1), (10**12,), check_invariants=True
    )
    for odd in (sparse, torch.zeros(3, device="meta")):
        torch.save({"w": odd}, tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match=r"'w' is no plain dense tensor"):
            load_weights(tmp_path / "w.pt")


def test_attributes_that_a_file_puts_on_a_tensor_are_dropped(tmp_path: Path) -> None:
    odd = nn.Parameter(torch.ones(2))
    odd.numel = dict  # type: ignore[assignment, method-assign] # a size check could be fooled
    torch.save({"w": torch.ones(2), "odd": nn.Parameter(torch.ones(2))}, tmp_path / "w.pt")
    assert not vars(load_weights(tmp_path / "w.pt")["odd"])
    odd.numel = {}  # type: ignore[assignment]
    torch.save({"w": odd}, tmp_path / "w.pt")
    weights = load_weights(tmp_path / "w.pt")
    assert not vars(weights["w"])
    assert weights["w"].numel() == 2


def test_a_key_that_holds_itself_over_and_over_is_named_shortly(tmp_path: Path) -> None:
    """Written out, a tuple of two of a tuple of two of ... twenty deep has ten million signs."""
    key: Any = (1, 1)
    for _ in range(20):
        key = (key, key)
    torch.save({key: 1, "w": torch.zeros(1)}, tmp_path / "w.pt")
    tracemalloc.start()
    try:
        (note,) = load_weights(tmp_path / "w.pt").notes
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(note) < 100
    assert peak < 5e6


def test_a_tar_archive_of_old_is_refused_in_our_words(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "w.tar", "w") as archive:
        for name in ("../escaped", "storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"abcd"))
    with pytest.raises(CheckpointError, match=r"before 0\.1\.10.*in a container"):
        load_weights(tmp_path / "w.tar")
    assert not (tmp_path.parent / "escaped").exists()


def test_an_architecture_without_end_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architecture, "_MAX_SECONDS", 0.5)
    torch.save(build("test_vit").state_dict(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"took longer than 0\.5 s and was given up"):
        load_model(tmp_path / "w.pt", "test_vit", depth=2**16)
    for large in (10**8, [2, (2, {"a": -(10**8)})]):
        with pytest.raises(CheckpointError, match="'depth' is over 65,536"):
            load_model(tmp_path / "w.pt", "test_vit", depth=large)


def test_files_without_weights_are_refused(tmp_path: Path) -> None:
    contents = ([torch.ones(1)], torch.ones(1), {}, {"epoch": 3}, {"model": {"model": {}}}, 5)
    for content in contents:
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match=r"no weights in it|expected a dictionary"):
            load_weights(tmp_path / "w.pt")
    endless: dict[str, Any] = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="expected a dictionary of tensors"):
        load_weights(tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="no such file"):
        load_weights(tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"a folder without model\.safetensors"):
        load_weights(tmp_path)


# --- models ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "args"),
    [
        ("test_resnet", {"num_classes": 7, "in_chans": 1}),
        ("test_vit", {"num_classes": 5, "in_chans": 4, "img_size": 48}),
        ("test_efficientnet", {"num_classes": 3}),
        ("test_convnext", {"in_chans": 2}),
        ("test_nfnet", {"num_classes": 2}),
    ],
)
def test_a_model_is_built_as_its_weights_say(
    tmp_path: Path, arch: str, args: dict[str, int]
) -> None:
    model = timm.create_model(arch, **args).eval()
    torch.save({"arch": arch, "state_dict": model.state_dict()}, tmp_path / "w.pt")
    state = torch.get_rng_state()
    again = load_model(tmp_path / "w.pt")
    assert torch.equal(torch.get_rng_state(), state)
    assert not again.training
    images = torch.randn(2, args.get("in_chans", 3), *(args.get("img_size", 64),) * 2)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


def test_rearranging_stems_and_given_sizes_are_handled(tmp_path: Path) -> None:
    """The first convolution of a TResNet sees sixteen times the channels of the images."""
    layers = [1, 1, 1, 1]
    model = timm.create_model("tresnet_m", in_chans=1, width_factor=0.2, layers=layers)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    again = load_model(tmp_path / "w.safetensors", "tresnet_m", width_factor=0.2, layers=layers)
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
    args = {"img_size": 32, "num_classes": 10, "in_chans": 3}
    save_file(build("test_vit").state_dict(), tmp_path / "w.safetensors")
    given = load_model(tmp_path / "w.safetensors", "test_vit", **args)
    assert given(noise_images(1)).shape == (1, 10)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    state = build("test_resnet").state_dict()
    state["stray"] = torch.ones(2)
    del state["fc.bias"]
    state["bn1.num_batches_tracked"] = torch.tensor(1.5)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path / "w.pt", "test_resnet", num_classes=12)
    text = str(caught.value)
    assert "1 missing: fc.bias" in text
    assert "1 unexpected: stray (2,)" in text
    assert "fc.weight (10, 96), expected (12, 96)" in text
    assert "bn1.num_batches_tracked (), expected () int64" in text


def test_names_that_timm_has_not_registered_are_refused(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "w.pt")
    for name in ("../x", "/etc/x", "hf-hub:timm/resnet18", "local-dir:x", "timm/resnet18", "a b"):
        with pytest.raises(UnknownNameError, match="hubs, folders and paths are not read"):
            load_model(tmp_path / "w.pt", name)
    with pytest.raises(UnknownNameError, match="did you mean 'test_resnet'"):
        load_model(tmp_path / "w.pt", "test_resnett")
    with pytest.raises(CheckpointError, match="give arch="):
        load_model(tmp_path / "w.pt")


def test_arguments_that_do_not_build_are_refused(tmp_path: Path) -> None:
    torch.save(build("test_vit").state_dict(), tmp_path / "w.pt")
    for name in ("checkpoint_path", "pretrained", "pretrained_cfg", "cache_dir"):
        with pytest.raises(CheckpointError, match="no argument of an architecture"):
            load_model(tmp_path / "w.pt", "test_vit", **{name: "x"})
    with pytest.raises(CheckpointError, match=r"timm cannot build 'test_vit'.*banana"):
        load_model(tmp_path / "w.pt", "test_vit", banana=1)
    with pytest.raises(CheckpointError, match=r"over the limit of 8,589,934,592"):
        load_model(tmp_path / "w.pt", "test_vit", img_size=10**6)
