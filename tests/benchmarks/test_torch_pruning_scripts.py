"""Torch-Pruning's example scripts with one line changed: they prune, and the network runs."""

from __future__ import annotations

import pytest
import torch

from benchmarks.torch_pruning_scripts import PIPELINES

# groups that are left unpruned; attention projections have no scored neuron
LEFT = {
    "torchvision_models/torchvision_pruning.py, MobileNetV3": {"unscored"},  # gates
    "timm_models/prune_timm_models.py, ViT": {"unscored"},
    "transformers/prune_timm_vit.py, whole heads": {"heads"},
    "transformers/prune_hf_vit.py": {"unscored"},
    "transformers/prune_hf_swin.py": {"misfit", "broken"},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", PIPELINES)
def test_the_script_prunes_with_our_importance(script: str) -> None:
    if "_hf_" in script:
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    outcome = PIPELINES[script]()
    assert outcome.logits == (1, 10)
    assert outcome.after < 0.85 * outcome.before
    assert set(outcome.skipped) <= LEFT.get(script, set())
