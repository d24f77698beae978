"""Which tensors of a file are taken: never those of two networks, and none in silence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from nnprune_backdoor import load_model, load_weights
from nnprune_backdoor.errors import CheckpointError
from nnprune_backdoor.files import Weights
from nnprune_backdoor.files.architecture import built
from nnprune_backdoor.files.fitting import fitted

State = dict[str, Tensor]

STATE: State = {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2)}


def under(prefix: str, state: State, value: float = 1.0) -> State:
    return {prefix + name: tensor * value for name, tensor in state.items()}


def read(path: Path, content: object, **arguments: object) -> Weights:
    torch.save(content, path)
    return load_weights(path, **arguments)  # type: ignore[arg-type]


def test_two_averages_are_never_mixed(tmp_path: Path) -> None:
    """Their prefixes are equally long, and each has one half of the network."""
    one, two = {"a.weight": STATE["a.weight"]}, {"b.weight": STATE["b.weight"]}
    content = {**under("net.", STATE), **under("ema_1.", one, 2), **under("ema_2.", two, 3)}
    path = tmp_path / "w.pt"
    with pytest.raises(CheckpointError, match=r"several averages: ema_1\., ema_2\.; say which"):
        read(path, content, weights="ema")
    content |= under("swa_model.", STATE, 4)
    with pytest.raises(CheckpointError, match="several averages"):
        read(path, content, weights="ema")
    taken = read(path, content, prefix="swa_model.", weights="ema")
    assert torch.equal(taken["b.weight"], STATE["b.weight"] * 4)
    assert taken.mapping["averaged"]
    assert torch.equal(read(path, content)["net.a.weight"], STATE["a.weight"])


def test_prefix_and_weights_must_not_contradict_each_other(tmp_path: Path) -> None:
    content = {**under("model.", STATE), **under("model_ema.", STATE, 2)}
    for prefix, weights in (("model.", "ema"), ("model_ema.", "plain")):
        with pytest.raises(CheckpointError, match="ask for different weights; leave one"):
            read(tmp_path / "w.pt", content, prefix=prefix, weights=weights)
    taken = read(tmp_path / "w.pt", content, prefix="model.", weights="plain")
    assert not taken.mapping["averaged"]


def test_an_average_beside_plain_weights_does_not_make_these_averaged(tmp_path: Path) -> None:
    content = {**STATE, **under("ema.", STATE, 2), "n_averaged": torch.tensor(3)}
    taken = read(tmp_path / "w.pt", content)
    assert torch.equal(taken["a.weight"], STATE["a.weight"])
    assert not taken.mapping["averaged"]


@pytest.mark.parametrize("settings", ["model", "ema"])
def test_settings_under_a_usual_name_are_no_weights(tmp_path: Path, settings: str) -> None:
    content = {settings: {"name": "resnet18", "decay": 0.9}, "weights": STATE}
    assert list(read(tmp_path / "w.pt", content)) == list(STATE)
    with pytest.raises(CheckpointError, match="holds no averaged weights"):
        read(tmp_path / "w.pt", content, weights="ema")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.LayerNorm(2, bias=False)


def test_layers_beside_a_prefixed_network_are_not_dropped_unasked(tmp_path: Path) -> None:
    """A classifier behind a network that has one of its own computes something else."""
    content = {**under("backbone.", STATE), "head.weight": torch.ones(3, 2)}
    path = tmp_path / "w.pt"
    with pytest.raises(CheckpointError, match=r"other layers: head\.weight; .*--prefix backbone\."):
        fitted(read(path, content), Net())
    assert list(fitted(read(path, content, prefix="backbone."), Net())) == list(STATE)
    beside = {"0.mean": torch.zeros(1, 3, 1, 1), "loss.vgg.weight": torch.ones(2, 2)}
    part = under("net_ema.", {"a.weight": torch.ones(2, 2)})  # without what is not trained
    taken = fitted(read(path, {**under("net.", STATE), **beside, **part}), Net())
    assert list(taken) == list(STATE)
    assert set(taken.mapping["left_out"]) == {*beside, *part}


def test_patterns_to_drop_tell_upper_case_from_lower_case(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor to drop is named 'A\.\*'"):
        read(tmp_path / "w.pt", STATE, drop=["A.*"])


def test_a_file_that_names_another_architecture(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet")
    for arch, notes in (("resnet50", 1), ("test_resnet.r160_in1k", 0)):
        weights = read(tmp_path / "w.pt", {"arch": arch, "state_dict": model.state_dict()})
        told = built(weights, "test_resnet", {}, what="w.pt")[3].notes[len(weights.notes) :]
        assert len(told) == notes
        assert all("it says that it is a 'resnet50', not a 'test_resnet'" in n for n in told)


def test_what_timm_s_function_leaves_out_is_compared_or_named(tmp_path: Path) -> None:
    arch = "swin_tiny_patch4_window7_224"
    args = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    swin = timm.create_model(arch, num_classes=3, **args)
    state = dict(swin.state_dict())
    index = {n: b for n, b in swin.named_buffers() if n not in state}
    old = {
        re.sub(r"layers.(\d).down", lambda m: f"layers.{int(m[1]) - 1}.down", name).replace(
            "head.fc.", "head."
        ): tensor
        for name, tensor in state.items()
    }
    mask = {"layers.0.blocks.9.attn_mask": torch.ones(3)}
    weights = read(tmp_path / "w.pt", {**old, **index, **mask})
    found = built(weights, arch, args, what="w.pt")[3]
    assert f"left out by it: {next(iter(mask))}" in found.notes
    assert set(found.mapping["left_out"]) == {*index, *mask}
    name = next(iter(index))
    torch.save({**old, **index, name: index[name].flip(0)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=rf"unexpected: {re.escape(name)}"):
        load_model(tmp_path / "w.pt", arch, **args)
