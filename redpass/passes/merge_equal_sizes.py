"""Lets sizes that are always equal be read once, off an input.

n = sym_size(hidden, 1)
m = sym_size(query, 2)     ->    view(x, [sym_size(input_ids, 1), 4])
view(x, [n, 4]); view(y, [m, 4])
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from redpass import ops
from redpass.facts import Facts
from redpass.plan import Action, Edit, Exactness, Insert, Literal, Plan, Ref, Replace, Skip
from redpass.program import Program
from redpass.state import size_expression

SAME, INPUT = "merge_equal_sizes.same", "merge_equal_sizes.input"
CONSTANT = "merge_equal_sizes.constant"


@dataclass(frozen=True)
class Place:
    """An input and one of its axes."""

    node: fx.Node
    axis: int

    def is_read_by(self, size: fx.Node) -> bool:
        """Whether `size` is the node that reads this very size."""
        return ops.is_call(size, "sym_size") and size.args == (self.node, self.axis)


@dataclass(frozen=True)
class MergeEqualSizes:
    """Gives each symbolic size one node, read off an input where an input has it.

    What: size nodes with the same expression over the symbols become one, so that masks and
    rotary tables computed anew in each layer become equal text, and mergeable. Sizes that are
    constant become literals. Inputs that are not state are preferred: a layer's cache can then
    be dropped without taking sizes along.
    When: always safe: the expressions come from tracing and hold for all sizes allowed.
    Not tried: proving two different expressions equal.
    Costs: one walk over the graph; expressions are compared by hash, never simplified.
    """

    name: ClassVar[str] = "merge_equal_sizes"
    needs: ClassVar[tuple[Any, ...]] = ()
    exactness: ClassVar[Exactness] = Exactness.SAME_BITS

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action per size that has several nodes, or one that could read an input."""
        groups: dict[sympy.Expr, list[fx.Node]] = {}
        for node in program.graph.nodes:
            expression = size_expression(node) if ops.is_pure(node) and node.users else None
            if expression is not None:
                groups.setdefault(expression, []).append(node)
        places = _input_places(program)
        return Plan.of(
            item
            for expression, nodes in groups.items()
            for item in _judge(expression, nodes, places.get(expression, []))
        )


def _judge(
    expression: sympy.Expr, nodes: list[fx.Node], places: list[Place]
) -> Iterator[Action | Skip]:
    first = nodes[0]
    if expression.is_Integer:
        yield from (_write_out(node, expression) for node in nodes)
        return
    place = next((p for p in places if p.node < first), None)
    if place is not None and not place.is_read_by(first):
        yield _read_input(expression, nodes, place)
        return
    if len(nodes) > 1:
        yield _read_first(expression, nodes)
    if place is None and places:
        yield Skip(SAME, first.name, "the inputs with this size come after its first use")


def _write_out(node: fx.Node, expression: sympy.Expr) -> Action:
    value = node.meta["val"]
    number = value if isinstance(value, int) else int(expression)
    reason = f"the size is {number} for every input"
    return Action(CONSTANT, node.name, (Replace(node.name, Literal(number)),), reason)


def _read_first(expression: sympy.Expr, nodes: list[fx.Node]) -> Action:
    first, *others = nodes
    edits = tuple(Replace(node.name, first.name) for node in others)
    reason = f"{len(nodes)} nodes compute the size {expression}; one is enough"
    return Action(SAME, first.name, edits, reason, {"nodes": len(others)})


def _read_input(expression: sympy.Expr, nodes: list[fx.Node], place: Place) -> Action:
    first = nodes[0]
    name = f"{place.node.name}_size_{place.axis}"
    args = (Ref(place.node.name), place.axis)
    edits: list[Edit] = [Insert(name, torch.ops.aten.sym_size.int, args, first.name)]
    edits += [Replace(node.name, name) for node in nodes]
    reason = f"the size {expression} is axis {place.axis} of the input {place.node.name}"
    return Action(INPUT, first.name, tuple(edits), reason, {"nodes": len(nodes) - 1})


def _input_places(program: Program) -> dict[sympy.Expr, list[Place]]:
    """Returns size -> where inputs have it, the inputs that are not state first."""
    state = {name for name, _ in program.signature.state}
    ports = zip(program.signature.inputs, program.inputs, strict=True)
    places: dict[sympy.Expr, list[Place]] = {}
    for _, node in sorted(ports, key=lambda pair: pair[0].name in state):
        for axis, size in enumerate(getattr(node.meta["val"], "shape", ())):
            if isinstance(size, torch.SymInt):
                places.setdefault(size.node.expr, []).append(Place(node, axis))
    return places
