"""Clean data: taken from whatever loader the user has, checked once, kept in memory.

A few hundred images fit, and holding them makes every later step independent of the loader: its
shuffling, its workers and its random augmentation act once, while it is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, UnsupportedModelError
from ..utils.tensors import placement

_IMAGE_KEYS = ("image", "images", "pixel_values", "x", "input", "inputs", "data")

_ENOUGH = 100  # labelled images that do, however many classes there are

_RENAMED = 0.3  # share of the images, and 1 / sqrt(images) more: guessing gains up to .34 of 50

_ALONE = 0.05  # of the logits' scale: more than any precision's rounding

_LABEL_KEYS = ("label", "labels", "target", "targets", "y")


@dataclass(frozen=True)
class CleanData:
    """Clean images (N, C, H, W), normalised as the model expects, and labels (N,) or None."""

    images: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        _check_images(self.images)
        if self.labels is not None:
            _check_labels(self.labels, len(self.images))
            object.__setattr__(self, "labels", self.labels.reshape(-1).long())

    def __len__(self) -> int:
        return len(self.images)

    @property
    def targets(self) -> Tensor:
        """The labels (N,), int64; an error where the loader gave none."""
        if self.labels is None:
            raise DataError(
                "expected labelled clean images, got images alone; give batches (images, labels), "
                "or choose a criterion and a selector that need no labels"
            )
        return self.labels

    @classmethod
    def collect(
        cls, clean: CleanData | Iterable[Any], *, near: nn.Module | None = None
    ) -> CleanData:
        """Read a loader to its end; what comes back lies on the CPU.

        Args:
            clean: batches (images, labels, ...), (images,), images alone, or dictionaries with one
                of the usual keys (image, pixel_values, label, target, ...). Images: (B, C, H, W).
            near: a model on whose device the images are put, see `near`.

        Raises:
            DataError: nothing in it, shapes that differ, labels that are no integers, NaN or inf.
        """
        if near is not None:
            return (clean if isinstance(clean, CleanData) else cls.collect(clean)).near(near)
        if isinstance(clean, CleanData):
            labels_there = clean.labels is not None and clean.labels.device.type != "cpu"
            plain = not clean.images.requires_grad and not clean.images.is_inference()
            if clean.images.device.type == "cpu" and not labels_there and plain:
                return clean
            own = clean.images.detach().cpu()
            # one of inference mode can be copied and not be made another
            own = own.clone() if own.is_inference() else own
            return cls(own, None if clean.labels is None else clean.labels.cpu())
        if isinstance(clean, Tensor):
            raise DataError(
                "expected a loader (an iterable of batches), got a tensor; "
                "wrap it: CleanData(images, labels)"
            )
        images: list[Tensor] = []
        labels: list[Tensor] = []
        for number, batch in enumerate(clean):
            x, y = _unpack(batch, number)
            if images and x.shape[1:] != images[0].shape[1:]:
                raise DataError(
                    f"expected images of shape {tuple(images[0].shape[1:])} as in batch 0, got "
                    f"{tuple(x.shape[1:])} in batch {number}; resize them to one size"
                )
            if (y is None) != (not labels) and images:
                raise DataError(f"batch {number}: some batches have labels and some have none")
            images.append(x.detach().cpu())
            if y is not None:
                labels.append(y.detach().cpu().reshape(-1))
        if not images:
            raise DataError("the clean loader is empty; give at least a few images per class")
        return cls(torch.cat(images), torch.cat(labels).long() if labels else None)

    def near(self, model: nn.Module) -> CleanData:
        """Images on the model's device, if an eighth of what is free there holds them; labels not.

        No pass over them then copies any. Where they do not fit they lie on the CPU.
        """
        device = placement(model)["device"]
        size = self.images.numel() * self.images.element_size()
        if self.images.device != device and size > _free(device) / 8:
            device = torch.device("cpu")
        labels = None if self.labels is None else self.labels.cpu()
        return self._checked(self.images.to(device), labels)

    @classmethod
    def _checked(cls, images: Tensor, labels: Tensor | None) -> CleanData:
        """Images and labels that were looked at before: doing so again makes a GPU wait."""
        made = object.__new__(cls)
        object.__setattr__(made, "images", images)
        object.__setattr__(made, "labels", labels)
        return made

    def check_against(self, model: nn.Module) -> int:
        """Run the model on two images; return its number of classes.

        Raises:
            UnsupportedModelError: NaN or inf in its weights or logits; output not (N, classes).
            DataError: it does not accept these images; labels out of range, too few, all alike.
        """
        state = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
        weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        # a buffer may hold -inf, as the mask of causal attention does
        finite = [
            torch.isfinite(tensor).all() if name in weights else ~torch.isnan(tensor).any()
            for name, tensor in state.items()
        ]
        here = placement(model)["device"]
        # one wait for a GPU, not one a tensor
        sound = torch.stack([each.to(here) for each in finite]).tolist() if finite else []
        for name, good in zip(state, sound, strict=True):
            if not good:
                raise UnsupportedModelError(
                    f"the model's {name!r} holds NaN or inf; it cannot be scored. Check how the "
                    "checkpoint was loaded"
                )
        images = self.images[:2].to(**placement(model)).clone()
        written = images._version
        try:
            with torch.no_grad():
                logits = model(images)
        except (
            AssertionError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise DataError(
                f"the model does not accept images of shape {tuple(self.images.shape[1:])}: "
                f"{error}. Give images of the channels and size that it was trained on"
            ) from error
        if images._version != written:
            raise UnsupportedModelError(
                "the model writes into the images that it is given, so that they are others the "
                "next time; have its forward pass work on a copy (x = x - mean in place of x.sub_)"
            )
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UnsupportedModelError(
                f"expected a classifier with output (N, classes), got {found}; wrap the model so "
                "that its forward returns the logits alone"
            )
        if not torch.isfinite(logits).all():
            raise UnsupportedModelError("the model's logits hold NaN or inf on clean images")
        classes = logits.shape[1]
        if classes < 2:
            raise UnsupportedModelError("expected at least two classes, got an output of width 1")
        if self.labels is not None:
            self._check_coverage(classes)
        return classes

    def check_repeatable(self, model: nn.Module) -> None:
        """The model, in eval mode, must say of an image the same alone and beside another one.

        Raises:
            UnsupportedModelError: it does not, so that nothing measured on it would mean anything.
        """
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                raise UnsupportedModelError(
                    f"{name!r} is a BatchNorm without running statistics, so that what the model "
                    "says of an image depends on the images beside it; have it keep statistics "
                    "(track_running_stats=True) and estimate them on training images first"
                )
        with torch.no_grad():
            images = self.images[:2].to(**placement(model))
            beside, alone = model(images)[:1], model(images[:1])
        gap = float((alone - beside).abs().max() / beside.abs().max().clamp_min(1e-12))
        if not gap <= _ALONE:
            raise UnsupportedModelError(
                "what the model says of an image changes with chance, or with the images beside it "
                f"(logits by {gap:.0%}); make its forward pass repeatable in eval mode"
            )

    def check_order(self, predicted: Tensor) -> None:
        """The labels must be in the order of the model's classes, not in another one.

        Each image is given the label that most *others* have of which the model says the same. If
        that is right far more often than what the model says, the classes only have other numbers,
        and whatever is done with these labels teaches the model wrong ones.

        Args:
            predicted: what the model says of each image, (N,).

        Raises:
            DataError: they are in another order.
        """
        labels = self.targets
        wrong = predicted != labels
        rows, row = predicted.unique(return_inverse=True)
        columns, column = labels.unique(return_inverse=True)
        table = torch.zeros(len(rows), len(columns) + 1)  # one more: a second best there always is
        table.index_put_((row, column), torch.ones(len(labels)), accumulate=True)
        (most, second), best = table.topk(2).values.T, table.argmax(1)
        # an image does not vouch for itself
        vouched = (best[row] == column) & (most[row] - 1 > second[row])
        right, renamed = 1 - wrong.float().mean(), vouched.float().mean()
        if renamed - right <= _RENAMED + len(labels) ** -0.5:
            return
        said = predicted[wrong].mode().values
        raise DataError(
            f"the model gets {right:.0%} of the clean images right, but would get {renamed:.0%} if "
            f"its classes had other numbers: what it calls {said} is mostly labelled "
            f"{labels[predicted == said].mode().values}. The labels are not in the order of the "
            "model's classes; give them in the order that it was trained with"
        )

    def _check_coverage(self, classes: int) -> None:
        labels = self.targets
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise DataError(
                f"expected labels in [0, {classes}), got {low if low < 0 else high}; "
                "is the loader's dataset the one that the model was trained on?"
            )
        if low == high:
            raise DataError(
                f"all clean images have label {low}; give images of several classes, or the "
                "score would only say what that one class needs"
            )
        if len(self) < min(classes, _ENOUGH):
            raise DataError(
                f"expected at least one clean image per class ({classes}), or {_ENOUGH} where "
                f"there are more classes, got {len(self)}; a few hundred in all is usual"
            )

    def take(self, indices: Tensor) -> CleanData:
        """The images (and labels) at `indices` (K,)."""
        return self._checked(
            self.images[indices], None if self.labels is None else self.labels[indices]
        )

    def few(self) -> Tensor:
        """Up to 8 of the images, (N, C, H, W), to try something on."""
        return self.images[:8]

    def joined(self, other: CleanData) -> CleanData:
        """These images and those; with labels if both have them."""
        labels = None
        if self.labels is not None and other.labels is not None:
            labels = torch.cat([self.labels, other.labels])
        images = torch.cat([self.images, other.images.to(self.images.device)])
        return self._checked(images, labels)

    def split(self, *shares: float, seed: int = 0) -> list[CleanData]:
        """Cut into disjoint parts of the given shares, class by class where labels are known.

        Raises:
            DataError: the shares do not sum to 1, or a part would be empty.
        """
        if any(share <= 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
            raise DataError(f"expected positive shares that sum to 1, got {shares}")
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator)
        groups = [order]
        if self.labels is not None:
            classes, labels = self.labels.unique(), self.labels[order]
            turns = torch.randperm(len(classes), generator=generator)
            groups = [order[labels == label] for label in classes[turns]]
        # each class is cut by itself; what rounding leaves over goes to the part furthest behind
        owed = [0.0] * len(shares)
        pieces: list[list[Tensor]] = [[] for _ in shares]
        for group in groups:
            due = [share * len(group) for share in shares]
            sizes = [math.floor(wanted + 1e-6) for wanted in due]
            owed = [o + wanted - size for o, wanted, size in zip(owed, due, sizes, strict=True)]
            cut = [part for part in range(len(shares)) if due[part] - sizes[part] > 1e-6]
            cut.sort(key=lambda part: -owed[part])
            for part in cut[: len(group) - sum(sizes)]:
                sizes[part] += 1
                owed[part] -= 1
            for piece, indices in zip(pieces, group.split(sizes), strict=True):
                piece.append(indices)
        parts = [torch.cat(piece) for piece in pieces]
        if any(len(part) == 0 for part in parts):
            raise DataError(f"{len(self)} clean images are too few to split into {shares}")
        return [self.take(part.sort().values) for part in parts]

    def batches(
        self, size: int, generator: torch.Generator, *, replacement: bool = False, shift: int = 0
    ) -> Iterator[CleanData]:
        """One epoch in random order; a single image left over joins the batch before it.

        Args:
            replacement: draw each image independently, all batches of full size.
            shift: largest random translation in pixels; > 0 also mirrors at random.
        """
        count = len(self)
        if replacement:
            order = torch.randint(count, (-(-count // size) * size,), generator=generator)
        else:
            order = torch.randperm(count, generator=generator)
        chunks = list(order.split(size))
        if len(chunks) > 1 and len(chunks[-1]) == 1:
            chunks[-2:] = [torch.cat(chunks[-2:])]  # batch statistics need two images
        for chunk in chunks:
            part = self.take(chunk)
            yield part if shift == 0 else part._jittered(shift, generator)

    def _jittered(self, shift: int, generator: torch.Generator) -> CleanData:
        """Random translation (zero padding, so grey for usual normalisations) and mirroring."""
        count, _, height, width = self.images.shape
        padded = nn.functional.pad(self.images, (shift,) * 4)
        top = torch.randint(2 * shift + 1, (count, 1), generator=generator)
        left = torch.randint(2 * shift + 1, (count, 1), generator=generator)
        rows = (top + torch.arange(height))[:, None, :, None]
        columns = left + torch.arange(width)
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)[:, None, None, :]
        channels = torch.arange(padded.shape[1])[None, :, None, None]
        images = padded[torch.arange(count)[:, None, None, None], channels, rows, columns]
        return self._checked(images, self.labels)


def _free(device: torch.device) -> float:
    """Bytes that are free there; none where that cannot be asked."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _unpack(batch: Any, number: int) -> tuple[Tensor, Tensor | None]:
    images: Any = batch
    labels: Any = None
    if isinstance(batch, Mapping):
        images = next((batch[key] for key in _IMAGE_KEYS if key in batch), None)
        labels = next((batch[key] for key in _LABEL_KEYS if key in batch), None)
    elif isinstance(batch, (tuple, list)) and batch:
        images = batch[0]
        labels = batch[1] if len(batch) > 1 else None
    if not isinstance(images, Tensor):
        keys = f" with keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else ""
        raise DataError(
            f"batch {number}: expected (images, labels), images, or a dictionary with one of "
            f"{_IMAGE_KEYS}, got {type(batch).__name__}{keys}"
        )
    if images.ndim != 4:
        raise DataError(
            f"batch {number}: expected images (B, C, H, W), got shape {tuple(images.shape)}"
        )
    if labels is not None:
        try:
            labels = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"batch {number}: expected {len(images)} integer labels, one an image ({error}); "
                "class indices are needed, not names"
            ) from error
        _check_labels(labels, len(images))
    return images, labels


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or len(images) == 0:
        raise DataError(f"expected images (N, C, H, W) with N > 0, got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise DataError(
            f"expected floating-point images, normalised as the model expects, got {images.dtype}"
        )
    if not torch.isfinite(images).all():
        bad = int((~torch.isfinite(images.flatten(1)).all(1)).sum())
        raise DataError(f"{bad} of {len(images)} clean images hold NaN or inf; drop or repair them")


def _check_labels(labels: Tensor, count: int) -> None:
    if labels.is_floating_point() or labels.is_complex() or labels.numel() != count:
        raise DataError(
            f"expected {count} integer labels, one an image, got shape {tuple(labels.shape)} of "
            f"{labels.dtype}; class indices are needed, not one-hot rows or probabilities"
        )
