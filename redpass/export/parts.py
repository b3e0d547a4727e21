"""Writes a linear whose result is only cut into parts as one product a part.

Merged projections are made for PyTorch's sake. In ONNX Runtime on one CPU core, three products of
384 x 384 and their biases take 0.96 (128 rows) and 0.95 (1024 rows) of the time of one product of
384 x 1152 and a Split, whose copies cost more than the larger product gains; for one row 1.02.
So a program with a cache, which runs on one row most of the time, keeps its products merged.
Whole models, time after over before: a whisper encoder on 256 frames 0.986; gpt2 with a cache,
left alone, would be at 0.996 for 128 tokens and 1.016 for one.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from redpass import ops
from redpass.export.emitter import Emitter
from redpass.export.sizes import shape_of, size_of, type_of


def part(e: Emitter, node: Any, start: Any, end: Any) -> ir.Value | None:
    """Returns `node[..., start:end]` as a product of its own, or None when that is no gain.

    Only when `node` is a linear of weights nobody else reads, and all its readers cut it.
    """
    linear = None if e.program.signature.state else _linear(node)
    if linear is None or not (isinstance(start, int) and isinstance(end, int)):
        return None
    source, weight, bias, transposed = linear
    value = e.slice_of_weight(weight, 0 if transposed else 1, start, end, transposed)
    found = e.call("MatMul", _unflattened(e, source), value)
    if bias is not None:
        found = e.call("Add", found, e.slice_of_weight(bias, 0, start, end))
    shape = shape_of(node)[:-1]
    e.shapes[found] = (*e.shapes[_unflattened(e, source)][:-1], end - start)
    return e.reshape(found, (*shape, end - start))


def _linear(node: Any) -> tuple[fx.Node, fx.Node, fx.Node | None, bool] | None:
    """Reads a node as (input, weight, bias, weight is [out, in]), if it may be taken apart."""
    if not isinstance(node, fx.Node) or not _is_only_cut(node):
        return None
    while ops.is_call(node, "view", "_unsafe_view", "reshape"):
        before = node.args[0]
        same = isinstance(before, fx.Node) and shape_of(before)[-1] == shape_of(node)[-1]
        if not isinstance(before, fx.Node) or not same or len(before.users) != 1:
            return None
        node = before
    if ops.is_call(node, "linear"):
        found = (node.args[0], node.args[1], ops.argument(node, "bias"), True)
    elif ops.is_call(node, "addmm") and {
        ops.argument(node, "alpha"),
        ops.argument(node, "beta"),
    } == {1}:
        found = (node.args[1], node.args[2], node.args[0], False)
    else:
        return None
    return found if all(map(_is_private, found[1:3])) else None  # type: ignore[return-value]


def _is_private(item: Any) -> bool:
    if item is None:
        return True
    return isinstance(item, fx.Node) and item.op == "get_attr" and len(item.users) == 1


def _is_only_cut(node: fx.Node) -> bool:
    """Whether every reader takes fixed parts of the last axis, and each part but once."""
    last = len(shape_of(node)) - 1
    covered = 0
    for user in node.users:
        if not ops.is_call(user, "split", "split_with_sizes", "chunk", "slice"):
            return False
        if int(ops.argument(user, "dim")) % (last + 1) != last:
            return False
        values = user.meta["val"]
        parts = [values] if isinstance(values, torch.Tensor) else list(values)
        widths = [size_of(value.shape[last]) for value in parts]
        if not all(isinstance(width, int) for width in widths):
            return False
        covered += sum(widths)
    return covered == shape_of(node)[-1] and type_of(node) == ir.DataType.FLOAT


def _unflattened(e: Emitter, node: fx.Node) -> ir.Value:
    """Returns an input as it was before it was flattened to a matrix."""
    value = e.value(node)
    source = value.producer()
    if source is None or source.op_type != "Reshape" or source.inputs[0] is None:
        return value
    root = source.inputs[0]
    same = root in e.shapes and e.shapes[root][-1] == shape_of(node)[-1]
    return root if same and len(e.shapes[root]) > len(shape_of(node)) else value
