"""Files as training scripts, hubs and other programs write them, loaded into their architecture."""

from __future__ import annotations

import enum
import json
import pickle
import re
import tarfile
import zipfile
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path, PosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from helpers.networks import build
from nnprune_backdoor import load_model, load_weights
from nnprune_backdoor.errors import CheckpointError
from nnprune_backdoor.files import Weights
from nnprune_backdoor.files.architecture import built

ARCH = "test_resnet"

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build(ARCH)


@pytest.fixture
def state(model: nn.Module) -> State:
    return dict(model.state_dict())


def averaged(state: State) -> State:
    return {name: t + 1 if t.is_floating_point() else t for name, t in state.items()}


def loaded(path: Path, arch: str | None = ARCH, **arguments: Any) -> tuple[State, Weights]:
    """What the network got from the file, and the weights with their notes."""
    model, _, _, weights = built(load_weights(path, **arguments), arch, {}, what=path.name)
    return dict(model.state_dict()), weights


def assert_got(got: State, wanted: State) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


# --- training scripts ------------------------------------------------------------------------


def trained_by_timm(folder: Path, model: nn.Module) -> Path:
    """timm's train.py writes its checkpoints by this class."""
    model.default_cfg = model.pretrained_cfg
    ema = ModelEmaV3(model)
    ema.module.load_state_dict(averaged(dict(model.state_dict())))
    optimizer = torch.optim.AdamW(model.parameters())
    args = Namespace(model=ARCH, lr=0.1, mean=None, crop_pct=np.float64(0.9))
    saver = CheckpointSaver(
        model, optimizer, args, ema, checkpoint_dir=str(folder), recovery_dir=str(folder)
    )
    saver.save_checkpoint(3, metric=np.float64(71.2))
    return folder / "last.pth.tar"


def test_timm_training(tmp_path: Path, model: nn.Module, state: State) -> None:
    path = trained_by_timm(tmp_path, model)
    got, weights = loaded(path, None)  # its entry "arch" names the architecture
    assert_got(got, state)
    text = "; ".join(weights.notes)
    assert "averaged weights too, under 'state_dict_ema', and the plain ones were taken" in text
    assert "--weights ema" in text
    assert "argparse.Namespace, numpy" in text
    assert weights.mapping["entry"] == ["state_dict"]
    got, weights = loaded(path, None, weights="ema")
    assert_got(got, averaged(state))
    assert weights.mapping["entry"] == ["state_dict_ema"]
    assert weights.mapping["averaged"]


def test_torchvision_references(tmp_path: Path, model: nn.Module, state: State) -> None:
    ema = AveragedModel(model, use_buffers=True)
    ema.module.load_state_dict(averaged(state))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    content = {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3).state_dict(),
        "epoch": 5,
        "args": Namespace(device="cuda", norm_weight_decay=None, data=PosixPath("/data")),
        "model_ema": ema.state_dict(),
    }
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    assert_got(loaded(path)[0], state)
    got, weights = loaded(path, weights="ema")
    assert_got(got, averaged(state))
    assert weights.mapping["prefix"] == "module."
    assert weights.mapping["left_out"] == ["n_averaged"]
    torch.save(ema.state_dict(), path)
    assert_got(loaded(path)[0], averaged(state))
    with pytest.raises(CheckpointError, match="averaged weights alone"):
        load_weights(path, weights="plain")
    torch.save({"model_ema": ema.state_dict()}, path)
    assert_got(loaded(path)[0], averaged(state))
    with pytest.raises(CheckpointError, match="averaged weights alone, under 'model_ema'"):
        load_weights(path, weights="plain")


def lightning(state: State) -> dict[str, Any]:
    """As Lightning 2 lays it out."""
    return {
        "epoch": 4,
        "global_step": 100,
        "pytorch-lightning_version": "2.2.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}],
        "hyper_parameters": {"path": PosixPath("/data"), "more": SimpleNamespace(a=np.float32(1))},
    }


@pytest.mark.parametrize("prefix", ["model.", "net.", "classifier.backbone.", "model._orig_mod."])
def test_lightning(tmp_path: Path, state: State, prefix: str) -> None:
    beside = {
        "criterion.weight": torch.ones(10),
        "train_acc.total": torch.tensor(5),
        "val_loss_fn.pos_weight": torch.ones(10),
    }
    names = {prefix + name: tensor for name, tensor in state.items()}
    torch.save(lightning({**names, **beside}), tmp_path / "last.ckpt")
    got, weights = loaded(tmp_path / "last.ckpt")
    assert_got(got, state)
    assert set(weights.mapping["left_out"]) == beside.keys()
    assert weights.mapping["prefix"] == prefix
    assert all(name in "; ".join(weights.notes) for name in beside)


