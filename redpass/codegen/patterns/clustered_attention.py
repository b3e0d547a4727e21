"""Attention whose heads share queries and keys, or whose values are wider than its keys.

%q8 = index_select(%q4, 1, [0, 0, 1, 1, 2, 2, 3, 3])
%k8 = repeat_interleave(%k4, 2, 1)                        ->    %y = redpass.clustered_attention(
%y = scaled_dot_product_attention(%q8, %k8, %v8)                    %q4, %k4, %v8, [0, 0, 1, ...])

PyTorch's flash kernel wants every head on its own, and keys and values of one width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from redpass import ops
from redpass.analysis.flow import Flow
from redpass.analysis.provenance import MOVES, Tracer
from redpass.analysis.structure import Structure
from redpass.codegen.patterns.site import Site
from redpass.plan import Ref, Skip
from redpass.program import Program

OP = "clustered_attention"
RULE = f"lower.{OP}"
HEADS = 1
"""The axis of the heads."""


@dataclass(frozen=True, eq=False)
class Spread:
    """A value of many heads that are taken from one of fewer.

    Attributes:
        source: the value of fewer heads.
        heads: which of its heads each head is.
        nodes: the nodes that spread them.
    """

    source: fx.Node
    heads: tuple[int, ...]
    nodes: tuple[fx.Node, ...]

    def over(self, count: int) -> tuple[int, ...]:
        """Which head of the source each of `count` readers reads, spread evenly in order."""
        return tuple(self.heads[reader * len(self.heads) // count] for reader in range(count))


def find(program: Program, structure: Structure) -> Iterator[Site | Skip]:
    """Yields every fused attention with shared scores or wide values."""
    del structure
    tracer = Tracer(Flow(program))
    for node in program.graph.nodes:
        if not ops.is_call(node, "scaled_dot_product_attention"):
            continue
        operands = [ops.argument(node, name) for name in ("query", "key", "value")]
        if any(item.meta["val"].dim() != 4 for item in operands):
            continue
        spreads = [item for item in (spread(tracer, operand) for operand in operands) if item]
        if len(spreads) != 3:
            continue
        query, key, value = spreads
        count, widths = len(query.heads), [item.meta["val"].shape[3] for item in operands[1:]]
        if len(set(query.heads)) == count and widths[0] == widths[1]:
            continue
        reason = _why_not(node, query, key)
        yield Skip(RULE, node.name, reason) if reason else _site(node, query, key, value)


def _why_not(node: fx.Node, query: Spread, key: Spread) -> str:
    if ops.argument(node, "dropout_p"):
        return "it drops out scores"
    pairs = set(zip(query.heads, key.over(len(query.heads)), strict=True))
    if len(pairs) != len(set(query.heads)):
        return "heads that share queries read different keys"
    if sorted(set(query.heads)) != list(range(_heads(query.source))):
        return "some queries are read by no head"
    mask = ops.argument(node, "attn_mask")
    shape: tuple[Any, ...] = () if mask is None else tuple(mask.meta["val"].shape)
    if len(shape) >= 3 and shape[-3] != 1:
        return "its mask differs from head to head"
    return ""


def _site(node: fx.Node, query: Spread, key: Spread, value: Spread) -> Site:
    count = len(query.heads)
    keys = dict(zip(query.heads, key.over(count), strict=True))
    mask = ops.argument(node, "attn_mask")
    clusters = len(keys)
    inner = [n for item in (query, key, value) for n in item.nodes]
    own = {n.name for n in inner if all(user is node or user in inner for user in n.users)}
    scores = f"{count} heads share {clusters} score matrices"
    return Site(
        op=OP,
        results=(node.name,),
        arguments=(
            Ref(query.source.name),
            Ref(key.source.name),
            Ref(value.source.name),
            list(query.heads),
            [keys[cluster] for cluster in range(clusters)],
            list(value.over(count)),
            None if mask is None else Ref(mask.name),
            bool(ops.argument(node, "is_causal")),
            0,
            ops.argument(node, "scale"),
        ),
        before=node.name,
        covers=frozenset(own | {node.name}),
        reason=scores if clusters < count else "its values are not as wide as its keys",
    )


def _heads(node: fx.Node) -> int:
    return int(node.meta["val"].shape[HEADS])


def spread(tracer: Tracer, node: fx.Node) -> Spread | None:
    """Returns where the heads of a value come from: the value of fewest heads, itself if none.

    None where the number of heads is not fixed.
    """
    heads = node.meta["val"].shape[HEADS]
    if not isinstance(heads, int):
        return None
    found = Spread(node, tuple(range(heads)), ())
    passed: list[fx.Node] = []
    current: Any = node
    while isinstance(current, fx.Node) and (ops.is_view(current) or ops.is_call(current, *MOVES)):
        passed.append(current)
        current = current.args[0]
        moved = _moved(tracer, current, node, passed)
        if moved is not None and _heads(current) < _heads(found.source):
            found = Spread(current, moved, tuple(passed))
    return found


def _moved(
    tracer: Tracer, source: Any, node: fx.Node, passed: list[fx.Node]
) -> tuple[int, ...] | None:
    """Which head of `source` each head of `node` is; None when another axis is moved too."""
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.dim() != 4:
        return None
    heads: tuple[int, ...] | None = None
    for axis in range(4):
        labels = tracer.source(source, 0, axis)
        if labels is None:
            return None
        traced = tracer.run(passed, {source: labels}).get(node)
        if not isinstance(traced, torch.Tensor) or traced.dim() != 4:
            return None
        line = traced.movedim(axis, 0).flatten(1)
        if (line != line[:, :1]).any():
            return None
        found = tuple(line[:, 0].tolist())
        if axis == HEADS:
            heads = found
        elif found != tuple(range(labels.shape[axis])):
            return None
    return heads
