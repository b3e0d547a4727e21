"""Values of a graph that do not depend on its inputs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from redpass import ops
from redpass.program import Program


def evaluate(program: Program, nodes: Collection[fx.Node]) -> dict[fx.Node, Any]:
    """Computes `nodes`, and what they need, in graph order and without gradients.

    Args:
        nodes: pure nodes of fixed size that depend on weights, literals and fixed sizes alone.

    Returns:
        Node -> tensor, tuple of tensors or number, for `nodes` and all before them.
    """
    needed = set(nodes)
    for node in reversed(program.graph.nodes):
        if node in needed and not _is_size(node):
            needed.update(ops.read_nodes(node))
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in program.graph.nodes:
            if node in needed:
                values[node] = _value(program, node, values)
    return values


def _value(program: Program, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return program.weights[str(node.target)]
    if _is_size(node):
        return node.meta["val"]
    args, kwargs = fx.node.map_arg(
        (node.args, node.kwargs), lambda n: values[n] if n in values else _stand_in(n)
    )
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _stand_in(node: fx.Node) -> torch.Tensor:
    """Returns something of the operand's dtype and fixed sizes for a fill."""
    value = node.meta["val"]
    is_fixed = all(type(size) is int for size in (*value.shape, *value.stride()))
    shape, strides = (value.shape, value.stride()) if is_fixed else ((0,), (1,))
    return torch.empty_strided(shape, strides, dtype=value.dtype)


def _is_size(node: fx.Node) -> bool:
    return type(node.meta["val"]) is int