def test_an_average_beside_the_network(tmp_path: Path, state: State) -> None:
    plain = {f"model.{name}": tensor for name, tensor in state.items()}
    ema = {f"model_ema.module.{name}": tensor for name, tensor in averaged(state).items()}
    torch.save(lightning({**plain, **ema}), tmp_path / "last.ckpt")
    got, weights = loaded(tmp_path / "last.ckpt")
    assert_got(got, state)
    assert "the averaged weights beside the ones taken were left out" in "; ".join(weights.notes)
    assert_got(loaded(tmp_path / "last.ckpt", weights="ema")[0], averaged(state))


def test_tensors_beside_an_average_are_the_plain_ones(tmp_path: Path, state: State) -> None:
    torch.save({**state, "ema": averaged(state)}, tmp_path / "w.pt")
    for weights in (None, "plain"):
        assert_got(load_weights(tmp_path / "w.pt", weights=weights), state)
    assert_got(load_weights(tmp_path / "w.pt", weights="ema"), averaged(state))


def test_a_layer_called_ema_is_no_average(tmp_path: Path) -> None:
    """Efficient multi-scale attention is called so."""
    names = ["conv.weight", "fc.weight", "ema.weight"]
    torch.save(dict.fromkeys(names, torch.ones(1)), tmp_path / "w.pt")
    assert list(load_weights(tmp_path / "w.pt")) == names
    with pytest.raises(CheckpointError, match="holds no averaged weights"):
        load_weights(tmp_path / "w.pt", weights="ema")
    with pytest.raises(CheckpointError, match="expected 'plain' or 'ema'"):
        load_weights(tmp_path / "w.pt", weights="best")  # type: ignore[arg-type]


class Config:
    """A class that no reader of the file has."""

    def __init__(self) -> None:
        self.lr = 0.1
        self.tensor = torch.ones(3)


class Stage(enum.Enum):
    ONE = 1


BESIDE: dict[str, Callable[[], Any]] = {
    "numpy numbers": lambda: {"best": np.float64(0.9), "n": np.int64(3), "dtype": np.dtype("f4")},
    "numpy arrays": lambda: {"history": np.arange(4.0), "rng": np.random.get_state()},
    "namespaces": lambda: {"args": Namespace(a=1, b=[Namespace(c=2)]), "s": SimpleNamespace(d=3)},
    "unknown classes": lambda: {"config": Config(), "stage": Stage.ONE, "d": defaultdict(list)},
    "torch's own": lambda: {
        "rng": torch.get_rng_state(),
        "dev": torch.device("cpu"),
        "t": torch.half,
    },
    "functions": lambda: {"act": nn.functional.relu, "size": torch.Size([1, 2])},
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_lies_beside_the_weights_does_not_matter(
    tmp_path: Path, beside: str, protocol: int
) -> None:
    state = {"conv.weight": torch.randn(3, 3), "n": torch.tensor(3)}
    content = {"net": state, "epoch": 3, **BESIDE[beside]()}
    path = tmp_path / "w.pth"
    torch.save(content, path, pickle_protocol=protocol)
    assert_got(load_weights(path), state)
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    assert_got(load_weights(path), state)


@pytest.mark.parametrize(
    "prefix",
    ["encoder.", "backbone.", "1.", "module._orig_mod.", "_orig_mod.module.", "module.net."],
)
def test_prefixes(tmp_path: Path, state: State, prefix: str) -> None:
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "w.pth")
    got, weights = loaded(tmp_path / "w.pth")
    assert_got(got, state)
    assert weights.mapping["prefix"] == prefix


def test_a_compiled_part_and_a_normalising_wrapper(tmp_path: Path, state: State) -> None:
    names = {name.replace("layer1.", "layer1._orig_mod."): t for name, t in state.items()}
    torch.save(names, tmp_path / "w.pth")
    assert_got(loaded(tmp_path / "w.pth")[0], state)
    names = {f"1.{name}": tensor for name, tensor in state.items()}
    torch.save({"0.mean": torch.zeros(3), **names}, tmp_path / "w.pth")
    got, weights = loaded(tmp_path / "w.pth")
    assert_got(got, state)
    assert "left out, since they lack it: 0.mean" in weights.notes


