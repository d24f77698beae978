"""Purified models on disk: what comes back is what was saved, or there is a reason."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nnprune_backdoor
from helpers.criteria import Arbitrary
from helpers.images import noise_images
from helpers.networks import SMALL, build
from helpers.states import assert_same_state
from nnprune_backdoor import (
    CleanData,
    Purified,
    PurifyError,
    load_purified,
    purify,
    read_report,
    save_purified,
)
from nnprune_backdoor.criteria import ANP, Response
from nnprune_backdoor.errors import CheckpointError, UnknownNameError, UnsupportedModelError
from nnprune_backdoor.files import read_record, record_file
from nnprune_backdoor.files.safetensors_file import (
    read_safetensors,
    read_with_texts,
    write_safetensors,
)
from nnprune_backdoor.files.saving import check_free
from nnprune_backdoor.reports.plain import plain
from nnprune_backdoor.selectors import LowestFraction
from nnprune_backdoor.utils.fingerprint import fingerprint

OLD = Path(__file__).parent / "purified_format_1"


class Tiny(nn.Module):
    """Two convolutions with their norms, and a classifier of four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 5, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))


def cheap(model: nn.Module, **settings: Any) -> Purified:
    """Purified of a random tenth."""
    clean = CleanData(noise_images(12))
    settings = {"selector": LowestFraction(0.1), "progress": False, **settings}
    return purify(model, clean, Arbitrary(), **settings)


@functools.cache
def tiny(seed: int = 0) -> Purified:
    """Purified of four of its eleven neurons; for reading only."""
    return tiny_with(seed=seed)


def tiny_with(seed: int = 0, **settings: Any) -> Purified:
    """The same, made with other settings of `purify`."""
    torch.manual_seed(seed)
    model = Tiny().eval()
    model.bn2.bias.data += 0.5  # so that a silenced neuron may still say something
    return cheap(model, seed=seed, selector=LowestFraction(0.4), **settings)


def logits(model: nn.Module, images: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(noise_images(4, seed=9) if images is None else images)


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if not p.is_dir()}


# --- the round trip --------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    **{name: args for name, args in SMALL.items() if name != "mixer"},
    "test_vit_relpos": {"img_size": 32},
    "resnet10t": {},
    "mobilenetv3_small_050": {},
}


@functools.cache
def purified_of(name: str) -> Purified:
    """For reading only."""
    if name in SMALL:
        return cheap(build(name))
    torch.manual_seed(0)
    return cheap(timm.create_model(name, num_classes=10, **MODELS[name]).eval())


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_purified_model_comes_back_to_the_bit(tmp_path: Path, name: str) -> None:
    result = purified_of(name)
    save_purified(result, tmp_path / "out", arch=name, model_args=MODELS[name])
    state = torch.get_rng_state()
    again = load_purified(tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), state)
    assert result.removal is not None
    assert result.removal.removed
    assert torch.equal(logits(again), logits(result.model))
    record = read_record(tmp_path / "out")
    assert record["architecture"]["arguments"]["num_classes"] == 10
    assert record["removal"]["removed"] == len(result.removal.removed)
    names = ["out/README.md", "out/model.safetensors", "out/record.json", "out/report.json"]
    assert sorted(files(tmp_path)) == names
    assert read_report(tmp_path / "out").to_dict() == result.to_dict()


