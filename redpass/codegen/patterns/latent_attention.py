"""Attention that rebuilds its keys from a cache of latents, rotates them, and attends.

%k = linear(%latent, %up)                   latent [b, t, r], up [heads * d, r]
%k = rotated(transpose(view(%k)))                   ->    %y = redpass.latent_attention(
%y = scaled_dot_product_attention(%q, %k, %v)                 %q, %latent, %up, %values, ...)

Values are rebuilt by a linear of their own. Each of the two latents serves all heads: one group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from redpass import ops
from redpass.analysis.flow import Flow
from redpass.analysis.linears import Linear, linears, new_name
from redpass.analysis.provenance import Tracer
from redpass.analysis.rotary import has_equal_halves
from redpass.analysis.spreads import Spread, spread
from redpass.analysis.structure import Structure
from redpass.codegen.patterns.rotary import Turn, read_turn, table_of
from redpass.codegen.patterns.site import Site
from redpass.plan import Insert, Ref, SetWeight, Skip, WeightRef
from redpass.program import Program

aten = torch.ops.aten
OP = "latent_attention"
RULE = f"lower.{OP}"


@dataclass(frozen=True, eq=False)
class Rebuilt:
    """Heads `[b, n, t, d]` that a linear makes of latents `[b, t, r]`.

    Attributes:
        linear: the linear, without bias.
        heads: how many heads.
        nodes: the nodes from the linear to the heads.
    """

    linear: Linear
    heads: int
    nodes: tuple[fx.Node, ...]

    def weight(self, program: Program) -> SetWeight:
        """The weight as `[heads, d, r]`: a view."""
        matrix = self.linear.matrix(program)
        name = new_name(program, self.linear.weight, "heads")
        view = matrix.unflatten(0, (self.heads, -1))
        return SetWeight(name, view, f"{self.linear.weight} by heads")


def find(program: Program, structure: Structure) -> Iterator[Site | Skip]:
    """Yields every attention whose keys are rebuilt, for more positions than there are queries."""
    del structure
    tracer, by_node = Tracer(Flow(program)), linears(program).by_node
    for node in program.graph.nodes:
        if not ops.is_call(node, "scaled_dot_product_attention"):
            continue
        query, key, value = (ops.argument(node, name) for name in ("query", "key", "value"))
        if query.meta["val"].dim() != 4 or _length(query) == _length(key):
            continue
        keys, values = spread(tracer, key), spread(tracer, value)
        turn = None if keys is None else read_turn(keys.source)
        if keys is None or values is None or turn is None:
            continue
        latents = _rebuilt(turn.value, by_node)
        if latents is None:
            continue
        found = _read(program, node, (keys, values), turn, latents, by_node)
        yield Skip(RULE, node.name, found) if isinstance(found, str) else found


def _length(node: fx.Node) -> Any:
    return ops.expression(node.meta["val"].shape[2])


def _rebuilt(node: fx.Node, by_node: Any) -> Rebuilt | None:
    """Reads `transpose(view(linear(latent)), 1, 2)` where the linear makes more of less."""
    split = node.args[0] if ops.is_call(node, "transpose") else None
    if not isinstance(split, fx.Node) or set(node.args[1:]) != {1, 2}:
        return None
    flat = split.args[0] if ops.is_call(split, "view", "reshape", "unflatten") else None
    linear = by_node.get(flat.name) if isinstance(flat, fx.Node) else None
    if linear is None or linear.bias is not None or linear.outs <= linear.ins:
        return None
    assert isinstance(flat, fx.Node)
    shape = split.meta["val"].shape
    lead = [ops.expression(size) for size in shape[:2]]
    fits = len(shape) == 4 and lead == [ops.expression(n) for n in flat.meta["val"].shape[:2]]
    return Rebuilt(linear, int(shape[2]), (flat, split, node)) if fits else None


def _read(
    program: Program,
    node: fx.Node,
    spreads: tuple[Spread, Spread],
    turn: Turn,
    latents: Rebuilt,
    by_node: Any,
) -> Site | str:
    values = _rebuilt(spreads[1].source, by_node)
    if values is None:
        return "its keys are rebuilt from latents and its values are not"
    if ops.argument(node, "dropout_p") or ops.argument(node, "is_causal"):
        return "it drops out scores, or is causal without a mask"
    count = node.meta["val"].shape[1]
    for item in spreads:
        heads = item.source.meta["val"].shape[1]
        if item.over(count) != tuple(head * heads // count for head in range(count)):
            return "its heads are not spread evenly"
    tables = [table_of(table) for table in (turn.cos, turn.sin)]
    if turn.interleaved or None in tables:
        return "its keys are rotated in pairs, or by tables of another shape"
    found = [table for table in tables if table is not None]
    if not all(has_equal_halves(program, table) for table in found):
        return "its rotary tables are not two equal halves"
    return _site(program, node, spreads, turn, (latents, values), found)


def _site(
    program: Program,
    node: fx.Node,
    spreads: tuple[Spread, Spread],
    turn: Turn,
    rebuilt: tuple[Rebuilt, Rebuilt],
    tables: list[fx.Node],
) -> Site:
    keys, values = rebuilt
    weights = [item.weight(program) for item in rebuilt]
    half = tables[0].meta["val"].shape[-1] // 2
    views: list[tuple[Any, tuple[Any, ...]]] = [
        (aten.unsqueeze.default, (Ref(item.linear.input), 2)) for item in rebuilt
    ]
    views += [(aten.slice.Tensor, (Ref(table.name), -1, 0, half)) for table in tables]
    steps = [
        Insert(f"{node.name}_latent_{place}", target, args, node.name)
        for place, (target, args) in enumerate(views)
    ]
    latent, value_latent, cos, sin = (Ref(step.name) for step in steps)
    mask = ops.argument(node, "attn_mask")
    passed = {*turn.nodes, *keys.nodes, *values.nodes, *(n for s in spreads for n in s.nodes)}
    return Site(
        op=OP,
        results=(node.name,),
        arguments=(
            Ref(ops.argument(node, "query").name),
            latent,
            WeightRef(weights[0].name),
            value_latent,
            WeightRef(weights[1].name),
            cos,
            sin,
            None if mask is None else Ref(mask.name),
            False,
            ops.argument(node, "scale"),
        ),
        before=node.name,
        covers=frozenset({node.name, *(n.name for n in _only(passed, node))}),
        reason=f"keys of {keys.heads} heads are rebuilt from {keys.linear.ins} numbers a position",
        weights=tuple(weights),
        prepared=tuple(steps),
    )


def _only(nodes: set[fx.Node], end: fx.Node) -> Iterator[fx.Node]:
    """Those of `nodes` that nothing else reads."""
    return (n for n in nodes if all(user is end or user in nodes for user in n.users))
