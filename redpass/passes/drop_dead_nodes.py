"""Drops values nobody reads.

    a = relu(x)
    b = neg(a)      ->    y = exp(x)
    y = exp(x)

An op that may have effects is never dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from redpass import ops
from redpass.facts import Facts
from redpass.plan import Action, Erase, Exactness, Plan, Skip
from redpass.program import Program

RULE = "drop_dead_nodes.unread"


@dataclass(frozen=True)
class DropDeadNodes:
    """Removes computation that reaches no output.

    What: each pure value without readers, and all that was computed for it alone.
    When: always safe: the ops are known to change nothing but their result.
    Not tried: ops that may have effects (unknown or random ones), inputs: these are public.
    Costs: one walk over the graph.
    """

    name: ClassVar[str] = "drop_dead_nodes"
    needs: ClassVar[tuple[Any, ...]] = ()
    exactness: ClassVar[Exactness] = Exactness.SAME_BITS

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action per unread value."""
        return Plan.of(_judge_all(program))


def _judge_all(program: Program) -> Iterator[Action | Skip]:
    dying = _dying(program)
    for node in program.graph.nodes:
        if node.users or node.op == "output":
            continue
        if reason := _why_not(node):
            yield Skip(RULE, node.name, reason)
        else:
            yield _erase(program, node, dying[node])


def _erase(program: Program, root: fx.Node, dying: list[fx.Node]) -> Action:
    weights = [program.weights[str(node.target)] for node in dying if node.op == "get_attr"]
    also = f", and {len(dying) - 1} before it" if len(dying) > 1 else ""
    return Action(
        RULE,
        root.name,
        (Erase(root.name),),
        f"no output needs this value{also}",
        {"nodes": len(dying)},
        {
            "parameters": sum(tensor.numel() for tensor in weights),
            "bytes": sum(tensor.nbytes for tensor in weights),
        },
    )


def _dying(program: Program) -> dict[fx.Node, list[fx.Node]]:
    """Returns unread value -> what dies with it; what several share counts for one of them."""
    root: dict[fx.Node, fx.Node] = {}
    dying: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(program.graph.nodes):
        if ops.is_pure(node) and all(user in root for user in node.users):
            root[node] = next((root[user] for user in node.users), node)
            dying.setdefault(root[node], []).append(node)
    return dying


def _why_not(node: fx.Node) -> str | None:
    if ops.is_pure(node):
        return None
    if node.op == "placeholder":
        return "an input is public, also when nobody reads it"
    return "nobody reads it, but an op like this may do more than compute its value"
