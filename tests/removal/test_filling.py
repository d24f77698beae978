"""Layers with constants among their channels are layers like others."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from helpers.images import noise_images
from helpers.networks import build
from helpers.states import assert_same_state, state_of
from nnprune_backdoor.core.masks import MaskedModel, silence_
from nnprune_backdoor.core.scores import Selection, neurons_of
from nnprune_backdoor.core.sites import find_sites
from nnprune_backdoor.errors import DataError, UnsupportedModelError
from nnprune_backdoor.removal import Recipe, compact
from nnprune_backdoor.removal.filling import Fill, Filled, Pick

IMAGES = noise_images(4)


def narrowed(name: str) -> tuple[nn.Module, Tensor]:
    """A network without every fifth neuron, and the logits of the silenced one."""
    model = build(name)
    sites = find_sites(model, IMAGES[:2])
    selection = Selection(sites, tuple(neurons_of(sites)[::5]))
    silence_(model, selection)
    smaller, report = compact(model, selection, IMAGES)
    assert report.filled
    assert set(report.removed) == set(selection.neurons)
    with torch.no_grad():
        return smaller, model(IMAGES)


def test_constants_are_put_where_they_belong() -> None:
    x = torch.arange(6.0).reshape(1, 2, 3)
    fill = Fill([2, 0, 3, 1], torch.tensor([7.0, 8.0]), axis=1)
    assert fill(x).tolist() == [[[7.0] * 3, [0.0, 1.0, 2.0], [8.0] * 3, [3.0, 4.0, 5.0]]]
    assert fill(x.half()).dtype == torch.float16
    assert Pick([2, 0], axis=-1)(x).tolist() == [[[2.0, 0.0], [5.0, 3.0]]]
    assert not fill.state_dict()


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_a_narrowed_network_can_be_copied_exported_and_trained(name: str) -> None:
    model, wanted = narrowed(name)
    layer = next(module for module in model.modules() if isinstance(module, Filled))
    assert layer.weight is layer.layer.weight
    with pytest.raises(AttributeError, match="nothing"):
        _ = layer.nothing
    exported = torch.export.export(model, (IMAGES,)).module()
    with torch.no_grad():
        for other in (copy.deepcopy(model), exported):
            torch.testing.assert_close(other(IMAGES), wanted, rtol=1e-4, atol=1e-4)
        assert model.double()(IMAGES.double()).dtype == torch.float64
    model.float().train()(IMAGES).logsumexp(1).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_narrowed_network_can_be_narrowed_again() -> None:
    model, _ = narrowed("test_resnet")
    sites = find_sites(model, IMAGES[:2])
    assert sum(site.kind == "norm" for site in sites) > 5
    masked = MaskedModel(model, sites, silencing="zero")
    selection = Selection(sites, tuple(neurons_of(sites)[::4]))
    masked.masks.requires_grad_(False).copy_(selection.keep())
    with torch.no_grad():
        wanted = masked(IMAGES)
        silence_(model, selection)
        torch.testing.assert_close(model(IMAGES), wanted, rtol=1e-4, atol=1e-4)
        again, report = compact(model, selection, IMAGES)
        torch.testing.assert_close(again(IMAGES), wanted, rtol=1e-4, atol=1e-4)
    assert set(report.removed) == set(selection.neurons)


def layer(**entry: object) -> dict[str, object]:
    plain = {"kept": {}, "attributes": {}, "constants": {}, "filled": {}, "unread": []}
    return {"0": {**plain, **entry}}


KEPT = {"weight": {"0": [0, 1]}, "bias": {"0": [0, 1]}}


@pytest.mark.parametrize(
    "entry",
    [
        layer(filled={"4": 0.0}, kept=KEPT, attributes={"out_channels": 2}),  # of four outputs
        layer(filled={"1": 0.0}, kept=KEPT, attributes={"out_channels": 2}),  # which stays
        layer(filled={"2": 0.0}),
        layer(unread=[2], kept=KEPT, attributes={"out_channels": 2}),  # it reads all
        {"1": {**layer(filled={"2": 0.0})["0"], "kept": {"weight": {"0": [0, 1]}}}},  # a LayerNorm
        {"": layer(filled={"2": 0.0})["0"]},
    ],
)
def test_a_recipe_that_fills_what_it_cannot_is_refused(entry: dict[str, object]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm(4, bias=False))
    before = state_of(model)
    with pytest.raises(UnsupportedModelError):
        Recipe.from_dict(entry).apply_(model)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize(
    "entry",
    [
        layer(filled={"2": float("inf")}),
        layer(filled={"-1": 0.0}),
        layer(filled=[0.0]),
        layer(unread=[2, 1]),
        layer(unread="12"),
    ],
)
def test_malformed_fillings_are_refused(entry: dict[str, object]) -> None:
    with pytest.raises(DataError, match="malformed"):
        Recipe.from_dict(entry)


def test_a_recipe_of_an_older_record_can_be_read() -> None:
    entry = layer()
    del entry["0"]["filled"], entry["0"]["unread"]  # type: ignore[attr-defined]
    assert Recipe.from_dict(entry).layers["0"].filled == {}
