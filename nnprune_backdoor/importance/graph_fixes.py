"""Corrections of the graphs that Torch-Pruning 1.6.1 traces.

Torch-Pruning reads the sizes of views and splits from attributes that autograd no longer has, and
falls back to guesses. While an object holds `GRAPH_FIXES`, each new graph is corrected before its
first use, from the shapes that autograd does record:

- Each chunk of a split or unbind becomes a node. By itself, Torch-Pruning assigns chunks to their
  readers in the order in which it meets the readers.
- The sizes of splits and concatenations are those of the tensors, and the offsets of splits are
  updated when channels are pruned.
- Views that keep the channels, and expansions other than the repeated heads of grouped attention,
  map channels one to one. By itself, Torch-Pruning treats views as flattening.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch_pruning as tp

from .patching import Patch

_OP = tp.ops.OPTYPE


def _with_fixes(original: Callable[[Any], None]) -> Callable[[Any], None]:
    def init_shape_information(graph: tp.DependencyGraph) -> None:
        split_sizes = _fix(graph)
        original(graph)
        for node, sizes in split_sizes.items():
            node.module.split_sizes = sizes

    return init_shape_information


# this function runs when the edges of a graph are complete, before the graph is used
GRAPH_FIXES = Patch(tp.dependency.shape_infer, "init_shape_information", _with_fixes)


def _fix(graph: tp.DependencyGraph) -> dict[Any, list[int]]:
    """Correct node types, edges and sizes of concatenations; return the sizes of splits by node."""
    split_sizes = {}
    for node in list(graph.module2node.values()):
        if node.type in (_OP.RESHAPE, _OP.EXPAND) and _keeps_channels(node):
            node.type = _OP.ELEMENTWISE
        elif node.type == _OP.CONCAT:
            _set_concat_sizes(node)
        elif node.type in (_OP.SPLIT, _OP.UNBIND) and _insert_chunks(graph, node):
            sizes = _chunk_sizes(node)
            if sizes is not None:
                node.module.__class__ = _Split
                split_sizes[node] = sizes
    for node in graph.module2node.values():
        node.dependencies.clear()
    graph._build_dependency(graph.module2node)
    graph._2d_4d = True  # views may flatten: those that do not are element-wise nodes by now
    return split_sizes


class _Split(tp.ops._SplitOp):  # type: ignore[misc] # the package is untyped
    """A split whose offsets follow from its sizes; the original's are outdated after pruning."""

    @property
    def offsets(self) -> list[int]:
        return [0, *itertools.accumulate(self.split_sizes)]

    @offsets.setter
    def offsets(self, _: Any) -> None:
        pass


def _shape(grad_fn: Any, output: int = 0) -> tuple[int, ...]:
    """Shape of an output of an operation, which is an input of its backward pass."""
    return tuple(grad_fn._input_metadata[output].shape)


def _keeps_channels(node: Any) -> bool:
    """Whether a view or expansion maps channels one to one."""
    after = _shape(node.grad_fn)
    before = tuple(node.grad_fn._saved_self_sym_sizes)
    if node.type == _OP.RESHAPE:
        return not (_flattens(before, after) or _flattens(after, before))
    # grouped attention repeats its heads: (N, heads, 1, L, d) -> (N, heads, n, L, d)
    repeats = len(before) == 5 and before[2] == 1 and after[2] > 1
    return not (repeats and before[:2] + before[3:] == after[:2] + after[3:])


def _flattens(before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether shape (N, C, H, W) becomes (N, C * H * W)."""
    to_matrix = len(after) == 2 and len(before) > 3 and after[0] == before[0]
    return to_matrix and before[1] > 1 and math.prod(before[2:]) > 1


def _set_concat_sizes(node: Any) -> None:
    """Set the sizes of a concatenation's inputs; if one is unknown, map channels one to one."""
    inputs = [(source, output) for source, output in node.grad_fn.next_functions]
    known = [source is not None and len(source._input_metadata) > 0 for source, _ in inputs]
    if not all(known) or len(inputs) != len(node.inputs):
        node.type = _OP.ELEMENTWISE
        return
    shapes = [_shape(source, output) for source, output in inputs]
    axis = _axis(node.grad_fn._saved_dim, len(shapes[0]))
    node.module.concat_sizes = [shape[axis] for shape in shapes]


def _chunk_sizes(node: Any) -> list[int] | None:
    """Sizes of the chunks of a split; None for an unbind."""
    grad_fn = node.grad_fn
    if node.type != _OP.SPLIT:
        return None
    count = len(grad_fn._input_metadata)
    axis = _axis(grad_fn._saved_dim, len(grad_fn._saved_self_sym_sizes))
    return [_shape(grad_fn, output)[axis] for output in range(count)]


def _axis(dim: int, dimensions: int) -> int:
    """The dimension as an index; autograd saves negative ones as unsigned integers."""
    return (dim - 2**64 if dim >= 2**63 else dim) % dimensions


def _insert_chunks(graph: tp.DependencyGraph, node: Any) -> bool:
    """Insert a node for each chunk between a split and its readers.

    Returns:
        False, with the graph unchanged, if it is unknown which chunks a reader takes.
    """
    readers = list(dict.fromkeys(node.outputs))
    indices_of = {reader: _chunk_indices(node, reader) for reader in readers}
    if any(len(indices) != node.outputs.count(reader) for reader, indices in indices_of.items()):
        return False  # a layer that runs several times has one node, of its last call
    chunks = [_new_chunk(graph, node) for _ in node.grad_fn._input_metadata]
    for reader, indices in indices_of.items():
        remaining = iter(indices)
        reader.inputs = [chunks[next(remaining)] if i is node else i for i in reader.inputs]
        for index in indices:
            chunks[index].add_output(reader)
    node.outputs = chunks
    return True


def _chunk_indices(node: Any, reader: Any) -> list[int]:
    """Indices of the chunks that a reader takes, in the order of its inputs."""
    if reader.grad_fn is None:
        return []
    return [index for source, index in reader.grad_fn.next_functions if source is node.grad_fn]


def _new_chunk(graph: tp.DependencyGraph, node: Any) -> Any:
    chunk = tp.dependency.Node(tp.ops._ElementWiseOp(graph._op_id, "chunk"), None)
    graph._op_id += 1
    graph.module2node[chunk.module] = chunk
    chunk.add_input(node)
    return chunk
