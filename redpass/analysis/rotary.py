"""Rotary position embedding: `q * cos + rotated(q) * sin`, or the same on halves or as complex."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.analysis.flow import Flow
from redpass.analysis.records import Rotary
from redpass.program import Program


def find_rotary(
    flow: Flow, query: Mapping[fx.Node, Any], key: Mapping[fx.Node, Any]
) -> Rotary | None:
    """Finds the rotation of queries and keys.

    Args:
        query: nodes on the way of the queries that hold indices (see `provenance`).
        key: the same for the keys.
    """
    rotated = rotations(flow, query)
    if not rotated:
        return None
    keys = rotations(flow, key)
    tables = tuple(dict.fromkeys(name for _, names in rotated for name in names))
    dims = sum(_width(query[node]) for node, _ in rotated)
    last = rotated[-1][0].name
    return Rotary(last, keys[-1][0].name if keys else None, tables, dims)


def rotations(flow: Flow, known: Mapping[fx.Node, Any]) -> list[tuple[fx.Node, tuple[str, ...]]]:
    """Returns sums of two products with tables that change with the position, and complex products.

    Args:
        known: nodes that hold indices (see `provenance`).

    Returns:
        Each such node with the names of its tables, in graph order.
    """
    found = []
    for node in sorted(known, key=flow.order.__getitem__):
        if ops.is_call(node, "add", "sub"):
            tables = [_table(flow, known, arg) for arg in node.args[:2]]
            if all(table is not None for table in tables):
                found.append((node, tuple(t.name for t in tables if t is not None)))
        elif ops.is_call(node, "view_as_real"):
            table = _table(flow, known, node.args[0])
            if table is not None:
                found.append((node, (table.name,)))
    return found


def _table(flow: Flow, known: Mapping[fx.Node, Any], product: Any) -> fx.Node | None:
    """The other factor of a product of a value that holds indices with one that has positions."""
    if not isinstance(product, fx.Node):
        return None
    product = flow.peel(product)
    if not ops.is_call(product, "mul") or product not in known:
        return None
    inside = [a for a in product.args[:2] if a in known]
    outside = [a for a in product.args[:2] if isinstance(a, fx.Node) and a not in known]
    if len(inside) != 1 or len(outside) != 1:
        return None
    sizes = flow.shape(outside[0]) or ()
    has_positions = len(sizes) >= 2 and any(size != 1 for size in sizes[:-1])
    return flow.peel(outside[0]) if has_positions else None


def _width(indices: Tensor) -> int:
    """How many distinct features of one head the node holds."""
    return math.prod(indices.shape[-1:])


def has_equal_halves(program: Program, node: fx.Node) -> bool:
    """Whether a table's last axis holds the same numbers twice: made so by a cat, or by content."""
    if node.op == "get_attr":
        weight = program.weights[str(node.target)]
        half = weight.shape[-1] // 2
        return torch.equal(weight[..., :half], weight[..., half:])
    value = node.meta["val"]
    if ops.is_call(node, "cat"):
        parts = ops.argument(node, "tensors")
        last = ops.argument(node, "dim") in (-1, value.dim() - 1)
        return last and len(parts) == 2 and parts[0] is parts[1]
    if ops.is_call(node, "unsqueeze"):
        if int(ops.argument(node, "dim")) % value.dim() == value.dim() - 1:
            return False
    elif not (ops.is_elementwise(node) or ops.is_call(node, "to", "_to_copy", "clone", "slice")):
        return False
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)]
    if len(tensors) != 1:
        return False
    is_cut = ops.is_call(node, "slice") and tensors[0].meta["val"].shape[-1] != value.shape[-1]
    return not is_cut and has_equal_halves(program, tensors[0])