def test_two_networks_of_one_architecture_need_a_choice(tmp_path: Path, state: State) -> None:
    one = {f"encoder_q.{name}": tensor for name, tensor in state.items()}
    two = {f"encoder_k.{name}": tensor for name, tensor in averaged(state).items()}
    torch.save({**one, **two, "queue": torch.ones(4)}, tmp_path / "w.pth")
    with pytest.raises(
        CheckpointError, match=r"w\.pth: .*prefixes: encoder_k\., encoder_q\.;.*prefix="
    ):
        loaded(tmp_path / "w.pth")
    got, weights = loaded(tmp_path / "w.pth", prefix="encoder_k.")
    assert_got(got, averaged(state))
    assert "removed the prefix 'encoder_k.' as asked" in weights.notes
    assert load_model(tmp_path / "w.pth", ARCH, prefix="encoder_q.", num_classes=10)
    with pytest.raises(
        CheckpointError, match=r"no tensor has the prefix 'encoder_x\.'; it holds enc"
    ):
        load_weights(tmp_path / "w.pth", prefix="encoder_x.")
    torch.save({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"several entries hold tensors: a, b; say which by"):
        load_weights(tmp_path / "w.pth")
    assert list(load_weights(tmp_path / "w.pth", key="b")) == ["w"]


def test_an_entry_of_an_unusual_name_is_found(tmp_path: Path, state: State) -> None:
    torch.save({"my_classifier": state, "optimizer": {"state": {}}, "epoch": 1}, tmp_path / "w.pth")
    got, weights = loaded(tmp_path / "w.pth")
    assert_got(got, state)
    assert weights.mapping["entry"] == ["my_classifier"]


def test_tensors_that_the_network_lacks_are_refused_until_they_are_dropped(
    tmp_path: Path, state: State
) -> None:
    extra = {"head_dist.weight": torch.ones(2), "head_dist.bias": torch.ones(2)}
    torch.save({**state, **extra}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"2 unexpected: head_dist\.weight.*--drop PATTERN"):
        loaded(tmp_path / "w.pth")
    got, weights = loaded(tmp_path / "w.pth", drop=["head_dist.*"])
    assert_got(got, state)
    assert "dropped as asked: head_dist.bias, head_dist.weight" in weights.notes
    with pytest.raises(CheckpointError, match=r"no tensor to drop is named 'heads\.\*'"):
        load_weights(tmp_path / "w.pth", drop=["heads.*"])
    with pytest.raises(CheckpointError, match=r"1 missing: fc\.bias"):
        loaded(tmp_path / "w.pth", drop=["head_dist.*", "fc.bias"])


def test_a_deeper_network_is_not_cut_to_a_shallow_one(tmp_path: Path) -> None:
    """All tensors of a ResNet-18 are in a ResNet-34, in equal shapes."""
    small = {"channels": (8, 8, 8, 8)}
    deep = timm.create_model("resnetv2_34", num_classes=3, **small)
    torch.save(deep.state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"unexpected: stages\.0\.blocks\.2"):
        load_model(tmp_path / "w.pth", "resnetv2_18", **small)


def test_counters_that_are_missing_and_what_profilers_leave(tmp_path: Path, state: State) -> None:
    names = {name: t for name, t in state.items() if "num_batches_tracked" not in name}
    left = {"total_ops": torch.zeros(1), "layer1.0.total_params": torch.zeros(1)}
    torch.save({**names, **left}, tmp_path / "w.pth")
    got, weights = loaded(tmp_path / "w.pth")
    assert_got({name: got[name] for name in names}, names)
    assert not any(got[name].any() for name in got.keys() - names.keys())
    assert weights.mapping["set_to_0"] == [name for name in state if name not in names]
    assert "num_batches_tracked" in weights.notes[-1]
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    torch.save({n: t for n, t in own.state_dict().items() if "num" not in n}, tmp_path / "w.pth")
    assert "1.num_batches_tracked" not in load_weights(tmp_path / "w.pth")  # no network is known


# --- other spellings of an architecture ------------------------------------------------------

SWIN = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}


