"""Attention that rebuilds its keys from a cache of latents, rotates them, and attends.

%k = matmul(%latents, %up)                  latents [b, g, t, r], up [g, r, heads / g * d]
%k = rotated(views(%k))                                  ->    %y = redpass.latent_attention(
%y = scaled_dot_product_attention(%q, %k, %v)                %q, %latents, %up, %values, ...)

A linear on latents [b, t, r] is the same with one group. Values are rebuilt in one of these ways,
or are latents themselves, one for each group, whose way back stands behind the attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.analysis.flow import Flow
from redpass.analysis.heads.spreads import Spread, head_count, spread
from redpass.analysis.linears import Linear, linears, new_name
from redpass.analysis.provenance import Tracer
from redpass.analysis.rotary import has_equal_halves
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
    """Heads `[b, n, t, d]` that a matrix makes of latents.

    Attributes:
        latents: the node they are made of, `[b, t, r]`, or `[b, g, t, r]` where groups are apart.
        weight: name of the matrix.
        ups: it, as `[n, d, r]`.
        nodes: the nodes from the product to the heads.
    """

    latents: fx.Node
    weight: str
    ups: Tensor
    nodes: tuple[fx.Node, ...]

    @property
    def groups(self) -> int:
        """How many latents a position has."""
        shape = self.latents.meta["val"].shape
        return int(shape[1]) if len(shape) == 4 else 1

    def stored(self, program: Program) -> SetWeight:
        """The matrix as the op reads it: a view where strides allow."""
        return SetWeight(
            new_name(program, self.weight, "heads"), self.ups, f"{self.weight} by heads"
        )


def find(program: Program, structure: Structure) -> Iterator[Site | Skip]:
    """Yields every attention whose keys are rebuilt, for more positions than there are queries."""
    del structure
    flow, by_node = Flow(program), linears(program).by_node
    tracer = Tracer(flow)
    for node in program.graph.nodes:
        if not ops.is_call(node, "scaled_dot_product_attention"):
            continue
        query, key, value = (ops.argument(node, name) for name in ("query", "key", "value"))
        if query.meta["val"].dim() != 4 or _length(query) == _length(key):
            continue
        keys, values = spread(tracer, key), spread(tracer, value)
        turn = None if keys is None else read_turn(flow.peel(keys.source))
        if keys is None or values is None or turn is None:
            continue
        latents = _rebuilt(program, tracer, turn.value, by_node)
        if latents is None:
            continue
        kept = _rebuilt(program, tracer, values.source, by_node)
        found = _read(program, node, (keys, values), turn, latents, kept)
        yield Skip(RULE, node.name, found) if isinstance(found, str) else found


def _length(node: fx.Node) -> Any:
    return ops.expression(node.meta["val"].shape[2])


def _rebuilt(
    program: Program, tracer: Tracer, node: fx.Node, by_node: Mapping[str, Linear]
) -> Rebuilt | None:
    """Reads the heads of latents where there are more numbers in the heads than in a latent."""
    passed, made = [], node
    while ops.is_view(made) and isinstance(made.args[0], fx.Node):
        passed.append(made)
        made = made.args[0]
    shape = node.meta["val"].shape
    linear = by_node.get(made.name)
    if linear is not None and linear.bias is None:
        ups, weight = linear.matrix(program).unsqueeze(0), linear.weight
        latents = program.nodes[linear.input]
        fits = latents.meta["val"].dim() == 3
    else:
        operands = [arg for arg in made.args[:2] if isinstance(arg, fx.Node)]
        found = program.weight(operands[1]) if len(operands) == 2 else None
        if found is None or found.dim() != 3 or not ops.is_call(made, "matmul", "bmm"):
            return None
        latents, ups, weight = operands[0], found.mT, str(operands[1].target)
        sizes = latents.meta["val"].shape
        fits = len(sizes) == 4 and sizes[1] == len(ups)
    if not fits or len(shape) != 4 or ups.shape[1] <= ups.shape[2]:
        return None
    heads, width = int(shape[1]), int(shape[3])
    if not _is_in_order(tracer, made, node, passed, (len(ups), heads, width)):
        return None
    by_head = ups.reshape(heads, width, -1)
    return Rebuilt(latents, weight, by_head, (*passed, made))


def _is_in_order(
    tracer: Tracer,
    made: fx.Node,
    node: fx.Node,
    passed: list[fx.Node],
    sizes: tuple[int, int, int],
) -> bool:
    """Whether head `i` of `node` is the `i`-th part of what was made, and positions stay."""
    groups, heads, width = sizes
    shape = tracer.shape(made)
    if shape is None or heads % groups or shape[-1] * groups != heads * width:
        return False
    count = math.prod(shape) // (groups * shape[-1] * shape[0])
    lines = torch.arange(shape[0] * count * heads * width)
    labels = lines.reshape(shape[0], count, groups, shape[-1])
    start = labels.transpose(1, 2) if len(shape) == 4 else labels.flatten(2)
    found = tracer.run(passed, {made: start}).get(node)
    wanted = lines.reshape(shape[0], count, heads, width).transpose(1, 2)
    return (
        isinstance(found, Tensor) and found.shape == wanted.shape and bool((found == wanted).all())
    )


def _read(
    program: Program,
    node: fx.Node,
    spreads: tuple[Spread, Spread],
    turn: Turn,
    latents: Rebuilt,
    values: Rebuilt | None,
) -> Site | str:
    groups = latents.groups if values is None else values.groups
    if groups != latents.groups or (values is None and _heads(spreads[1]) != groups):
        return "its keys are rebuilt from latents and its values are not"
    if ops.argument(node, "dropout_p") or ops.argument(node, "is_causal"):
        return "it drops out scores, or is causal without a mask"
    count = node.meta["val"].shape[1]
    for item in spreads:
        heads = _heads(item)
        if item.over(count) != tuple(head * heads // count for head in range(count)):
            return "its heads are not spread evenly"
    tables = [table_of(table) for table in (turn.cos, turn.sin)]
    if turn.interleaved or None in tables:
        return "its keys are rotated in pairs, or by tables of another shape"
    found = [table for table in tables if table is not None]
    if not all(has_equal_halves(program, table) for table in found):
        return "its rotary tables are not two equal halves"
    return _site(program, node, spreads, turn, (latents, values), found)


def _heads(item: Spread) -> int:
    return head_count(item.source)


def _site(
    program: Program,
    node: fx.Node,
    spreads: tuple[Spread, Spread],
    turn: Turn,
    rebuilt: tuple[Rebuilt, Rebuilt | None],
    tables: list[fx.Node],
) -> Site:
    keys, values = rebuilt
    kept = spreads[1].source if values is None else values.latents
    weights = [item.stored(program) for item in rebuilt if item is not None]
    half = tables[0].meta["val"].shape[-1] // 2
    views = [_by_position(keys.latents), _by_position(kept)]
    views += [(aten.slice.Tensor, (Ref(table.name), -1, 0, half)) for table in tables]
    steps = [
        Insert(f"{node.name}_latent_{place}", target, args, node.name)
        for place, (target, args) in enumerate(views)
    ]
    latent, value_latent, cos, sin = (Ref(step.name) for step in steps)
    mask = ops.argument(node, "attn_mask")
    passed = {*turn.nodes, *keys.nodes, *(n for s in spreads for n in s.nodes)}
    passed |= set() if values is None else {*values.nodes}
    return Site(
        op=OP,
        results=(node.name,),
        arguments=(
            Ref(ops.argument(node, "query").name),
            latent,
            WeightRef(weights[0].name),
            value_latent,
            None if values is None else WeightRef(weights[1].name),
            cos,
            sin,
            None if mask is None else Ref(mask.name),
            False,
            ops.argument(node, "scale"),
        ),
        before=node.name,
        covers=frozenset({node.name, *(n.name for n in _only(passed, node))}),
        reason=f"keys of {head_count(turn.value)} heads are rebuilt from "
        f"{keys.groups * keys.ups.shape[2]} numbers a position",
        weights=tuple(weights),
        prepared=tuple(steps),
    )


def _by_position(latents: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    """The view `[b, t, g, r]` of latents."""
    if latents.meta["val"].dim() == 3:
        return aten.unsqueeze.default, (Ref(latents.name), 2)
    return aten.transpose.int, (Ref(latents.name), 1, 2)


def _only(nodes: set[fx.Node], end: fx.Node) -> Iterator[fx.Node]:
    """Those of `nodes` that nothing else reads."""
    return (n for n in nodes if all(user is end or user in nodes for user in n.users))
