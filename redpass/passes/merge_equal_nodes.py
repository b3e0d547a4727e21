"""Computes equal values once.

a = cos(positions)
b = cos(positions)    ->    a = cos(positions)
y = add(a, b)               y = add(a, a)
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from redpass import ops
from redpass.facts import Facts
from redpass.plan import Action, Exactness, Plan, Replace, Skip
from redpass.program import Program

RULE = "merge_equal_nodes.same_inputs"


@dataclass(frozen=True)
class MergeEqualNodes:
    """Lets readers of a value that was computed before read the first one.

    What: pure nodes with the same op on the same values, where "same" follows earlier merges, so
    whole chains go at once: rotary tables and masks computed anew in each layer. Operands of
    commutative ops may stand in either order, defaults may be written out or not.
    When: the op is pure, and both results have one dtype, shape and layout. Then no bit changes
    (a NaN may carry another payload when operands change places).
    Not tried: algebra of any kind; weights that are equal (`tie_equal_weights` does these).
    Costs: one walk; one dictionary look-up a node. Merged values live longer at run time.
    Source: value numbering (Cocke 1970).
    """

    name: ClassVar[str] = "merge_equal_nodes"
    needs: ClassVar[tuple[Any, ...]] = ()
    exactness: ClassVar[Exactness] = Exactness.SAME_BITS

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action per value that was computed before and has other readers than such."""
        numbers = _Numbers()
        skips = [skip for node in program.graph.nodes for skip in numbers.add(node)]
        merged = numbers.leader
        actions = [
            Action(RULE, node.name, (Replace(node.name, leader.name),), _reason(leader))
            for node, leader in merged.items()
            if any(user not in merged for user in node.users)
        ]
        return Plan(tuple(actions), tuple(skips))


@dataclass
class _Numbers:
    """Which node first computed a value, over one walk in graph order."""

    known: dict[Hashable, fx.Node] = field(default_factory=dict)
    leader: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def add(self, node: fx.Node) -> Iterator[Skip]:
        if node.op != "call_function":
            return
        first = self.known.setdefault(self._key(node), node)
        if first is node:
            return
        if reason := _why_not(node, first):
            yield Skip(RULE, node.name, reason)
        else:
            self.leader[node] = first

    def _key(self, node: fx.Node) -> Hashable:
        operands = [self._freeze(value) for value in _arguments(node)]
        if ops.is_commutative(node):
            operands[:2] = sorted(operands[:2], key=repr)
        return node.target, tuple(operands)

    def _freeze(self, value: Any) -> Hashable:
        if isinstance(value, fx.Node):
            return self.leader.get(value, value)
        if isinstance(value, list | tuple):
            return tuple(map(self._freeze, value))
        # Types tell 1 from 1.0 and True, the written form tells 0.0 from -0.0.
        return type(value).__name__, repr(value)


def _arguments(node: fx.Node) -> list[Any]:
    """Returns all arguments in the order of the schema, with defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return [*node.args, *sorted(node.kwargs.items())]
    rest = node.target._schema.arguments[len(node.args) :]
    return [*node.args, *(node.kwargs.get(p.name, p.default_value) for p in rest)]


def _why_not(node: fx.Node, first: fx.Node) -> str | None:
    if ops.is_random(node):
        return f"as {first.name}, but each call draws other random numbers"
    if not ops.is_pure(node):
        return f"as {first.name}, but an op like this may give another result each time"
    if ops.layout(node) != ops.layout(first):
        return f"as {first.name}, but its elements lie in memory in another order"
    return None


def _reason(leader: fx.Node) -> str:
    return f"the same op on the same values as {leader.name}"
