"""A linear layer in two thin factors, with its activation.

%m = linear(%x, %down)
%y = linear(%m, %up, %bias)       ->    %z = redpass.low_rank_linear(%x, %down, %up, %bias, silu)
%z = silu(%y)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from redpass import ops
from redpass.analysis.linears import Linear, linears, new_name
from redpass.analysis.structure import Structure
from redpass.codegen.patterns.gated_feed_forward import ACTIVATIONS, activation_of
from redpass.codegen.patterns.site import Site
from redpass.plan import Ref, SetWeight, Skip, WeightRef
from redpass.program import Program

OP = "low_rank_linear"
RULE = f"lower.{OP}"


def find(program: Program, structure: Structure) -> Iterator[Site | Skip]:
    """Yields every linear that alone reads a linear, where the two have fewer weights than one."""
    del structure
    by_node = linears(program).by_node
    for up in by_node.values():
        down = by_node.get(up.input)
        if down is None or not _is_thin(down, up):
            continue
        reason = _why_not(program, down)
        yield Skip(RULE, up.node, reason) if reason else _site(program, down, up)


def _is_thin(down: Linear, up: Linear) -> bool:
    return down.outs * (down.ins + up.outs) < down.ins * up.outs


def _why_not(program: Program, down: Linear) -> str:
    if down.bias is not None:
        return "the inner linear has a bias"
    if len(program.nodes[down.node].users) != 1:
        return "the thin middle is read elsewhere too"
    return ""


def _site(program: Program, down: Linear, up: Linear) -> Site:
    last, activation = _activation(program.nodes[up.node])
    factors = [_matrix(program, linear) for linear in (down, up)]
    bias = WeightRef(up.bias) if up.bias else None
    covers = {down.node, up.node, last.name}
    return Site(
        op=OP,
        results=(last.name,),
        arguments=(Ref(down.input), *(item for item, _ in factors), bias, activation),
        before=last.name,
        covers=frozenset(covers),
        reason=f"{down.outs} numbers stand between {down.ins} inputs and {up.outs} outputs",
        weights=tuple(edit for _, edits in factors for edit in edits),
    )


def _matrix(program: Program, linear: Linear) -> tuple[Any, tuple[SetWeight, ...]]:
    """The matrix as `[outs, ins]`: the weight itself, or a view of it."""
    if not linear.transposed:
        return WeightRef(linear.weight), ()
    name = new_name(program, linear.weight, "turned")
    view = linear.matrix(program)
    return WeightRef(name), (SetWeight(name, view, f"the transpose of {linear.weight}"),)


def _activation(node: fx.Node) -> tuple[fx.Node, str]:
    """The activation that alone reads `node`, and its name; else `node` and none."""
    reader = next(iter(node.users), None)
    if len(node.users) == 1 and reader is not None and ops.is_call(reader, *ACTIVATIONS):
        return reader, activation_of(reader)
    return node, "none"
