"""Rotary position embedding of queries and keys, spelled out as slices, signs, joins and products.

%a = mul.Tensor(%q, %cos)
%b = cat([neg(%q[32:]), %q[:32]], -1)         %op = redpass.rotary(%q, %k, %cos, %sin, False)
%q2 = add.Tensor(%a, mul.Tensor(%b, %sin))    ->    %q2, %k2 = %op
(and the same for %k)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from redpass import ops
from redpass.analysis.structure import Structure
from redpass.codegen.patterns.site import Site, reader_outside
from redpass.plan import Ref, Skip
from redpass.program import Program

OP = "rotary"
RULE = f"lower.{OP}"


@dataclass(frozen=True, eq=False)
class Turn:
    """One rotated value: `x * cos + turned(x) * sin`, of all of a head or of its first columns.

    Attributes:
        value: what is rotated, whole heads.
        cos: table, with a size of 1 where the heads are.
        sin: likewise.
        result: the node of the rotated heads.
        nodes: the nodes it is made of.
        interleaved: whether neighbours are pairs, not halves.
    """

    value: fx.Node
    cos: fx.Node
    sin: fx.Node
    result: fx.Node
    nodes: frozenset[fx.Node]
    interleaved: bool


def find(program: Program, structure: Structure) -> Iterator[Site | Skip]:
    """Yields the rotations of queries and keys of every attention that has both."""
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    seen: set[tuple[str, str | None]] = set()
    for attention in structure.attentions:
        rotary = attention.rotary
        if rotary is None or (rotary.query, rotary.key) in seen:
            continue
        seen.add((rotary.query, rotary.key))
        if rotary.key is None:
            yield Skip(RULE, rotary.query, "the keys are not rotated beside the queries")
            continue
        turns = [read_turn(program.nodes[name]) for name in (rotary.query, rotary.key)]
        found = _pair(program, turns, order)
        yield Skip(RULE, rotary.query, found) if isinstance(found, str) else found


def _pair(program: Program, turns: list[Turn | None], order: dict[fx.Node, int]) -> Site | str:
    if any(turn is None for turn in turns):
        return "the rotation is spelled in a way that is not known"
    query, key = (turn for turn in turns if turn is not None)
    tables = [table_of(turn.cos) for turn in (query, key)] + [table_of(t.sin) for t in (query, key)]
    if tables[0] is not tables[1] or tables[2] is not tables[3] or None in tables:
        return "queries and keys are rotated by different tables, or tables of another shape"
    if query.interleaved != key.interleaved:
        return "queries and keys are paired in different ways"
    for turn in (query, key):
        names = frozenset(node.name for node in turn.nodes)
        if read := reader_outside(program, names, (turn.result.name,)):
            return f"'{read}' inside the rotation is read elsewhere too"
    needed = max(order[n] for n in (query.value, key.value, *filter(None, tables)))
    readers = [user for turn in (query, key) for user in turn.result.users]
    before = min(readers, key=order.__getitem__, default=None)
    if before is None or order[before] < needed:
        return "a rotated value is read before the other can be rotated"
    return _site(query, key, tables[0], tables[2], before)


def _site(query: Turn, key: Turn, cos: Any, sin: Any, before: fx.Node) -> Site:
    width = cos.meta["val"].shape[-1]
    return Site(
        op=OP,
        results=(query.result.name, key.result.name),
        arguments=(
            Ref(query.value.name),
            Ref(key.value.name),
            Ref(cos.name),
            Ref(sin.name),
            query.interleaved,
        ),
        before=before.name,
        covers=frozenset(node.name for node in query.nodes | key.nodes),
        reason=f"{width} columns of queries and keys are rotated by {cos.name} and {sin.name}",
    )


def table_of(node: fx.Node) -> fx.Node | None:
    """Returns the table `[batch or 1, positions, width]` that `node` views with a heads' axis."""
    shape = node.meta["val"].shape
    if not ops.is_call(node, "unsqueeze") or len(shape) != 4 or shape[1] != 1:
        return None
    source = node.args[0]
    at_heads = int(ops.argument(node, "dim")) % 4 == 1
    return source if at_heads and isinstance(source, fx.Node) else None


def read_turn(node: fx.Node) -> Turn | None:
    """Reads the rotation that ends in `node`, whole or of the first columns of a head."""
    whole = _turn(node)
    if whole is None or len(_sizes(whole.value)) != 4:
        return None
    return _of_first_columns(whole) or whole


