"""Twins: layers that are the same graph up to weights, and which weight stands where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from redpass.analysis.flow import Flow
from redpass.program import Program


@dataclass(frozen=True)
class Place:
    """One place where a weight is read: by node `reader`, off the `get_attr` node `node`."""

    reader: str
    node: str
    weight: str


@dataclass(frozen=True)
class Twin:
    """Where the weights of one part of a program stand in another part of the same form.

    Attributes:
        pairs: (place in the one, weight that stands there in the other).
        fault: why the two are no twins, or "".
    """

    pairs: tuple[tuple[Place, str], ...] = ()
    fault: str = ""


def match(program: Program, one: tuple[str, str], other: tuple[str, str]) -> Twin:
    """Walks two parts of a program side by side, from their results up to what they read.

    Args:
        one: (value read, value made) of the one part, as node names; `other` likewise.

    Returns:
        The pairs, or the first difference as `fault`.
    """
    nodes = program.nodes
    start = {nodes[one[0]]: nodes[other[0]]}
    return _Walk(program, start).run(nodes[one[1]], nodes[other[1]])


class _Walk:
    def __init__(self, program: Program, known: dict[fx.Node, fx.Node]) -> None:
        self.flow, self.known = Flow(program), known
        self.starts = dict(known)
        self.pairs: dict[Place, str] = {}

    def run(self, one: fx.Node, other: fx.Node) -> Twin:
        todo: list[tuple[fx.Node, fx.Node]] = [(one, other)]
        while todo:
            left, right = todo.pop()
            if left is right or self.known.get(left) is right or self._is_start(left, right):
                continue
            fault = self._differ(left, right)
            if fault:
                return Twin(fault=fault)
            self.known[left] = right
            todo += zip(left.all_input_nodes, right.all_input_nodes, strict=True)
            self._note(left, right)
        return Twin(tuple(self.pairs.items()))

    def _is_start(self, left: fx.Node, right: fx.Node) -> bool:
        """Whether both are the value read, up to casts and dropout that only one part may have."""
        start = self.starts.get(self.flow.peel(left))
        return start is not None and start is self.flow.peel(right)

    def _differ(self, left: fx.Node, right: fx.Node) -> str:
        if left in self.known:
            return f"{left.name} stands for two values"
        if left.op != right.op or (left.op == "call_function" and left.target != right.target):
            return f"{left.name} and {right.name} are different operations"
        if _shape(left) != _shape(right):
            return f"{left.name} and {right.name} have different shapes"
        if left.op == "call_function" and not _alike(
            [left.args, left.kwargs], [right.args, right.kwargs]
        ):
            return f"{left.name} and {right.name} have different arguments"
        return ""

    def _note(self, left: fx.Node, right: fx.Node) -> None:
        for a, b in zip(left.all_input_nodes, right.all_input_nodes, strict=True):
            if a.op == b.op == "get_attr" and a is not b:
                self.pairs[Place(left.name, a.name, str(a.target))] = str(b.target)


def _shape(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return (str(getattr(value, "shape", "")), str(getattr(value, "dtype", "")))


def _alike(left: Any, right: Any) -> bool:
    """Whether arguments are equal apart from which nodes they name, in number and place."""
    if isinstance(left, fx.Node) or isinstance(right, fx.Node):
        return isinstance(left, fx.Node) and isinstance(right, fx.Node)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_alike(left[k], right[k]) for k in left)
    if isinstance(left, Sequence) and not isinstance(left, str):
        same = isinstance(right, Sequence) and len(left) == len(right)
        return same and all(map(_alike, left, right))
    return type(left) is type(right) and bool(left == right)