def test_buffers_that_a_network_computes_itself(tmp_path: Path) -> None:
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **SWIN)
    state = dict(swin.state_dict())
    buffers = {name: b for name, b in swin.named_buffers() if name not in state}
    name = next(name for name in buffers if name.endswith("relative_position_index"))
    torch.save({**state, **buffers}, tmp_path / "w.pth")
    model = load_model(tmp_path / "w.pth", "swin_tiny_patch4_window7_224", **SWIN)
    assert_got(dict(model.state_dict()), state)
    torch.save({**state, name: buffers[name].flip(0)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=rf"unexpected: {re.escape(name)}"):
        load_model(tmp_path / "w.pth", "swin_tiny_patch4_window7_224", **SWIN)


@pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning")  # of timm's function
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")
def test_swin_as_its_authors_and_older_versions_name_it(tmp_path: Path) -> None:
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **SWIN)
    old = {
        re.sub(r"layers.(\d).down", lambda m: f"layers.{int(m[1]) - 1}.down", name).replace(
            "head.fc.", "head."
        ): tensor
        for name, tensor in swin.state_dict().items()
    }
    torch.save({"model": {f"module.{name}": t for name, t in old.items()}}, tmp_path / "w.pth")
    weights = load_weights(tmp_path / "w.pth")
    model, _, arguments, found = built(weights, "swin_tiny_patch4_window7_224", SWIN, what="w.pth")
    assert_got(dict(model.state_dict()), dict(swin.state_dict()))
    assert arguments["num_classes"] == 3
    name = "timm.models.swin_transformer.checkpoint_filter_fn"
    assert found.notes[-1] == f"named as the network by {name}"
    assert found.mapping["converted_by"] == name
    smaller = {**SWIN, "window_size": 4}
    found = built(weights, "swin_tiny_patch4_window7_224", smaller, what="w.pth")[3]
    assert found.notes[-1].startswith("joined, resized or made by it: layers.0.blocks.0.attn.rel")


def test_convnext_as_its_authors_name_it(tmp_path: Path) -> None:
    args = {"dims": (4, 4, 8, 8), "depths": (1, 1, 1, 1), "conv_mlp": False}
    convnext = timm.create_model("convnext_atto", num_classes=3, **args)
    old = {}
    for name, tensor in convnext.state_dict().items():
        theirs = name
        for new, spelled in (
            (r"^stem\.", "downsample_layers.0."),
            (r"stages.(\d).downsample.(\d)", r"downsample_layers.\1.\2"),
            (r"stages.(\d).blocks.(\d)", r"stages.\1.\2"),
            ("conv_dw", "dwconv"),
            (r"mlp\.fc", "pwconv"),
            (r"head\.fc\.", "head."),
            (r"head\.norm", "norm"),
        ):
            theirs = re.sub(new, spelled, theirs)
        old[theirs] = tensor
    torch.save({"model": old}, tmp_path / "w.pth")
    model = load_model(tmp_path / "w.pth", "convnext_atto", **args)
    assert_got(dict(model.state_dict()), dict(convnext.state_dict()))


def test_densenet_as_torchvision_publishes_it(tmp_path: Path) -> None:
    """timm's function for it takes the weights alone, not the network."""
    args = {"growth_rate": 4, "block_config": (1, 1, 1, 1)}
    densenet = timm.create_model("densenet121", num_classes=3, **args)
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): tensor
        for name, tensor in densenet.state_dict().items()
        if "num_batches_tracked" not in name
    }
    torch.save(old, tmp_path / "w.pth")
    model = load_model(tmp_path / "w.pth", "densenet121", **args)
    assert_got(dict(model.state_dict()), dict(densenet.state_dict()))


def test_what_timm_makes_up_does_not_count(tmp_path: Path) -> None:
    """Its function for ConvNeXt gives CLIP's towers a classifier with zeros for its bias."""
    args = {"dims": (4, 4, 8, 8), "depths": (1, 1, 1, 1)}
    convnext = timm.create_model("convnext_atto", num_classes=3, **args)
    names = {f"visual.trunk.{name}": tensor for name, tensor in convnext.state_dict().items()}
    head = {"visual.head.proj.weight": names.pop("visual.trunk.head.fc.weight")}
    del names["visual.trunk.head.fc.bias"]
    torch.save({**names, **head}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"missing: .*head\.fc\.bias"):
        load_model(tmp_path / "w.pth", "convnext_atto", **args)


# --- hubs and other files --------------------------------------------------------------------


