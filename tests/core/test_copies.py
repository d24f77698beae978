"""What a caller may have set, and models that plain copying refuses."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from helpers.criteria import Arbitrary
from helpers.images import noise_images
from nnprune_backdoor import CleanData, Compute, purify
from nnprune_backdoor.core.copies import (
    clone,
    frozen_copy,
    how_to_make_plain,
    refuse_computed_weights,
)
from nnprune_backdoor.core.masks import MaskedModel, silence_
from nnprune_backdoor.core.sites import find_sites
from nnprune_backdoor.errors import DataError, UnsupportedModelError
from nnprune_backdoor.evidence import expose
from nnprune_backdoor.removal import compact
from nnprune_backdoor.selectors import LowestFraction
from nnprune_backdoor.training import FineTuning, fine_tune
from nnprune_backdoor.utils.randomness import private_randomness, usual_passes

LABELS = torch.arange(32) % 4
CLEAN = CleanData(noise_images(32) + LABELS[:, None, None, None], LABELS)


class Plain(nn.Module):
    """Two convolutions and a classifier of four classes; keeps what it computed before that."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 5, 3, padding=1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.last = [self.second(self.first(x).relu()).relu().mean((2, 3))]
        logits: Tensor = self.head(self.last[0])
        return logits


class Encoder(nn.Module):
    """Patches through PyTorch's own transformer layers, which have a fused version."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.patches = nn.Conv2d(3, 16, 16, 16)
        self.blocks = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        logits: Tensor = self.head(tokens.mean(1))
        return logits


def made(kind: Callable[[], nn.Module] = Plain) -> Any:
    torch.manual_seed(0)
    return kind().eval()


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


# --- what the caller has set -----------------------------------------------------------------


def test_autocast_of_the_caller_is_off_inside_and_comes_back() -> None:
    with autocast():
        with private_randomness(0):
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
        with pytest.raises(ZeroDivisionError), usual_passes():
            _ = 1 / 0
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


def test_the_precision_that_was_asked_for_stays_on_further_inside() -> None:
    half = Compute(precision="bfloat16").applied(torch.device("cpu"))
    with autocast(), usual_passes(), half, private_randomness(1), usual_passes():
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_cache_enabled()
    with autocast(), usual_passes():  # that there was another block before changes nothing
        assert not torch.is_autocast_enabled("cpu")


def test_weights_are_trained_under_autocast_as_without() -> None:
    wanted = fine_tune(made(), CLEAN, FineTuning(epochs=2), progress=False), expose(made(), CLEAN)
    with autocast():
        found = (
            fine_tune(made(), CLEAN, FineTuning(epochs=2), progress=False),
            expose(made(), CLEAN),
        )
    assert torch.equal(
        found[0].get_parameter("head.weight"), wanted[0].get_parameter("head.weight")
    )
    assert found[1].trajectory == wanted[1].trajectory


def test_fused_encoder_layers_are_masked_and_removed() -> None:
    model, few = made(Encoder), CLEAN.images[:4]
    assert torch.backends.mha.get_fastpath_enabled()
    found = purify(model, CLEAN, Arbitrary(), selector=LowestFraction(0.3), progress=False)
    assert found.removal is not None
    hidden = [n for n in found.removal.removed if n.site.endswith("linear1")]
    assert hidden
    assert found.removal.after.parameters < found.removal.before.parameters
    assert torch.backends.mha.get_fastpath_enabled()
    with usual_passes(), torch.no_grad():
        sites = find_sites(model, few)
        assert torch.equal(MaskedModel(model.requires_grad_(False), sites)(few), model(few))
    silent = copy.deepcopy(model)
    silence_(silent, found.selection)
    _, report = compact(silent, found.selection, few, fill=False)  # by itself
    assert report.removed == found.removal.removed
    # more than the patches, which the fused layers would leave
    assert report.before.macs == found.removal.before.macs > 3 * 16**2 * 16 * 4 + 2 * 16 * 32 * 4


# --- seeds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [np.int64(3), torch.tensor(3), np.uint8(3)])
def test_any_kind_of_integer_is_a_seed(seed: Any) -> None:
    drawn = []
    for one in (3, seed):
        with private_randomness(one):
            drawn.append((torch.rand(2).tolist(), np.random.rand()))
    assert drawn[0] == drawn[1]
    tuned = [
        fine_tune(made(), CLEAN, FineTuning(epochs=1), seed=one, progress=False)
        for one in (3, seed)
    ]
    first, second = (net.get_parameter("head.weight") for net in tuned)
    assert torch.equal(first, second)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, None, "0", torch.tensor(1.0), [1, 2]])
def test_what_cannot_be_a_seed_is_refused(seed: Any) -> None:
    with pytest.raises(DataError, match="seed"), private_randomness(seed):
        pass


# --- copies ----------------------------------------------------------------------------------


def weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and still in use
        torch.nn.utils.weight_norm(layer)


COMPUTED: dict[str, Callable[[nn.Module], Any]] = {
    "parametrize.remove_parametrizations": parametrizations.weight_norm,
    "remove_weight_norm": weight_norm,
    "remove_spectral_norm": torch.nn.utils.spectral_norm,
    "prune.remove": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("undo", COMPUTED)
def test_models_with_computed_weights_are_copied_with_modes_and_flags(undo: str) -> None:
    model = made()
    COMPUTED[undo](model.second)
    model.first.train().requires_grad_(False)
    with torch.no_grad():
        wanted = model(CLEAN.images[:2])
    model(CLEAN.images[:2])  # leaves results that have a history
    again = clone(model)
    assert [m.training for m in again.modules()] == [m.training for m in model.modules()]
    flags = [[p.requires_grad for p in each.parameters()] for each in (model, again)]
    assert flags[0] == flags[1]
    with torch.no_grad():
        assert torch.equal(again(CLEAN.images[:2]), wanted)
        again.get_parameter("head.weight").zero_()
    assert model.head.weight.any()


@pytest.mark.parametrize("undo", COMPUTED)
def test_what_undoes_a_computed_weight_is_named_and_does_so(undo: str) -> None:
    model = made()
    COMPUTED[undo](model.second)
    sites = find_sites(model, CLEAN.images[:2])
    chosen = LowestFraction(0.9)(Arbitrary()(model, CLEAN))
    with pytest.raises(UnsupportedModelError, match=rf"'second'.*torch.nn.utils.{undo}\(") as bad:
        silence_(model, chosen)
    with pytest.raises(UnsupportedModelError, match="'second'"):
        refuse_computed_weights(model, [site.name for site in sites])
    advice = str(bad.value).rpartition("first with ")[2]
    assert advice == how_to_make_plain(model.second)
    exec(advice, {"torch": torch, "layer": model.second})  # as a reader would
    silence_(model, chosen)
    refuse_computed_weights(model, [site.name for site in sites])


class Refuses(Plain):
    def __deepcopy__(self, memo: Any) -> Any:
        raise AttributeError("not this one")


def test_what_cannot_be_copied_is_refused_by_name() -> None:
    scripted = made()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and still in use
        scripted.second = torch.jit.script(scripted.second)
    models: list[tuple[Any, str]] = [
        (made(Refuses), "AttributeError: not this one"),
        (scripted, "TorchScript"),
        (Plain().to("meta"), "meta"),
        (made().state_dict(), "load_state_dict"),
        ("model.pth", "load_weights"),
        (None, "NoneType"),
    ]
    for model, why in models:
        for copying in (clone, frozen_copy):
            with pytest.raises(UnsupportedModelError, match=why):
                copying(model)
