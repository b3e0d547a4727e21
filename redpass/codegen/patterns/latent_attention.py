"""Attention that rebuilds its keys from a cache of latents, rotates them, and attends.

%k = matmul(%latents, %up)                  latents [b, g, t, r], up [g, r, heads / g * d]
%k = rotated(normed(%k))                                 ->    %y = redpass.latent_attention(
%y = scaled_dot_product_attention(%q, %k, %v)                %q, %latents, %up, %values, ...)

A linear on latents [b, t, r] is the same with one group. Values are rebuilt in one of these ways,
or are latents themselves, one for each group, whose way back stands behind the attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from redpass import ops
from redpass.analysis.flow import Flow
from redpass.analysis.heads.spreads import Spread, head_count, spread
from redpass.analysis.linears import linears, new_name
from redpass.analysis.provenance import Tracer
from redpass.analysis.records import Norm
from redpass.analysis.rotary import has_equal_halves
from redpass.analysis.structure import Structure
from redpass.codegen.patterns.add_norm import over_last_axis
from redpass.codegen.patterns.rebuilt import Reader, Rebuilt
from redpass.codegen.patterns.rotary import Turn, read_turn, table_of
from redpass.codegen.patterns.site import Site
from redpass.plan import Insert, Ref, SetWeight, Skip, WeightRef
from redpass.program import Program

aten = torch.ops.aten
OP = "latent_attention"
RULE = f"lower.{OP}"

NORMED = "its keys are normalised otherwise than by the root mean square of a head"


def find(program: Program, structure: Structure) -> Iterator[Site | Skip]:
    """Yields every attention whose keys are rebuilt, for more positions than there are queries."""
    flow, norms = Flow(program), {norm.output: norm for norm in structure.norms}
    tracer = Tracer(flow)
    reader = Reader(program, tracer, linears(program).by_node, norms)
    for node in program.graph.nodes:
        if not ops.is_call(node, "scaled_dot_product_attention"):
            continue
        query, key, value = (ops.argument(node, name) for name in ("query", "key", "value"))
        if query.meta["val"].dim() != 4 or _length(query) == _length(key):
            continue
        keys, values = spread(tracer, key), spread(tracer, value)
        turn = None if keys is None else _turn(flow, keys.source)
        if keys is None or values is None or turn is None:
            continue
        latents = reader.read(turn.value)
        if latents is None:
            continue
        kept = reader.read(values.source)
        found = _read(program, node, (keys, values), turn, latents, kept)
        yield Skip(RULE, node.name, found) if isinstance(found, str) else found


def _length(node: fx.Node) -> Any:
    return ops.expression(node.meta["val"].shape[2])


def _turn(flow: Flow, heads: fx.Node) -> Turn | None:
    """The rotation of keys, whole or of their first columns."""
    node = flow.peel(heads)
    if ops.is_call(node, "cat"):
        node = ops.argument(node, "tensors")[0]
    return read_turn(node)


def _read(
    program: Program,
    node: fx.Node,
    spreads: tuple[Spread, Spread],
    turn: Turn,
    latents: Rebuilt,
    values: Rebuilt | None,
) -> Site | str:
    if latents.shifted or (latents.norm and _norm_fault(program, latents.norm, turn.value)):
        return "a bias is added to its keys" if latents.shifted else NORMED
    values = None if values is None or values.shifted or values.norm else values
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
    if found[0].meta["val"].shape[-1] != turn.value.meta["val"].shape[-1]:
        return "its keys are rotated in part"
    if not all(has_equal_halves(program, table) for table in found):
        return "its rotary tables are not two equal halves"
    return _site(program, node, spreads, turn, (latents, values), found)


def _norm_fault(program: Program, norm: Norm, heads: fx.Node) -> str:
    """Why the kernel does not normalise keys so."""
    value, width = program.nodes[norm.output].meta["val"], heads.meta["val"].shape[-1]
    gain = None if norm.weight is None else program.weights[norm.weight]
    is_plain = norm.kind == "rms" and norm.eps is not None and norm.bias is None
    fits = gain is None or (tuple(gain.shape) == (width,) and gain.dtype == value.dtype)
    same = value.dtype == program.nodes[norm.input].meta["val"].dtype == heads.meta["val"].dtype
    return "" if is_plain and fits and same and over_last_axis(program, norm, width) else NORMED


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
    gain, fresh = _gain(program, keys.norm)
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
            gain,
            None if keys.norm is None else keys.norm.eps,
        ),
        before=node.name,
        covers=frozenset({node.name, *(n.name for n in _only(passed, node))}),
        reason=f"keys of {head_count(turn.value)} heads are rebuilt from "
        f"{keys.groups * keys.ups.shape[2]} numbers a position",
        weights=(*weights, *fresh),
        prepared=tuple(steps),
    )


def _gain(program: Program, norm: Norm | None) -> tuple[WeightRef | None, tuple[SetWeight, ...]]:
    """What normalised keys are multiplied by, and the weight that is new."""
    if norm is None or norm.weight is None:
        return None, ()
    if not norm.offset:
        return WeightRef(norm.weight), ()
    fresh = new_name(program, norm.weight, "gain")
    gain = program.weights[norm.weight] + norm.offset
    return WeightRef(fresh), (SetWeight(fresh, gain, f"{norm.weight}, stored around zero"),)


def _by_position(latents: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    """The view `[b, t, g, r]` of latents."""
    if latents.meta["val"].dim() == 3:
        return aten.unsqueeze.default, (Ref(latents.name), 2)
    return aten.transpose.int, (Ref(latents.name), 1, 2)


def _only(nodes: set[fx.Node], end: fx.Node) -> Iterator[fx.Node]:
    """Those of `nodes` that nothing else reads."""
    return (n for n in nodes if all(user is end or user in nodes for user in n.users))
