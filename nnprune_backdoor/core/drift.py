"""How far two networks' logits are apart, where they should be the same."""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def allowed_drift(dtype: torch.dtype) -> float:
    """Largest `logit_drift` of logits that count as equal."""
    return 1e-2 if dtype in _HALF else 1e-4


def logit_drift(expected: Tensor, logits: Tensor) -> float:
    """Largest difference, class by class relative to how far the logit varies between images.

    So one class whose logit is huge, such as -1e9 for a class that is masked, does not hide what
    happens to the others. A class that varies less than most is measured by what is usual; and
    since a network that answers nearly the same to all images still rounds, every class's scale is
    at least a tenth of its size (in half precision, its size).

    Args:
        expected: logits (N, classes); two images or more, or sizes alone are the scale.
        logits: of the same images.

    Returns:
        at least 0; NaN or inf where a difference is.
    """
    rounding = 1.0 if expected.dtype in _HALF else 0.1
    wanted, given = expected.double(), logits.double()
    sizes = wanted.abs().amax(0)
    spreads = wanted.amax(0) - wanted.amin(0)
    varying = spreads[spreads > 16 * torch.finfo(expected.dtype).eps * sizes]
    usual = varying.median() if len(varying) else spreads.new_zeros(())
    # what classes are masked with, most of them perhaps, is not the size of logits
    plain = sizes[sizes < 1000 * spreads]
    size = (plain if len(plain) else sizes).median()
    scales = torch.stack([spreads, usual.expand_as(spreads), rounding * sizes.clamp_min(size)])
    gaps = (given - wanted).abs().amax(0)
    return float((gaps / scales.amax(0).clamp_min(1e-12)).max())
