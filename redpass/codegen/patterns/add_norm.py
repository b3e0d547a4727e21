"""A residual add and the norm that reads it.

%add = add.Tensor(%x, %branch)                %op = redpass.add_norm(%x, %branch, %g, None, 1e-6)
%n = rms_norm(%add, [64], %g, 1e-6)    ->     %add, %n = %op
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from redpass import ops
from redpass.analysis.records import Norm
from redpass.analysis.structure import Structure
from redpass.codegen.patterns.site import Site, reader_outside
from redpass.plan import Ref, Skip, WeightRef
from redpass.program import Program

RULE = "lower.add_norm"
FUSED = ("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
KINDS = {"rms": "rms", "layer": "layer"}


def find(program: Program, structure: Structure) -> Iterator[Site | Skip]:
    """Yields every add whose sum a norm over the last axis reads; one norm an add."""
    taken: set[str] = set()
    for norm in structure.norms:
        node = program.nodes[norm.input]
        if norm.kind not in KINDS or not ops.is_call(node, "add"):
            continue
        reason = _why_not(program, node, norm)
        if not reason and node.name in taken:
            reason = f"another norm of {node.name} is lowered with it"
        if reason:
            yield Skip(RULE, norm.output, reason)
            continue
        taken.add(node.name)
        yield _site(node, norm)


def _site(add: fx.Node, norm: Norm) -> Site:
    left, right = (Ref(operand.name) for operand in add.all_input_nodes)
    weight, bias = (WeightRef(name) if name else None for name in (norm.weight, norm.bias))
    return Site(
        op="add_norm",
        results=(add.name, norm.output),
        arguments=(left, right, weight, bias, norm.eps, KINDS[norm.kind]),
        before=add.name,
        covers=norm.nodes | {add.name},
        reason=f"the {norm.kind} norm {norm.output} reads the sum {add.name}",
    )


def _why_not(program: Program, add: fx.Node, norm: Norm) -> str:
    operands = add.all_input_nodes
    if len(operands) != 2 or ops.argument(add, "alpha") != 1:
        return "the add has a constant operand or a factor"
    layouts = [_form(node) for node in (*operands, add)]
    if layouts[0] != layouts[1]:
        return "the two summands differ in shape or dtype"
    if norm.eps is None:
        return "the norm's eps is no constant"
    if norm.offset:
        return "the norm's gain is stored around one"
    return _norm_fault(program, add, norm)


def _norm_fault(program: Program, add: fx.Node, norm: Norm) -> str:
    output = program.nodes[norm.output]
    if _form(output) != _form(add):
        return "the norm changes shape or dtype"
    width = add.meta["val"].shape[-1]
    for name in (norm.weight, norm.bias):
        if name and tuple(program.weights[name].shape) != (width,):
            return f"'{name}' is not one number a column"
        if name and program.weights[name].dtype != add.meta["val"].dtype:
            return f"'{name}' has another dtype than the sum"
    if not over_last_axis(program, norm, width):
        return "the norm does not run over the last axis alone"
    inside = norm.nodes | {add.name}
    if read := reader_outside(program, inside, (*_copies(add), norm.output)):
        return f"'{read}' inside the norm is read elsewhere too"
    return ""


def _copies(add: fx.Node) -> list[str]:
    """The sum and what holds it once more, such as a cast to its own dtype: all may be read."""
    found = [add]
    for node in found:
        users = (user for user in node.users if ops.is_call(user, *ops.CASTS, *ops.COPIES))
        found += [user for user in users if _form(user) == _form(add)]
    return [node.name for node in found]


def over_last_axis(program: Program, norm: Norm, width: Any) -> bool:
    """Whether every mean, variance or fused norm among a norm's nodes takes the last axis alone."""
    if not isinstance(width, int):
        return False
    for name in norm.nodes:
        node = program.nodes[name]
        if ops.is_call(node, *FUSED):
            if list(ops.argument(node, "normalized_shape")) != [width]:
                return False
        elif ops.is_call(node, "mean", "var"):
            last = node.all_input_nodes[0].meta["val"].dim() - 1
            dims = ops.argument(node, "dim")
            if [dim % (last + 1) for dim in dims or ()] != [last]:
                return False
    return True


def _form(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    return value.dtype, [ops.expression(size) for size in value.shape]