@pytest.mark.slow
def test_a_new_process_gives_the_same_logits(tmp_path: Path) -> None:
    """Every architecture of the round trip, all in one process, since importing torch is slow."""
    for name, args in MODELS.items():
        save_purified(purified_of(name), tmp_path / name, arch=name, model_args=args)
    images = noise_images(4, seed=9)
    save_file({"images": images}, tmp_path / "images.safetensors")
    root = str(Path(nnprune_backdoor.__file__).parent.parent)
    code = (
        f"import sys; sys.path.insert(0, {root!r})\n"
        "import torch; from safetensors.torch import load_file, save_file\n"
        "from nnprune_backdoor import load_purified\n"
        "torch.set_num_threads(1)\n"
        "images = load_file('images.safetensors')['images']\n"
        f"models = {{name: load_purified(name) for name in {list(MODELS)!r}}}\n"
        "with torch.no_grad(): y = {name: model(images) for name, model in models.items()}\n"
        "save_file(y, 'logits.safetensors')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    got = load_file(tmp_path / "logits.safetensors")
    assert len(got) == len(MODELS) >= 10
    for name in MODELS:
        assert torch.equal(got[name], logits(purified_of(name).model, images)), name


@pytest.mark.parametrize(
    "settings", [{"removal": "group"}, {"removal": "none"}, {"silencing": "constant"}]
)
def test_other_ways_of_removal_come_back_too(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Constants that were folded into biases are in the recipe and in the weights, once."""
    result = tiny_with(**settings)
    save_purified(result, tmp_path / "out", arch=None)
    again = load_purified(tmp_path / "out", model=Tiny())
    assert torch.equal(logits(again), logits(result.model))
    record = read_record(tmp_path / "out")
    assert (record["removal"] is None) == (settings.get("removal") == "none")
    assert any(cut["constants"] for cut in record["recipe"].values()) == ("silencing" in settings)


def test_types_flags_and_layouts_are_as_saved(tmp_path: Path) -> None:
    """Half precision comes back as such; transposed weights and modes do no harm."""
    result = cheap(build("test_vit").bfloat16())
    with torch.no_grad():
        weight = result.model.head.weight
        result.model.head.weight = nn.Parameter(weight.t().contiguous().t())
    result.model.train()
    save_purified(result, tmp_path / "out", arch="test_vit")
    assert result.model.training
    again = load_purified(tmp_path / "out")
    assert not again.training
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    images = noise_images(4).bfloat16()
    assert torch.equal(logits(again, images), logits(result.model.eval(), images))


def test_weights_that_layers_share_stay_shared(tmp_path: Path) -> None:
    class Shared(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
            self.conv3 = nn.Conv2d(6, 6, 3, padding=1)
            self.conv3.weight = self.conv2.weight
            self.bn2, self.bn3 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)  # the sites
            self.fc = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn1(self.conv1(x)).relu()
            return self.fc(self.bn3(self.conv3(self.bn2(self.conv2(x)))).mean((2, 3)))

    torch.manual_seed(0)
    result = cheap(Shared().eval(), selector=LowestFraction(0.0))
    save_purified(result, tmp_path / "out", arch=None)
    fresh = Shared()
    before = copy.deepcopy(fresh.state_dict())
    again = load_purified(tmp_path / "out", model=fresh)
    assert torch.equal(logits(again), logits(result.model))
    assert again.conv3.weight is again.conv2.weight
    assert all(torch.equal(fresh.state_dict()[name], before[name]) for name in before)


def test_a_model_that_timm_does_not_have(tmp_path: Path) -> None:
    result = tiny()
    save_purified(result, tmp_path / "out", arch=None)
    assert torch.equal(logits(load_purified(tmp_path / "out", model=Tiny())), logits(result.model))
    with pytest.raises(CheckpointError, match="saved without an architecture"):
        load_purified(tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match="another architecture"):
        load_purified(tmp_path / "out", model=build("test_resnet"))
    with pytest.raises(CheckpointError, match="model_args"):
        save_purified(result, tmp_path / "two", arch=None, model_args={"num_classes": 4})


def test_a_network_without_weights_and_one_that_has_run_are_given(tmp_path: Path) -> None:
    result = tiny()
    save_purified(result, tmp_path / "out", arch=None)
    with pytest.raises(UnsupportedModelError, match='device "meta"'):
        load_purified(tmp_path / "out", model=Tiny().to("meta"))
    used = Tiny()
    used.last = used(noise_images(2))  # a result with a history
    assert torch.equal(logits(load_purified(tmp_path / "out", model=used)), logits(result.model))


# --- the record ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_record_says_how_it_came_about(tmp_path: Path) -> None:
    model = build("test_resnet")
    images, labels = noise_images(60), torch.arange(60) % 10
    loader = [(images[:30], labels[:30]), (images[30:], labels[30:])]
    method = ANP(ranking=Response(statistics="batch"))
    chosen = {"selector": LowestFraction(0.05), "seed": 3, "progress": False}
    result = purify(model, loader, method, **chosen)
    assert result.accuracy is not None
    assert result.removal is not None
    first, *others = result.removal.removed
    removal = replace(result.removal, removed=tuple(others), silenced={first: "a reason"})
    result = replace(result, removal=removal)
    save_purified(result, tmp_path / "out", arch="test_resnet")
    record = read_record(tmp_path / "out")
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert record["weights"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert record["format"] == 2
    assert record["recipe"] == result.recipe.to_dict()
    assert record["silenced"] == result.selection.by_site()
    assert record["criterion"]["name"] == "ANP"
    assert record["criterion"]["settings"] == plain(method)
    assert record["criterion"]["settings"]["ranking"]["rounds"] == 1
    assert record["selector"]["selector"] == "LowestFraction"
    assert record["selector"]["settings"] == {"fraction": 0.05}
    assert record["selector"]["reason"] == result.selection.reason
    assert record["seed"] == 3
    assert record["compute"].get("threads") == torch.get_num_threads()
    assert record["input"] == [3, 32, 32]
    before = record["accuracy"]["before"]
    assert (before["hits"], before["count"]) == (result.accuracy.before.hits, 9)
    assert record["removal"]["after"]["parameters"] == removal.after.parameters
    assert record["removal"]["only_silenced"] == {"a reason": {first.site: [first.channel]}}
    assert set(record["versions"]) >= {"nnprune_backdoor", "torch", "timm"}
    assert record["sha256"]["weights"] == fingerprint(model.state_dict())
    assert record["sha256"]["clean"] == fingerprint({"images": images, "labels": labels})


def test_fingerprints_tell_tensors_apart() -> None:
    one = {"a": torch.arange(4.0), "b": torch.tensor(2)}
    same = {"b": torch.tensor(2), "a": torch.arange(8.0)[:4], "note": None}
    others: list[dict[str, Any]] = [
        {**one, "a": torch.arange(4.0).reshape(2, 2)},
        {**one, "a": torch.arange(4.0).double()},
        {**one, "b": torch.tensor(3)},
        {"a": one["a"]},
        {"c": one["a"], "b": one["b"]},
    ]
    assert fingerprint(one) == fingerprint(same)
    assert len({fingerprint(each) for each in [one, *others]}) == 6
    assert fingerprint({"h": torch.ones(3).bfloat16()}) != fingerprint({"h": torch.ones(3).half()})


# --- what is not written ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_wrong_architecture_is_found_when_saving(tmp_path: Path) -> None:
    result = cheap(build("test_vit"))
    wrong: list[tuple[str, dict[str, Any], type[PurifyError], str]] = [
        ("test_resnet", {}, UnsupportedModelError, "another architecture"),
        ("test_vit", {"num_classes": 12}, CheckpointError, "head.weight"),
        ("test_vit", {"num_heads": 1}, CheckpointError, "does not run on images"),
        ("test_vit", {"act_layer": "relu"}, CheckpointError, "computes something else"),
        ("test_vit", {"img_size": 64}, CheckpointError, "pos_embed"),
        ("test_vit", {"act_layer": nn.ReLU}, CheckpointError, "plain data"),
        ("test_vit", {"drop_rate": float("nan")}, CheckpointError, "plain data"),
        ("test_vitt", {}, UnknownNameError, "did you mean 'test_vit"),
        ("../test_vit", {}, UnknownNameError, "not read"),
    ]
    for arch, args, error, words in wrong:
        with pytest.raises(error, match=words):
            save_purified(result, tmp_path / "out", arch=arch, model_args=args)
    needs_size = cheap(timm.create_model("test_vit_relpos", num_classes=10, img_size=32).eval())
    with pytest.raises(CheckpointError, match=r"does not run .*32\).* img_size among them"):
        save_purified(needs_size, tmp_path / "out", arch="test_vit_relpos")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    first, second = tiny(), tiny(1)
    out = save_purified(first, tmp_path / "a" / "out", arch=None)
    with pytest.raises(CheckpointError, match="overwrite=True"):
        save_purified(second, out, arch=None)
    assert torch.equal(logits(load_purified(out, model=Tiny())), logits(first.model))
    save_purified(second, out, arch=None, overwrite=True)
    assert torch.equal(logits(load_purified(out, model=Tiny())), logits(second.model))
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        save_purified(first, out, arch=None, overwrite=True)
    for content in ("{}", "[1]", "\xff", '{"library": "other"}'):
        foreign = tmp_path / "foreign"
        foreign.mkdir(exist_ok=True)
        (foreign / "record.json").write_text(content, encoding="latin-1")
        with pytest.raises(CheckpointError, match="did not write it"):
            save_purified(first, foreign, arch=None, overwrite=True)
    with pytest.raises(CheckpointError, match="a file is there"):
        save_purified(first, out / "notes.txt", arch=None, overwrite=True)
    (tmp_path / "empty").mkdir()
    save_purified(first, tmp_path / "empty", arch=None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "empty", "foreign"]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out"]


class Interrupted(BaseException):
    """As Ctrl-C: no Exception."""


def after(calls: int, work: Callable[..., Any]) -> Callable[..., Any]:
    """`work`, which is interrupted at its call number `calls`."""
    made = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        made += 1
        if made == calls:
            raise Interrupted
        return work(*args, **kwargs)

    return wrapped


def half_written(state: dict[str, Tensor], path: str, metadata: dict[str, str]) -> None:
    Path(path).write_bytes(b"\x08\0\0\0\0\0\0\0{")
    raise Interrupted


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    "stage", ["weights", "record", "first sync", "last sync", "first move", "second move"]
)
def test_an_interrupted_save_leaves_the_old_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, stage: str
) -> None:
    out = tmp_path / "out"
    if there:
        save_purified(tiny(), out, arch=None)
    before = files(tmp_path)
    if stage == "weights":
        monkeypatch.setattr("nnprune_backdoor.files.safetensors_file.save_file", half_written)
    elif stage == "record":
        monkeypatch.setattr(Path, "write_text", after(1, Path.write_text))
    elif "sync" in stage:
        calls = 1 if stage == "first sync" else 3
        monkeypatch.setattr("os.fsync", after(calls, lambda handle: None))
    else:
        calls = 1 if stage == "first move" else 2
        monkeypatch.setattr(Path, "replace", after(calls, Path.replace))
    if stage == "second move" and not there:
        save_purified(tiny(1), out, arch=None)  # needs one move only
        assert torch.equal(logits(load_purified(out, model=Tiny())), logits(tiny(1).model))
        return
    with pytest.raises(Interrupted):
        save_purified(tiny(1), out, arch=None, overwrite=True)
    monkeypatch.undo()
    assert files(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if there else [])


# --- what is not read ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a purified Tiny; for reading only."""
    return save_purified(tiny(), tmp_path_factory.mktemp("saved") / "out", arch=None)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    for name, data in files(saved).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((folder / "record.json").read_text())
    change(record)
    (folder / "record.json").write_text(json.dumps(record))


def test_other_weights_than_those_recorded_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "fc.bias": weights["fc.bias"] + 1}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_purified(folder, model=Tiny())
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        load_purified(folder, model=Tiny())


def test_a_newer_format_is_refused_and_says_so(folder: Path) -> None:
    rewrite(folder, lambda record: record.update(format=3))
    with pytest.raises(CheckpointError, match=r"format 3, but this version reads up to 2; upgrade"):
        load_purified(folder, model=Tiny())


ENTRIES = sorted(
    {"format", "library"} | set(json.loads((OLD / "record.json").read_text(encoding="utf-8")))
)


OTHERS = ("seed", "silencing", "input", "repair", "shares")  # which are not objects


@pytest.mark.parametrize("entry", ENTRIES)
def test_missing_and_mistyped_entries_are_refused(folder: Path, entry: str) -> None:
    whole = (folder / "record.json").read_text()
    rewrite(folder, lambda record: record.pop(entry))
    with pytest.raises(CheckpointError, match=f"{entry}|not a record|format number"):
        read_record(folder)
    for value in (True, 1.5, [[]], {"": 0} if entry in OTHERS else "x"):
        if type(value) is list and entry in ("input", "shares"):
            continue
        (folder / "record.json").write_text(whole)
        rewrite(folder, lambda record, value=value: record.update({entry: value}))
        with pytest.raises(CheckpointError, match=f"{entry}|not a record|format number"):
            read_record(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        '{"library": "nnprune_backdoor", "format": NaN}',
        '{"library": "nnprune_backdoor", "format": -Infinity}',
        '{"library": "nnprune_backdoor", "format": 1e999}',
        '{"library": "nnprune_backdoor", "format": ' + "9" * 5000 + "}",
        '{"library": "nnprune_backdoor", "format": 0}',
        '{"library": "nnprune_backdoor", "format": true}',
        "[" * 100_000,
        '{"a": ' * 100_000,
        "\x00",
    ],
    ids=range(12),
)
def test_what_is_no_plain_json_is_refused(folder: Path, text: str) -> None:
    (folder / "record.json").write_text(text)
    with pytest.raises(CheckpointError):
        read_record(folder)
    (folder / "record.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="damaged"):
        read_record(folder)


@pytest.mark.parametrize("name", ["recipe", "conv1", "groups"])
def test_a_name_that_stands_twice_is_refused(folder: Path, name: str) -> None:
    text = (folder / "record.json").read_text()
    if name == "groups":
        text = text.replace('"attributes": {', '"attributes": {"groups": 1, "groups": 1, ', 1)
    else:
        text = text.replace(f'"{name}": {{', f'"{name}": {{}}, "{name}": {{', 1)
    (folder / "record.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"'{name}' stands twice"):
        load_purified(folder, model=Tiny())


@pytest.mark.parametrize("groups", [7, 10**400, True, 2.0, -1])
def test_a_recipe_that_was_tampered_with_is_refused(folder: Path, groups: Any) -> None:
    def change(record: dict[str, Any]) -> None:
        record["recipe"]["conv1"]["attributes"]["groups"] = groups

    rewrite(folder, change)
    with pytest.raises(PurifyError, match=r"malformed|would not fit itself"):
        load_purified(folder, model=Tiny())


def test_nan_anywhere_is_refused(folder: Path) -> None:
    rewrite(folder, lambda record: record["seconds"].update(scoring=float("nan")))
    with pytest.raises(CheckpointError, match="NaN is not a finite number"):
        read_record(folder)


def test_a_record_that_is_too_large_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nnprune_backdoor.files.strict_json._MAX_BYTES", 100)
    with pytest.raises(CheckpointError, match="over 100 bytes"):
        read_record(folder)


def test_a_recorded_architecture_reads_no_file_and_takes_no_memory(folder: Path) -> None:
    bad: list[tuple[Any, Any, type[PurifyError], str]] = [
        ("../x", {}, UnknownNameError, "not read"),
        ("hf-hub:timm/resnet18", {}, UnknownNameError, "not read"),
        ("test_resnet", {"checkpoint_path": "x.pth"}, CheckpointError, "no argument"),
        ("test_resnet", {"pretrained": True}, CheckpointError, "no argument"),
        ("test_resnet", {"num_classes": 10**12}, CheckpointError, "over the limit"),
        ("test_resnet", {"num_classes": "many"}, CheckpointError, "cannot build"),
        ("test_resnet", {"banana": [1]}, CheckpointError, "cannot build"),
        ("test_resnet", [], CheckpointError, "'arguments' to be dict"),
        (5, {}, CheckpointError, "'name' to be str or NoneType"),
    ]
    for name, arguments, error, words in bad:
        entry = {"name": name, "arguments": arguments}
        rewrite(folder, lambda record, entry=entry: record.update(architecture=entry))
        with pytest.raises(error, match=words):
            load_purified(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
PLACES = st.sampled_from(
    [
        *((name,) for name in ENTRIES),
        ("recipe", "conv1"),
        ("recipe", "bn1", "kept"),
        ("recipe", "bn1", "kept", "weight"),
        ("recipe", "bn1", "kept", "weight", "0"),
        ("recipe", "bn1", "attributes"),
        ("recipe", "bn1", "attributes", "num_features"),
        ("recipe", "conv2", "constants"),
        ("recipe", "conv2", "kept", "weight", "7"),
        ("weights", "sha256"),
        ("architecture", "arguments"),
    ]
)


@settings(max_examples=60, deadline=None)
@given(place=PLACES, value=JSON)
def test_any_change_of_the_record_is_refused_or_harmless(
    saved: Path, tmp_path_factory: pytest.TempPathFactory, place: tuple[str, ...], value: Any
) -> None:
    folder = tmp_path_factory.mktemp("changed")
    (folder / "model.safetensors").hardlink_to(saved / "model.safetensors")
    record = json.loads((saved / "record.json").read_text())
    holder = record
    for name in place[:-1]:
        holder = holder[name]
    holder[place[-1]] = value
    (folder / "record.json").write_text(json.dumps(record))
    try:
        product = load_purified(folder, model=Tiny())
    except PurifyError:
        return
    held = load_file(saved / "model.safetensors")
    assert all(torch.equal(product.state_dict()[name], held[name]) for name in held)


# --- several at once, full disks, killed processes -------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_while_a_model_is_saved_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, overwrite: bool
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()

    def appears(state: dict[str, Tensor], path: str, metadata: dict[str, str]) -> None:
        save_file(state, path, metadata)
        if kind == "folder":
            out.mkdir()
            (out / "thesis.txt").write_text("years of work")
        elif kind == "file":
            out.write_text("years of work")
        else:
            out.symlink_to(elsewhere)
            (elsewhere / "thesis.txt").write_text("years of work")

    monkeypatch.setattr("nnprune_backdoor.files.safetensors_file.save_file", appears)
    with pytest.raises(CheckpointError):
        save_purified(tiny(), out, arch=None, overwrite=overwrite)
    held = out if kind == "file" else out / "thesis.txt"
    assert held.read_text() == "years of work"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_threads_that_save_to_one_name_one_succeeds(tmp_path: Path, overwrite: bool) -> None:
    def save(seed: int) -> bool:
        try:
            save_purified(tiny(seed), tmp_path / "out", arch=None, overwrite=overwrite)
        except CheckpointError:
            return False
        return True

    tiny(0), tiny(1)
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(save, [0, 1, 0, 1]))
    assert any(done) if overwrite else sum(done) == 1
    load_purified(tmp_path / "out", model=Tiny())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O")])
def test_a_disk_that_fills_up_is_said_in_our_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr("nnprune_backdoor.files.safetensors_file.save_file", full)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_purified(tiny(), tmp_path / "out", arch=None)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_with_too_little_space_is_found_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="do not fit on the disk, which has 100 left"):
        save_purified(tiny(), tmp_path / "out", arch=None)


@pytest.mark.parametrize("name", ["caf\udce9", "a/\udcff/b", "nul\0l"])
def test_a_name_that_cannot_be_written_is_refused_first(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="give a name in UTF-8"):
        check_free(tmp_path / name)
    with pytest.raises(CheckpointError, match="give a name in UTF-8"):
        save_purified(tiny(), tmp_path / name, arch=None)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys, torch
from nnprune_backdoor.files import safetensors_file, saving
from test_saving import tiny
where = sys.argv[2]
if where == "weights":
    safetensors_file.save_file = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
else:  # between the two moves of a folder that is replaced
    replace = saving.Path.replace
    def once(*a):
        replace(*a)
        os.kill(os.getpid(), signal.SIGKILL)
    saving.Path.replace = once
saving.save_purified(tiny(), sys.argv[1], arch=None, overwrite=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["weights", "moves"])
def test_the_draft_of_a_killed_process_is_deleted_by_the_next(tmp_path: Path, where: str) -> None:
    out = tmp_path / "out"
    save_purified(tiny(1), out, arch=None)
    held = files(out)
    here = Path(__file__).parent
    paths = [str(Path(nnprune_backdoor.__file__).parents[1]), str(here), str(here.parent)]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(out), where],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -9, done.stderr
    assert list(tmp_path.glob(".out.*"))
    with pytest.raises(CheckpointError, match="not empty"):
        check_free(out)  # what was set aside is back, and the drafts are gone
    assert files(tmp_path) == {f"out/{name}": content for name, content in held.items()}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # empty folders count as well


