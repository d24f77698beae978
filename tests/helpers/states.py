"""What a model held before and after: weights, buffers, hooks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


def hooks_of(model: nn.Module) -> list[tuple[int, ...]]:
    """How many hooks of each kind hang on each module."""
    return [tuple(len(getattr(module, kind, ())) for kind in _HOOKS) for module in model.modules()]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the whole state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert not changed, f"changed: {changed}"
