"""What Torch-Pruning 1.6.1 gets wrong in the graph that it traces, set right from outside.

It asks autograd for the sizes of views and splits by names that PyTorch has given up, and guesses
instead. While somebody holds `MENDED`, every graph that is built is corrected from the shapes that
autograd does know, before it is first used:

- each chunk of a split or unbind becomes a node of its own, in the order of the chunks: by itself
  Torch-Pruning takes the first reader for that of the first chunk, and so on;
- sizes of splits and concatenations are those of the tensors, and offsets follow when they are cut;
- views that keep the channels as they are map them one to one, not as if they were flattened; so do
  expansions that repeat no heads of attention.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch_pruning as tp

from .patching import Wrapping

_OP = tp.ops.OPTYPE


def _make(plain: Callable[[Any], None]) -> Callable[[Any], None]:
    def init_shape_information(graph: tp.DependencyGraph) -> None:
        sizes = _mend(graph)
        plain(graph)
        for node, chunks in sizes.items():
            node.module.split_sizes = chunks

    return init_shape_information


# runs when the edges of a graph are known and nothing has been read from it
MENDED = Wrapping(tp.dependency.shape_infer, "init_shape_information", _make)


def _mend(graph: tp.DependencyGraph) -> dict[Any, list[int]]:
    """Correct types, edges and sizes of a new graph; the sizes of its splits."""
    sizes = {}
    for node in list(graph.module2node.values()):
        if node.type in (_OP.RESHAPE, _OP.EXPAND) and _keeps_channels(node):
            node.type = _OP.ELEMENTWISE
        elif node.type == _OP.CONCAT:
            _measure(node)
        elif node.type in (_OP.SPLIT, _OP.UNBIND) and _part(graph, node):
            chunks = _chunks(node)
            if chunks is not None:
                node.module.__class__ = _Split
                sizes[node] = chunks
    for node in graph.module2node.values():
        node.dependencies.clear()
    graph._build_dependency(graph.module2node)
    graph._2d_4d = True  # "views may flatten"; those which do not are no views any more
    return sizes


class _Split(tp.ops._SplitOp):  # type: ignore[misc] # the package is untyped
    """A split whose offsets follow its sizes: the plain one keeps those of before a prune."""

    @property
    def offsets(self) -> list[int]:
        return [0, *itertools.accumulate(self.split_sizes)]

    @offsets.setter
    def offsets(self, _: Any) -> None:
        pass


def _shape(grad_fn: Any, number: int = 0) -> tuple[int, ...]:
    """Of an output of an operation."""
    return tuple(grad_fn._input_metadata[number].shape)  # inputs of the backward pass


def _keeps_channels(node: Any) -> bool:
    after = _shape(node.grad_fn)
    before = tuple(node.grad_fn._saved_self_sym_sizes)
    if node.type == _OP.RESHAPE:
        return not (_flattens(before, after) or _flattens(after, before))
    # grouped attention repeats its heads: (N, heads, 1, L, d) -> (N, heads, n, L, d)
    repeats = len(before) == 5 and before[2] == 1 and after[2] > 1
    return not (repeats and before[:2] + before[3:] == after[:2] + after[3:])


def _flattens(before: Sequence[int], after: Sequence[int]) -> bool:
    """(N, C, H, W) -> (N, C * H * W)."""
    one = len(after) == 2 and len(before) > 3 and after[0] == before[0]
    return one and before[1] > 1 and math.prod(before[2:]) > 1


def _measure(node: Any) -> None:
    """Give a concatenation the sizes of its parts; if some are not known, no channels move."""
    parts = [(part, number) for part, number in node.grad_fn.next_functions]
    known = [part is not None and len(part._input_metadata) > 0 for part, _ in parts]
    if not all(known) or len(parts) != len(node.inputs):
        node.type = _OP.ELEMENTWISE
        return
    shapes = [_shape(part, number) for part, number in parts]
    axis = _axis(node.grad_fn._saved_dim, len(shapes[0]))
    node.module.concat_sizes = [shape[axis] for shape in shapes]


def _chunks(node: Any) -> list[int] | None:
    """Sizes of the chunks of a split."""
    grad_fn = node.grad_fn
    if node.type != _OP.SPLIT:
        return None
    count = len(grad_fn._input_metadata)
    axis = _axis(grad_fn._saved_dim, len(grad_fn._saved_self_sym_sizes))
    return [_shape(grad_fn, number)[axis] for number in range(count)]


def _axis(dim: int, dimensions: int) -> int:
    """A dimension counted from the end is saved as if it were unsigned."""
    return (dim - 2**64 if dim >= 2**63 else dim) % dimensions


def _part(graph: tp.DependencyGraph, node: Any) -> bool:
    """Put a node for each chunk between a split and its readers; False where some are unknown."""
    readers = list(dict.fromkeys(node.outputs))
    edges = {reader: _edges(node, reader) for reader in readers}
    if any(len(found) != node.outputs.count(reader) for reader, found in edges.items()):
        return False  # a layer that runs several times has one node, of its last call
    chunks = [_between(graph, node) for _ in node.grad_fn._input_metadata]
    for reader, numbers in edges.items():
        following = iter(numbers)
        reader.inputs = [chunks[next(following)] if i is node else i for i in reader.inputs]
        for number in numbers:
            chunks[number].add_output(reader)
    node.outputs = chunks
    return True


def _edges(node: Any, reader: Any) -> list[int]:
    """Which chunks a reader takes, one by one."""
    if reader.grad_fn is None:
        return []
    return [number for source, number in reader.grad_fn.next_functions if source is node.grad_fn]


def _between(graph: tp.DependencyGraph, node: Any) -> Any:
    chunk = tp.dependency.Node(tp.ops._ElementWiseOp(graph._op_id, "chunk"), None)
    graph._op_id += 1
    graph.module2node[chunk.module] = chunk
    chunk.add_input(node)
    return chunk
