"""FLOPs of one node as an integer or an expression over dimension names, 2 per multiply-add."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from redpass import ops

Sizes = tuple[Any, ...]


def node_flops(node: fx.Node) -> Any:
    """Returns the FLOPs of `node`, or None when it is no product, convolution or attention."""
    rule = RULES.get(ops.base_name(node)) if ops.namespace(node) else None
    if rule is None or (not ops.is_float(node) and not _is_tuple(node)):
        return None
    return rule(node)


def _is_tuple(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), tuple | list)


def _sizes(value: Any) -> Sizes:
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    if isinstance(value, tuple | list):
        value = value[0]
    assert isinstance(value, Tensor)
    return tuple(s.node.expr if isinstance(s, torch.SymInt) else int(s) for s in value.shape)


def _linear(node: fx.Node) -> Any:
    return 2 * math.prod(_sizes(node)) * _sizes(node.args[1])[-1]


def _product(node: fx.Node) -> Any:
    """`matmul`, `mm`, `bmm`: every output element sums over the left operand's last axis."""
    return 2 * math.prod(_sizes(node)) * _sizes(node.args[0])[-1]


def _added_product(node: fx.Node) -> Any:
    """`addmm`, `baddbmm`: the first operand is the one added."""
    return 2 * math.prod(_sizes(node)) * _sizes(node.args[1])[-1]


def _attention(node: fx.Node) -> Any:
    """Scores over all key positions, masked ones too, then the weighted sum of values."""
    *batch, queries, dim = _sizes(node.args[0])
    keys, width = _sizes(node.args[1])[-2], _sizes(node.args[2])[-1]
    return 2 * math.prod(batch) * queries * keys * (dim + width)


def _convolution(node: fx.Node) -> Any:
    """Each output element sums over its group's input channels and the kernel."""
    out, weight = _sizes(node), _sizes(node.args[1])
    if ops.base_name(node) == "convolution" and node.args[6]:
        return 2 * math.prod(_sizes(node.args[0])) * math.prod(weight[1:])
    return 2 * math.prod(out) * math.prod(weight[1:])


def _transposed(node: fx.Node) -> Any:
    return 2 * math.prod(_sizes(node.args[0])) * math.prod(_sizes(node.args[1])[1:])


def _grouped(node: fx.Node) -> Any:
    """Each row meets the matrix of its own group: `[rows, in] x [groups, in, out]`."""
    return 2 * math.prod(_sizes(node)) * _sizes(node.args[0])[-1]


def _einsum(node: fx.Node) -> Any:
    """All letters of the formula span the loop."""
    operands: Any = node.args[1]
    letters: dict[str, Any] = {}
    for term, operand in zip(str(node.args[0]).split("->")[0].split(","), operands, strict=True):
        letters |= dict(zip(term.replace(" ", ""), _sizes(operand), strict=False))
    return 2 * math.prod(letters.values()) if len(operands) > 1 else 0


RULES: dict[str, Callable[[fx.Node], Any]] = {
    "linear": _linear,
    "matmul": _product,
    "mm": _product,
    "bmm": _product,
    "addmm": _added_product,
    "baddbmm": _added_product,
    "scaled_dot_product_attention": _attention,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "convolution": _convolution,
    "conv_transpose1d": _transposed,
    "conv_transpose2d": _transposed,
    "conv_transpose3d": _transposed,
    "_grouped_mm": _grouped,
    "grouped_mm_fallback": _grouped,
    "einsum": _einsum,
}
