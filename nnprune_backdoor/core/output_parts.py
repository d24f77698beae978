"""Parts of a model's output, and the hooks that take the logits out of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError

Step = tuple[str, Any]  # how an entry is reached: "item" and a key or index, "attribute" and a name
Path = tuple[Step, ...]

LOGITS = "logits"
IMAGES = "pixel_values"  # what models of `transformers` call their images
_DEEPEST = 4  # nested containers that are looked into
_LISTED = 6  # entries that a message names


@dataclass(frozen=True)
class TakeLogits:
    """A forward hook: of the model's output only the tensor at this path."""

    path: Path

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Tensor:
        for kind, name in self.path:
            output = getattr(output, name) if kind == "attribute" else output[name]
        taken: Tensor = output
        return taken


@dataclass(frozen=True)
class TakeByName:
    """A forward hook: of the model's output only the tensor of this name (`logits_named`)."""

    name: str | int

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Tensor:
        found = output
        for part in str(self.name).split("."):
            try:
                if isinstance(found, (tuple, list)) and part.isdecimal():
                    found = found[int(part)]
                else:
                    found = found[part] if isinstance(found, Mapping) else getattr(found, part)
            except (LookupError, AttributeError):
                found = None
                break
        if not isinstance(found, Tensor):
            raise UnsupportedModelError(
                f"the model's output has no tensor named {self.name!r}; it is "
                f"{type(output).__name__} with {listed(dict(entries(output)))}"
            )
        return found


@dataclass(frozen=True)
class ByKeyword:
    """A forward pre-hook: the images go in under the name that the model has for them."""

    name: str = IMAGES

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return ((), {**kwargs, self.name: args[0]}) if args else (args, kwargs)


@dataclass(frozen=True)
class AsTwoLogits:
    """A forward hook: one logit z an image becomes two, -z / 2 and z / 2.

    Their softmax is (1 - sigmoid(z), sigmoid(z)), and their cross-entropy the binary one of z.
    """

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        z = output.reshape(-1, 1)
        return torch.cat([-z, z], 1) / 2


def entries(value: object, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """All tensors in containers and in attributes of plain objects, with their paths."""
    if isinstance(value, Tensor):
        yield path, value
    if isinstance(value, (Tensor, nn.Module, str, bytes, type)) or len(path) == _DEEPEST:
        return
    inner: dict[Step, object]
    if isinstance(value, Mapping):
        inner = {("item", key): entry for key, entry in value.items()}
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        inner = {("attribute", name): getattr(value, name) for name in value._fields}
    elif isinstance(value, (tuple, list)):
        inner = {("item", index): entry for index, entry in enumerate(value)}
    else:
        inner = (
            {("attribute", name): entry for name, entry in vars(value).items()}
            if hasattr(value, "__dict__")
            else {}
        )
        if hasattr(value, LOGITS):  # a property or a slot
            inner["attribute", LOGITS] = getattr(value, LOGITS)
    for step, entry in inner.items():
        yield from entries(entry, (*path, step))


def listed(found: Mapping[Path, Tensor]) -> str:
    """Entries with their shapes, for messages."""
    parts = [
        "".join(f".{name}" if kind == "attribute" else f"[{name!r}]" for kind, name in path)
        + f" {tuple(tensor.shape)}"
        for path, tensor in found.items()
    ]
    more = [f"{len(parts) - _LISTED} more"] if len(parts) > _LISTED else []
    return ", ".join([*parts[:_LISTED], *more]) or "no tensor"