def sharded(folder: Path, state: State, *, pickled: bool) -> Path:
    stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    places = {}
    for number in range(2):
        part = dict(list(state.items())[number::2])
        file = f"{stem}-{number + 1:05d}-of-00002.{ending}"
        (torch.save if pickled else save_file)(part, folder / file)
        places.update(dict.fromkeys(part, file))
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("pickled", [False, True])
def test_a_folder_of_a_hub(tmp_path: Path, state: State, pickled: bool) -> None:
    config = {"architecture": ARCH, "model_args": {"layers": [1, 1, 1, 1]}, "pretrained_cfg": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        save_file(state, tmp_path / "model.safetensors")
    got, weights = loaded(tmp_path, None)
    assert_got(got, state)
    assert "took the architecture from config.json" in weights.notes
    for broken in ("[]", "{", json.dumps({"architecture": 3})):
        (tmp_path / "config.json").write_text(broken)
        assert load_weights(tmp_path / name_of(pickled)).arch is None


def name_of(pickled: bool) -> str:
    return "pytorch_model.bin" if pickled else "model.safetensors"


@pytest.mark.parametrize("pickled", [False, True])
def test_a_model_in_several_files(tmp_path: Path, state: State, pickled: bool) -> None:
    index = sharded(tmp_path, state, pickled=pickled)
    for path in (index, tmp_path):
        got, weights = loaded(path)
        assert_got(got, state)
        assert f"read 2 files that {index.name} names" in weights.notes
    shard = next(tmp_path.glob("*-00002-of-00002.*"))
    with pytest.raises(CheckpointError, match=r"one of 2 files that hold a model; give the folder"):
        load_weights(shard)
    with pytest.raises(CheckpointError, match="over the limit of"):
        load_weights(tmp_path, max_bytes=index.stat().st_size + shard.stat().st_size)
    content = json.loads(index.read_text())
    for name, reason in (("../x-00001-of-00002.bin", "no part of a model"), ("x.bin", "no part")):
        index.write_text(json.dumps({"weight_map": {**content["weight_map"], "more": name}}))
        with pytest.raises(CheckpointError, match=reason):
            load_weights(index)
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], "more": shard.name}}))
    with pytest.raises(CheckpointError, match="'more' is not in it"):
        load_weights(index)
    shard.unlink()
    with pytest.raises(CheckpointError, match="is missing; get all files"):
        load_weights(index)


@pytest.mark.parametrize("name", ["W.PTH", "w", "w.weights", "w.safetensors", "w.pt", "w.Bin"])
def test_a_file_is_what_it_holds_whatever_its_name(tmp_path: Path, name: str) -> None:
    state = {"w": torch.ones(2)}
    torch.save(state, tmp_path / name)
    assert_got(load_weights(tmp_path / name), state)
    save_file(state, tmp_path / name)
    weights = load_weights(tmp_path / name)
    assert_got(weights, state)
    assert bool(weights.notes) == (name != "w.safetensors")


def archive_of(path: Path, kind: Any) -> bytes:
    (path / "inner.pth").write_bytes(b"inner")
    with kind(path / "outer", "w") as file:
        (file.add if kind is tarfile.open else file.write)(path / "inner.pth", "inner.pth")
    return (path / "outer").read_bytes()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"

OTHERS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "LFS pointer": (lambda _: LFS, "a Git LFS pointer, not the weights; run: git lfs pull"),
    "web page": (lambda _: b"\n<!DOCTYPE html><html><title>Virus scan warning", "a web page, not"),
    "XML": (lambda _: b"<?xml version='1.0'?><Error><Code>AccessDenied", "a web page, not"),
    "7z": (lambda _: b"7z\xbc\xaf\x27\x1c\x00\x04" + bytes(30), "a 7z archive; unpack it"),
    "gzip": (lambda _: b"\x1f\x8b\x08" + bytes(30), "compressed by gzip; unpack it"),
    "HDF5": (lambda _: b"\x89HDF\r\n\x1a\n" + bytes(30), "an HDF5 file, as Keras writes them"),
    "JSON": (lambda _: b'{"error": "Repository not found"}', "JSON, not the weights"),
    "text": (lambda _: b"Not Found", "it begins with 'Not Found'"),
    "RAR": (lambda _: b"Rar!\x1a\x07" + bytes(30), "a RAR archive; unpack it"),
    "nothing": (lambda _: b"", "empty; get the file again"),
    "zip": (lambda path: archive_of(path, zipfile.ZipFile), r"a zip archive \(of inner\.pth\)"),
    "tar": (lambda path: archive_of(path, tarfile.open), r"a tar archive \(of inner\.pth\)"),
    "numbers": (lambda _: pickle.dumps([1, 2]), "expected a dictionary of tensors, got list"),
    "pickle.dump": (
        lambda _: pickle.dumps({"w": torch.ones(2)}),
        r"'w' is no plain dense tensor \(torch\._utils\._rebuild_tensor_v2\)",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_file_that_holds_no_weights_is_told_what_it_is(
    tmp_path: Path, kind: str, name: str
) -> None:
    content, reason = OTHERS[kind]
    (tmp_path / name).write_bytes(content(tmp_path))
    with pytest.raises(CheckpointError, match=reason):
        load_weights(tmp_path / name)