def test_the_draft_of_a_save_in_progress_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(state: dict[str, Tensor], path: str, metadata: dict[str, str]) -> None:
        save_file(state, path, metadata)
        check_free(tmp_path / "out")
        assert Path(path).exists()

    monkeypatch.setattr("nnprune_backdoor.files.safetensors_file.save_file", meanwhile)
    save_purified(tiny(), tmp_path / "out", arch=None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- formats of old --------------------------------------------------------------------------


@pytest.mark.parametrize("newest", [2, 3])
def test_format_1_is_still_read(newest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder was written by `save_purified(tiny(), ..., arch=None)` when 1 was the newest.

    A library of a newer format than this one's reads it too.
    """
    monkeypatch.setattr(record_file, "FORMAT", newest)
    record = read_record(OLD)
    assert record["format"] == 1
    assert sum(len(channels) for channels in record["silenced"].values()) == 4
    model = load_purified(OLD, model=Tiny())
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in Tiny().parameters())
    images = torch.linspace(-2, 2, 3 * 8 * 8).reshape(1, 3, 8, 8)
    wanted = torch.tensor([-0.4247262, 0.0210564, 0.2130354, 0.2158356])
    torch.testing.assert_close(logits(model, images)[0], wanted, atol=1e-5, rtol=0)


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    """The library writes two texts in either order; hashes of the file stand in other documents."""
    state = {"w": torch.rand(3, 2), "é": torch.ones(1), "b": torch.arange(3)}
    texts = {"format": "pt", "nnprune_backdoor": "purified"}
    files = set()
    for _ in range(30):
        write_safetensors(tmp_path / "w", state, texts)
        files.add((tmp_path / "w").read_bytes())
    assert len(files) == 1
    assert read_with_texts(tmp_path / "w")[1] == texts
    assert_same_state(read_safetensors(tmp_path / "w"), state)
