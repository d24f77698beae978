"""A purified model is a plain module: the usual exporters take it (docs/saving.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.criteria import Arbitrary
from helpers.images import noise_images
from helpers.networks import build
from nnprune_backdoor import CleanData, purify
from nnprune_backdoor.selectors import LowestFraction

IMAGES = noise_images(4, seed=9)


@pytest.fixture(params=["test_resnet", "test_vit"], scope="module")
def smaller(request: pytest.FixtureRequest) -> nn.Module:
    """A purified CNN, and a purified ViT, each physically smaller."""
    model = build(request.param)
    clean = CleanData(noise_images(12))
    result = purify(model, clean, Arbitrary(), selector=LowestFraction(0.2), progress=False)
    assert result.removal is not None
    assert result.removal.after.parameters < result.removal.before.parameters
    return result.model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IMAGES)


@pytest.mark.slow
def test_torch_export_gives_the_same_logits(smaller: nn.Module, tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(smaller, (IMAGES[:2],), dynamic_shapes=({0: batch},))
    assert torch.equal(logits(program.module()), logits(smaller))


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_gives_the_same_logits(smaller: nn.Module) -> None:
    assert torch.equal(logits(torch.jit.trace(smaller, IMAGES[:2])), logits(smaller))


@pytest.mark.filterwarnings("ignore")  # of the exporter's own, which change with its versions
def test_onnx_gives_the_same_logits(smaller: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="ONNX needs: pip install onnx onnxscript")
    pytest.importorskip("onnxscript", reason="ONNX needs: pip install onnx onnxscript")
    evaluator = pytest.importorskip("onnx.reference", reason="ONNX needs: pip install onnx")
    path = tmp_path / "purified.onnx"
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    torch.onnx.export(smaller, (IMAGES[:2],), path, dynamic_shapes=shapes, dynamo=True)
    runner = evaluator.ReferenceEvaluator(str(path))
    (got,) = runner.run(None, {runner.input_names[0]: IMAGES.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), logits(smaller), atol=1e-4, rtol=1e-4)