def _turn(node: fx.Node) -> Turn | None:
    if not ops.is_call(node, "add") or len(node.all_input_nodes) != 2 or node.kwargs:
        return None
    left, right = node.all_input_nodes
    for plain, crossed in ((left, right), (right, left)):
        for value, cos in _factors(plain):
            for turned, sin in _factors(crossed):
                found = _turned(turned, value)
                if found is not None:
                    nodes = frozenset({node, plain, crossed, *found[0]})
                    return Turn(value, cos, sin, node, nodes, found[1])
    return None


def _factors(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    if not ops.is_call(node, "mul") or len(node.all_input_nodes) != 2:
        return []
    first, second = node.all_input_nodes
    return [(first, second), (second, first)]


def _turned(node: fx.Node, value: fx.Node) -> tuple[frozenset[fx.Node], bool] | None:
    """The nodes of `cat(-x[h:], x[:h])`, or of the pairwise form, and whether it is the latter."""
    if ops.is_call(node, "cat"):
        return _turned_halves(node, value)
    source = node.args[0] if node.args else None
    if ops.is_call(node, *ops.SHAPE_ONLY) and isinstance(source, fx.Node):
        return _turned_pairs(node, source, value) if ops.is_call(source, "stack") else None
    return None


def _turned_halves(node: fx.Node, value: fx.Node) -> tuple[frozenset[fx.Node], bool] | None:
    parts, width = ops.argument(node, "tensors"), _sizes(value)[-1]
    if len(parts) != 2 or not _is_last(node, ops.argument(node, "dim")):
        return None
    back, front = parts
    if not ops.is_call(back, "neg") or not isinstance(width, int) or width % 2:
        return None
    inner = back.args[0]
    halves = (
        _slice(inner, value) == (width // 2, width, 1),
        _slice(front, value) == (0, width // 2, 1),
    )
    return (frozenset({node, back, inner, front}), False) if all(halves) else None


def _turned_pairs(
    node: fx.Node, stack: fx.Node, value: fx.Node
) -> tuple[frozenset[fx.Node], bool] | None:
    parts, width = ops.argument(stack, "tensors"), _sizes(value)[-1]
    if len(parts) != 2 or not _is_last(stack, ops.argument(stack, "dim")):
        return None
    back, front = parts
    if not ops.is_call(back, "neg") or not isinstance(width, int) or _sizes(node) != _sizes(value):
        return None
    inner = back.args[0]
    pairs = _slice(inner, value) == (1, width, 2), _slice(front, value) == (0, width, 2)
    return (frozenset({node, stack, back, inner, front}), True) if all(pairs) else None


def _slice(node: Any, source: fx.Node) -> tuple[int, int, int] | None:
    """(start, end, step) when `node` is a slice of the last axis of `source`."""
    if (
        not isinstance(node, fx.Node)
        or not ops.is_call(node, "slice")
        or node.args[0] is not source
    ):
        return None
    if not _is_last(source, ops.argument(node, "dim")):
        return None
    start, end, step = (ops.argument(node, name) for name in ("start", "end", "step"))
    size = _sizes(source)[-1]
    if not all(isinstance(item, int | None) for item in (start, end, size)):
        return None
    places = range(*slice(start, end, step).indices(size))
    return places.start, places.stop, places.step


def _is_last(node: fx.Node, dim: Any) -> bool:
    rank = node.meta["val"].dim()
    return isinstance(dim, int) and dim % rank == rank - 1


def _of_first_columns(turn: Turn) -> Turn | None:
    """Reads `cat(rotated(x[:r]), x[r:])` around a rotation of a slice."""
    part = turn.value
    joins = [user for user in turn.result.users if ops.is_call(user, "cat")]
    if not ops.is_call(part, "slice") or len(joins) != 1 or len(turn.result.users) != 1:
        return None
    source, join = part.args[0], joins[0]
    parts = ops.argument(join, "tensors")
    if not isinstance(source, fx.Node) or len(parts) != 2 or parts[0] is not turn.result:
        return None
    width, whole = _sizes(part)[-1], _sizes(source)[-1]
    fits = _slice(part, source) == (0, width, 1) and _slice(parts[1], source) == (width, whole, 1)
    if not fits or not _is_last(join, ops.argument(join, "dim")):
        return None
    nodes = turn.nodes | {join, part, parts[1]}
    return Turn(source, turn.cos, turn.sin, join, nodes, turn.interleaved)


def _sizes(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return list(value.shape) if isinstance(value, torch.Tensor) else [0]
