"""Attention whose heads share queries and keys, or whose values are wider than its keys.

%q8 = index_select(%q4, 1, [0, 0, 1, 1, 2, 2, 3, 3])
%k8 = repeat_interleave(%k4, 2, 1)                        ->    %y = redpass.clustered_attention(
%y = scaled_dot_product_attention(%q8, %k8, %v8)                    %q4, %k4, %v8, [0, 0, 1, ...])

PyTorch's flash kernel wants every head on its own, and keys and values of one width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from redpass import ops
from redpass.analysis.flow import Flow
from redpass.analysis.heads.spreads import Spread, head_count, spread
from redpass.analysis.provenance import Tracer
from redpass.analysis.structure import Structure
from redpass.codegen.patterns.site import Site
from redpass.plan import Ref, Skip
from redpass.program import Program

OP = "clustered_attention"
RULE = f"lower.{OP}"


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
    if sorted(set(query.heads)) != list(range(head_count(query.source))):
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
