"""Values of a graph that do not depend on its inputs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from redpass.program import Program


def evaluate(program: Program, nodes: Collection[fx.Node]) -> dict[fx.Node, Any]:
    """Computes `nodes`, and what they need, in graph order and without gradients.

    Args:
        nodes: pure nodes that depend on weights, literals and fixed sizes alone.

    Returns:
        Node -> tensor, tuple of tensors or number, for `nodes` and all before them.
    """
    needed = set(nodes)
    for node in reversed(program.graph.nodes):
        if node in needed and not _is_size(node):
            needed.update(node.all_input_nodes)
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
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _is_size(node: fx.Node) -> bool:
    return type(node.meta["val"]) is int
