"""Models whose output is more than a tensor: find the logits in it, and take them alone.

Classifiers of `transformers` return an object with `.logits`; others return tuples or dicts. All
other code works on models that return the logits alone, so a private copy gets a hook that takes
them out. Names, layers and weights stay as they are, and the hook is taken off what is given back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import DataError, PurifyError, UnsupportedModelError
from ..utils.tensors import placement
from .copies import clone, frozen_copy
from .output_parts import (
    IMAGES,
    LOGITS,
    AsTwoLogits,
    ByKeyword,
    Path,
    TakeByName,
    TakeLogits,
    entries,
    listed,
)
from .trace import edges_of, nodes_before

_RESHAPING = ("View", "UnsafeView", "Squeeze", "Unsqueeze", "Select", "Slice", "Reshape", "Alias")
ONE_LABEL = (
    "Detectors and segmentation networks are not purified: a trigger is judged here by the one "
    "label that it turns an image to"
)
_ALONE = (
    "have its forward return the logits alone, or in a dict under the name 'logits', or say which "
    "they are: core.outputs.logits_named(model, name)"
)


_OURS = (TakeLogits, TakeByName, ByKeyword, AsTwoLogits)


def logits_named(model: nn.Module, name: str | int) -> nn.Module:
    """A copy of a model that returns this part of its output alone, for outputs of several tensors.

    Give it in place of the model where the logits cannot be told by what they are. What is made of
    it returns them alone as well.

    Args:
        model: its forward gives a dict, a tuple or an object; it is left as it was.
        name: the key, index or attribute of its logits; with dots where they lie deeper.

    Raises:
        UnsupportedModelError: it cannot be copied. When it runs: there is no such tensor.
    """
    named = clone(model)
    named.register_forward_hook(TakeByName(name))
    return named


def run_once(model: nn.Module, images: Tensor) -> object:
    """What the model gives for images (N, C, H, W), which it must not write into.

    Raises:
        DataError: it does not accept them.
        UnsupportedModelError: it writes into them.
    """
    written = images._version
    try:
        with torch.no_grad():
            output: object = model(images)
    except PurifyError:
        raise
    except (
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise DataError(
            f"the model does not accept images of shape {tuple(images.shape[1:])}: "
            f"{error}. Give images of the channels and size that it was trained on"
        ) from error
    if images._version != written:
        raise UnsupportedModelError(
            "the model writes into the images that it is given, so that they are others the "
            "next time; have its forward pass work on a copy (x = x - mean in place of x.sub_)"
        )
    return output


def take_images_by_name_(model: nn.Module) -> None:
    """Have a copy take images as its first argument where its forward wants them by name."""
    if wants_name(model):
        model.register_forward_pre_hook(ByKeyword(), with_kwargs=True)


def give_logits_alone_(model: nn.Module, images: Tensor) -> object:
    """Have a copy, in eval mode, return its logits alone; two of them where there is one an image.

    What it then returns for two of the images is given back, so that it need not be run again.

    Args:
        model: nothing is done where its output is a tensor of several logits an image.
        images: (N, C, H, W), two are enough; the model is run on two.

    Raises:
        DataError: it does not accept these images.
        UnsupportedModelError: its output holds no logits, or several tensors that could be them, or
            is the sigmoid of one.
    """
    images = images[:2].to(**placement(model)).detach()
    output = run_once(model, images.clone())
    if not isinstance(output, Tensor):
        take = TakeLogits(_find(model, images, output))
        model.register_forward_hook(take)
        output = take(model, images, output)
    if isinstance(output, Tensor) and _is_one_an_image(output):
        if _ends_in_sigmoid(model, images):
            raise UnsupportedModelError(
                "the model gives the sigmoid of its one logit, in which large logits are all alike "
                "and have no gradient; have it return the logit itself (nn.Identity() in place of "
                "its last nn.Sigmoid())"
            )
        as_two = AsTwoLogits()
        model.register_forward_hook(as_two)
        output = as_two(model, images, output)
    return output


def gives_logits(output: object) -> bool:
    """Whether this, of a model, is used as it is: a tensor, of more than one number an image."""
    return isinstance(output, Tensor) and not _is_one_an_image(output)


def _is_one_an_image(output: Tensor) -> bool:
    return output.is_floating_point() and (output.ndim == 1 or output.shape[1:] == (1,))


def _ends_in_sigmoid(model: nn.Module, images: Tensor) -> bool:
    """Whether the last thing that it computes, reshaping aside, is a sigmoid."""
    with torch.inference_mode(False), torch.enable_grad():
        output: Tensor = model(images.clone().requires_grad_().clone())
    node = output.grad_fn
    while node is not None and node.name().startswith(_RESHAPING):
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith("Sigmoid")


def same_hooks(model: nn.Module, like: nn.Module) -> nn.Module:
    """The model itself, or where another one has hooks of this module a copy that has them too."""
    hooks = _hooks(like)
    if hooks == _hooks(model):
        return model
    model = clone(model)
    for hook in hooks:
        if isinstance(hook, ByKeyword):
            model.register_forward_pre_hook(hook, with_kwargs=True)
        else:
            model.register_forward_hook(hook)
    return model


def give_same_output_(model: nn.Module, as_given: nn.Module) -> None:
    """Take the hooks of this module off a copy, unless the model that it is of has them too."""
    if _hooks(as_given):
        return
    for hooks in (model._forward_hooks, model._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, _OURS)]:
            del hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)


def logits_alone(model: nn.Module, images: Tensor) -> nn.Module:
    """A frozen copy, in eval mode, that takes images as its first argument and returns logits.

    Raises:
        DataError, UnsupportedModelError: see `give_logits_alone_` and `frozen_copy`.
    """
    frozen = frozen_copy(model)
    take_images_by_name_(frozen)
    give_logits_alone_(frozen, images)
    return frozen


def _hooks(model: nn.Module) -> list[TakeLogits | TakeByName | ByKeyword | AsTwoLogits]:
    """The hooks of this module that a model has."""
    hooks = (*model._forward_hooks.values(), *model._forward_pre_hooks.values())
    return [hook for hook in hooks if isinstance(hook, _OURS)]


def wants_name(model: nn.Module) -> bool:
    """Whether forward takes `pixel_values`, not as its first argument, and no hook sees to it."""
    if any(isinstance(hook, ByKeyword) for hook in model._forward_pre_hooks.values()):
        return False
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return False
    images = parameters.get(IMAGES)
    if images is None:
        return False
    return images.kind is images.KEYWORD_ONLY or next(iter(parameters)) != IMAGES


def _find(model: nn.Module, images: Tensor, output: object) -> Path:
    """Where the logits are: by their name, or since nothing else can be them."""
    found: dict[Path, Tensor] = {}
    for path, tensor in entries(output):
        if not any(tensor is other for other in found.values()):
            found[path] = tensor
    named = [path for path in found if path[-1][1] == LOGITS]
    if len(named) == 1:
        return named[0]
    if not named and len(found) == 1:
        return next(iter(found))
    fitting = {path: found[path] for path in named or found if _fits(found[path], len(images))}
    if len(fitting) == 1:
        return next(iter(fitting))
    if not fitting:
        raise UnsupportedModelError(
            f"the model returns {type(output).__name__} with {listed(found)}, of which nothing "
            f"is (N, classes); {_ALONE}. {ONE_LABEL}"
        )
    last = _last(model, images, list(fitting))
    if last is None:
        raise UnsupportedModelError(
            f"the model returns {type(output).__name__} in which several tensors could be the "
            f"logits: {listed(fitting)}; {_ALONE}"
        )
    return last


def _fits(tensor: Tensor, count: int) -> bool:
    """Whether it could be logits of so many images."""
    return (
        tensor.is_floating_point()
        and tensor.ndim == 2
        and len(tensor) == count
        and tensor.shape[1] >= 2
    )


def _last(model: nn.Module, images: Tensor, paths: list[Path]) -> Path | None:
    """The one tensor that is computed from all others; None if that cannot be told.

    Features are what logits are computed from. What the images do not reach is left out, and so
    are probabilities, which are computed from logits in turn.
    """
    with torch.inference_mode(False), torch.enable_grad():
        output = model(images.clone().requires_grad_().clone())
    found = dict(entries(output))
    tensors = {path: found[path] for path in paths if path in found}
    reached = {path: tensor for path, tensor in tensors.items() if tensor.requires_grad}
    logits = {
        path: tensor
        for path, tensor in reached.items()
        if not any(_is_probability(tensor, other) for other in reached.values())
    }
    for path, tensor in logits.items():
        others = [other for key, other in logits.items() if key != path]
        before = nodes_before(edges_of(tensor))
        earlier = all(edges_of(other)[0].node in before for other in others)
        if earlier and all(other.shape != tensor.shape for other in others):
            return path
    return None


def _is_probability(tensor: Tensor, logits: Tensor) -> bool:
    """Whether a tensor is softmax, its logarithm or sigmoid of another one."""
    if tensor is logits or tensor.shape != logits.shape:
        return False
    functions: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: x.softmax(1),
        lambda x: x.log_softmax(1),
        torch.sigmoid,
    )
    return any(torch.allclose(tensor, f(logits), rtol=1e-3, atol=1e-5) for f in functions)
