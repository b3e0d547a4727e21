"""Data flow questions that all parts of `structure` ask: order, ancestors, constants, no-ops."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from redpass import ops
from redpass.program import Program


class Flow:
    """A program's graph with the answers that are asked again and again.

    Attributes:
        side_inputs: (value, reader) pairs that `between` does not follow: masks and biases of
            attention scores, which several layers share and which carry no stream.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes: tuple[fx.Node, ...] = tuple(program.graph.nodes)
        self.order = {node: place for place, node in enumerate(self.nodes)}
        self._shapes: dict[fx.Node, tuple[Any, ...] | None] = {}
        self._constants: dict[fx.Node, Tensor | None] = {}
        self.side_inputs: frozenset[tuple[fx.Node, fx.Node]] = frozenset()

    @cached_property
    def live(self) -> frozenset[fx.Node]:
        """The nodes that depend on an input."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            if node.op == "placeholder" or any(arg in found for arg in node.all_input_nodes):
                found.add(node)
        return frozenset(found)

    def is_live_float(self, node: Any) -> bool:
        """Whether `node` is a floating-point tensor that depends on an input."""
        return isinstance(node, fx.Node) and node in self.live and ops.is_float(node)

    def shape(self, node: fx.Node) -> tuple[Any, ...] | None:
        """The node's sizes as integers and sympy expressions, or None when it is no tensor."""
        if node not in self._shapes:
            value = node.meta.get("val")
            sizes = value.shape if isinstance(value, Tensor) else None
            self._shapes[node] = None if sizes is None else tuple(map(_expression, sizes))
        return self._shapes[node]

    def peel(self, node: fx.Node) -> fx.Node:
        """Follows a value back through casts, dropout and views that keep the elements' order."""
        while self.is_no_op(node):
            node = node.all_input_nodes[0]
        return node

    def is_no_op(self, node: fx.Node) -> bool:
        """Whether the node gives its first operand's elements, in the same order."""
        if ops.is_call(node, *ops.NO_OPS):
            return True
        if ops.is_call(node, "slice", "expand"):
            return self.shape(node) == self.shape(node.all_input_nodes[0])
        return False

    def readers(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yields the nodes that read `node`'s value, looking through no-ops and size reads."""
        for user in node.users:
            if self.is_no_op(user) and user.all_input_nodes[0] is node:
                yield from self.readers(user)
            elif not ops.is_size(user) and not _reads_type_only(user, node):
                yield user

    def between(self, entry: fx.Node, exit_: fx.Node) -> frozenset[fx.Node]:
        """Nodes on a path from `entry` (not in it) to `exit_` (in it); empty if there is none."""
        first = self.order[entry]
        above = self.ancestors([exit_], first)
        found: set[fx.Node] = set()
        for node in sorted(above, key=self.order.__getitem__):
            for arg in node.all_input_nodes:
                if (arg is entry or arg in found) and (arg, node) not in self.side_inputs:
                    found.add(node)
                    break
        return frozenset(found) if exit_ in found else frozenset()

    def ancestors(self, nodes: Iterable[fx.Node], first: int = -1) -> set[fx.Node]:
        """Nodes whose value reaches `nodes` (in it), of those after place `first`."""
        todo = [node for node in nodes if self.order[node] > first]
        seen = set(todo)
        while todo:
            for arg in todo.pop().all_input_nodes:
                if arg not in seen and self.order[arg] > first:
                    seen.add(arg)
                    todo.append(arg)
        return seen

    def scalar(self, value: Any) -> float | None:
        """The number that `value` is: a literal, or a constant of one element with data."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, fx.Node) or value in self.live:
            return None
        if self.shape(value) is None or math.prod(self.shape(value) or ()) != 1:
            return None
        found = self.constant(value)
        return None if found is None else float(found)

    def constant(self, node: fx.Node) -> Tensor | None:
        """Computes a value that depends on weights alone; None when that needs data not there."""
        if node not in self._constants:
            self._constants[node] = self._compute_constant(node)
        return self._constants[node]

    def _compute_constant(self, node: fx.Node) -> Tensor | None:
        weight = self.program.weight(node)
        if weight is not None:
            return None if weight.is_meta else weight.detach()
        if node.op != "call_function" or not ops.is_pure(node) or node in self.live:
            return None
        operands = {arg: self.constant(arg) for arg in node.all_input_nodes}
        if any(value is None for value in operands.values()):
            return None
        args = fx.node.map_arg(node.args, operands.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, operands.__getitem__)
        with torch.no_grad():
            found = node.target(*args, **kwargs)  # type: ignore[operator]
        return found if isinstance(found, Tensor) else None

    def weight_of(self, node: Any) -> str | None:
        """Name of the weight that `node` reads, through casts and reshapes, or None."""
        if not isinstance(node, fx.Node):
            return None
        found = self.peel(node)
        return str(found.target) if found.op == "get_attr" else None


def _reads_type_only(user: fx.Node, node: fx.Node) -> bool:
    return ops.is_call(user, "type_as") and user.args[0] is not node


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def concrete(size: Any, sizes: dict[str, int], default: int) -> int:
    """The integer `size` becomes when symbols get `sizes`, or `default` if not named there."""
    if isinstance(size, torch.SymInt):
        size = size.node.expr
    if isinstance(size, sympy.Expr):
        values = {s: sizes.get(s.name, default) for s in size.free_symbols}
        return int(size.subs(values))
    return int(size)
