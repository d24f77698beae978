"""What is not scored is said, by kind and number."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from helpers.images import noise_images
from helpers.networks import build
from helpers.states import assert_same_state, state_of
from nnprune_backdoor.core.sites import find_sites
from nnprune_backdoor.core.unscored import unscored


def lines(model: nn.Module) -> tuple[str, ...]:
    model.eval()
    images = noise_images(2)
    before = state_of(model)
    found = unscored(model, images, find_sites(model, images))
    assert_same_state(before, state_of(model))
    return found


class Classifier(nn.Module):
    """A convolution, something else, a linear layer."""

    def __init__(self, middle: nn.Module, width: int) -> None:
        super().__init__()
        self.conv, self.middle, self.fc = nn.Conv2d(3, 8, 3), middle, nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.conv(x).relu())
        x = x if x.ndim == 2 else x.flatten(2).mean(2)
        logits: Tensor = self.fc(x)
        return logits


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 5, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lstm(x.flatten(2).mT[:, ::90])[0]
        return out[:, -1]


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.cell(x.mean((2, 3)))
        return out


class Own(nn.Module):
    """A weight of its own, normalised before it multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6))
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return (x.mean((2, 3)) @ (F.normalize(self.weight, dim=0) * self.scale)).relu()


class Added(nn.Module):
    """A weight that is only added, and one that is looked up and added."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(8, 30, 30))
        self.table = nn.Parameter(torch.randn(9, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.position + self.table[3].reshape(8, 1, 1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).mT[:, ::30]
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out.mT


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(8, 8, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        out: Tensor = self.pair(x, x)
        return out


class Aside(nn.Module):
    """A transposed convolution whose result is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(8, 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.up(x)
        return x


class Uncalled(nn.Module):
    """A layer whose weight is used without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.mean((2, 3)), self.inner.weight).relu()


@pytest.mark.parametrize(
    ("middle", "width", "said"),
    [
        (nn.Sequential(), 8, []),
        (
            nn.Sequential(nn.ConvTranspose2d(8, 64, 2), nn.ReLU(), nn.ConvTranspose2d(64, 32, 2)),
            32,
            ["96 channels of 2 ConvTranspose2d layers"],
        ),
        (
            nn.Sequential(nn.Flatten(2), nn.ConvTranspose1d(8, 5, 2), nn.BatchNorm1d(5)),
            5,
            ["5 channels of 1 ConvTranspose1d layer"],
        ),
        (
            nn.Sequential(nn.Unflatten(2, (1, 30)), nn.ConvTranspose3d(8, 5, 2)),
            5,
            ["5 channels of 1 ConvTranspose3d layer"],
        ),
        (
            parametrizations.weight_norm(nn.ConvTranspose2d(8, 5, 2)),
            5,
            ["5 channels of 1 ConvTranspose2d layer"],
        ),
        (Recurrent(), 10, ["20 channels of 1 LSTM layer"]),
        (Cell(), 6, ["6 channels of 1 GRUCell layer"]),
        (Own(), 6, ["the weights of 1 Own layer"]),
        (Attention(), 8, ["32 channels of 1 attention layer"]),
        (Pair(), 7, ["7 channels of 1 Bilinear layer"]),
        (Uncalled(), 6, ["6 channels of 1 Linear layer"]),
        (Added(), 8, []),
        (Aside(), 8, []),
    ],
)
def test_each_kind_is_counted(middle: nn.Module, width: int, said: list[str]) -> None:
    torch.manual_seed(0)
    found = lines(Classifier(middle, width))
    assert list(found) == said


def test_attention_and_gates() -> None:
    single = timm.create_model("test_vit", num_classes=10, img_size=32, num_heads=1)
    blocks = [module for name, module in single.named_modules() if name.endswith(".attn")]
    width = 4 * single.embed_dim * len(blocks)
    assert lines(single) == (
        f"{width:,} channels of {2 * len(blocks)} projection layers inside attention",
    )
    gated = timm.create_model("seresnet18", num_classes=10)
    gates = [m for n, m in gated.named_modules() if ".se.fc" in n]
    channels = sum(m.out_channels for m in gates)
    assert lines(gated) == (f"{channels:,} channels of {len(gates)} layers inside gates",)
    assert lines(build("test_resnet")) == ()


@pytest.mark.parametrize("name", ["test_vit", "beit_base_patch16_224"])
def test_what_only_computes_heads_is_scored_with_them(name: str) -> None:
    """BEiT uses the weight of its fused projection without calling the layer."""
    settings = {} if name == "test_vit" else {"embed_dim": 16, "depth": 1, "num_heads": 2}
    assert lines(timm.create_model(name, num_classes=10, img_size=32, **settings)) == ()


def test_what_also_serves_something_else_than_heads_is_not_scored_with_them() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
            self.aside = nn.Linear(24, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(2).mT[:, ::30]
            qkv = self.qkv(x)
            q, k, v = qkv.unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return (self.proj(heads) + self.aside(qkv)).mT

    middle = nn.Sequential(*(nn.Conv2d(8, 8, 1) for _ in range(3)), Both())
    assert lines(Classifier(middle, 8)) == ("32 channels of 2 projection layers inside attention",)


def test_a_bare_product_that_gives_the_logits_is_the_classifier() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(8, 4))
            self.own = Own()
            self.back = nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.back(self.own(self.conv(x).relu())).relu() @ self.head

    assert lines(Bare()) == ("the weights of 1 Own layer",)
