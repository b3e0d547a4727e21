"""Lets a reshape of a reshape, and a cast of a wider cast, read the first operand.

    a = view(x, [n, 2, 4])            y = view(x, [n, 8])
    y = view(a, [n, 8])         ->
    b = to(i, float64)                z = to(i, float32)      (i is float16)
    z = to(b, float32)

What was in between is dropped when nothing else reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from redpass import ops
from redpass.facts import Facts
from redpass.plan import Action, Exactness, Plan, SetArgument, Skip
from redpass.program import Program

RESHAPE, CAST = "shorten_chains.reshape", "shorten_chains.cast"


@dataclass(frozen=True)
class ShortenChains:
    """Bypasses steps of a chain that leave no trace in its result.

    What: ops that change nothing but the shape, read by one that writes its whole shape out; casts
    to a dtype that holds every value of the operand's, read by another cast.
    When: the first operand's elements lie in row-major order, so each reshape is a view of it; the
    dtype in between loses nothing.
    Not tried: merging transposes and permutations; casts that lose something.
    Costs: one walk over the graph.
    """

    name: ClassVar[str] = "shorten_chains"
    needs: ClassVar[tuple[Any, ...]] = ()
    exactness: ClassVar[Exactness] = Exactness.SAME_BITS

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action per op that can read further back."""
        return Plan.of(item for node in program.graph.nodes for item in _judge(node))


def _judge(node: fx.Node) -> Iterator[Action | Skip]:
    if not node.users or not node.args or not isinstance(node.args[0], fx.Node):
        return
    read = node.args[0]
    if _is_shape_only(read) and ops.is_call(node, *ops.RESHAPES) and _is_written_out(node):
        rule, reason, source = RESHAPE, "only the last shape counts", _shape_source(read)
        failed = "the elements behind it are not in row-major order"
    elif ops.is_call(node, *ops.CASTS) and ops.is_call(read, *ops.CASTS):
        rule, reason, source = CAST, "the dtype in between loses nothing", _cast_source(read)
        failed = "the dtype in between does not hold every value"
    else:
        return
    if source is read:
        yield Skip(rule, node.name, failed)
    else:
        edits = (SetArgument(node.name, read.name, source.name),)
        yield Action(rule, node.name, edits, f"{reason}; {source.name} is read instead")


def _is_shape_only(node: fx.Node) -> bool:
    """Whether the op keeps elements and dtype (`view` to another dtype does not)."""
    if not ops.is_call(node, *ops.SHAPE_ONLY):
        return False
    return bool(node.meta["val"].dtype == node.all_input_nodes[0].meta["val"].dtype)


def _is_written_out(node: fx.Node) -> bool:
    return _is_shape_only(node) and isinstance(node.args[1], list | tuple)


def _shape_source(node: fx.Node) -> fx.Node:
    """Goes back over ops that only change the shape of row-major elements."""
    while _is_shape_only(node):
        before = node.all_input_nodes[0]
        if not ops.is_contiguous(before):
            break
        node = before
    return node


def _cast_source(node: fx.Node) -> fx.Node:
    while ops.is_call(node, *ops.CASTS):
        before = node.all_input_nodes[0]
        wide, narrow = node.meta["val"].dtype, before.meta["val"].dtype
        if not _can_hold(wide, narrow) or ops.layout(node)[1:] != ops.layout(before)[1:]:
            break
        node = before
    return node


def _can_hold(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether casting from `narrow` to `wide` keeps every value apart, integers to integers too."""
    if narrow is torch.bool or wide is narrow:
        return True
    same_kind = wide.is_floating_point == narrow.is_floating_point
    real = not wide.is_complex and not narrow.is_complex
    return real and same_kind and torch.promote_types(wide, narrow) is wide
