"""Where a scan gives no probability."""

from __future__ import annotations

from torch import nn

from ..core.data import CleanData
from ..core.predictions import predict_labels

LARGEST = 64 * 64  # pixels of an image up to which the probability was measured
FEWEST_CLASSES = 5  # the suspected ones, and three to compare with
FEWEST_IMAGES = 100  # three in ten of them measure a success


def why_not_told(model: nn.Module, data: CleanData, classes: int) -> str | None:
    """Why no probability is given; None: one is."""
    height, width = data.images.shape[2:]
    if height * width > LARGEST:
        return (
            f"on images of {height} x {width} pixels small pictures send any network's images "
            "anywhere, and the probability was not measured there"
        )
    if classes < FEWEST_CLASSES:
        return f"{classes} classes leave too few labels to compare with"
    if len(data) < FEWEST_IMAGES:
        return f"{len(data)} images are too few to tell; give {FEWEST_IMAGES} or, better, 300"
    shares = predict_labels(model, data.images).bincount(minlength=classes) / len(data)
    if shares.max() > 0.8:
        return (
            f"the model calls {shares.max():.0%} of the images {int(shares.argmax())}; give images "
            "of all classes, normalised as it expects"
        )
    return None
