"""Elementwise regions that turn one value into one other, such as an activation written out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from redpass import ops
from redpass.facts import Facts
from redpass.program import Program

MAX_NODES = 16
"""Regions of more ops than this are not looked at; written-out activations have 2 to 9."""


@dataclass(frozen=True)
class UnaryFunction:
    """What elementwise ops on literals make of one value.

    Attributes:
        source: the node whose value goes in.
        result: the node whose value comes out.
        nodes: what lies between, `result` included, in graph order.
    """

    source: fx.Node
    result: fx.Node
    nodes: tuple[fx.Node, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the function's values at `x`, computed in the dtype of `x`."""
        values: dict[fx.Node, Any] = {self.source: x}
        for node in self.nodes:
            args = fx.node.map_arg(node.args, values.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        found: Tensor = values[self.result]
        return found


def unary_functions(program: Program, facts: Facts | None = None) -> tuple[UnaryFunction, ...]:
    """Finds every node that joins two branches of one value, each with its nearest source."""
    del facts
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    roots: dict[fx.Node, tuple[fx.Node, ...]] = {}
    found = []
    for node in program.graph.nodes:
        if not _is_step(node):
            continue
        chains = [(operand, *roots.get(operand, ())) for operand in node.all_input_nodes]
        common = [root for root in chains[0] if all(root in chain for chain in chains)]
        roots[node] = tuple(common[:MAX_NODES])
        if len(chains) > 1 and roots[node]:
            found += _between(roots[node][0], node, order)
    return tuple(found)


def _is_step(node: fx.Node) -> bool:
    """Whether `node` computes floats elementwise from floats of its own type."""
    operands = node.all_input_nodes
    if not (ops.is_elementwise(node) and ops.is_pure(node) and ops.is_float(node) and operands):
        return False
    value = node.meta["val"]
    return all(ops.is_float(o) and o.meta["val"].dtype == value.dtype for o in operands)


def _between(source: fx.Node, result: fx.Node, order: Mapping[fx.Node, int]) -> list[UnaryFunction]:
    nodes: list[fx.Node] = []
    pending = [result]
    while pending and len(nodes) <= MAX_NODES:
        node = pending.pop()
        if node is not source and node not in nodes:
            nodes.append(node)
            pending += node.all_input_nodes
    if len(nodes) > MAX_NODES:
        return []
    return [UnaryFunction(source, result, tuple(sorted(nodes, key=order.__getitem__)))]
