"""The channels of a hidden layer: which are constant, which may be rescaled, how some are cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.analysis.hidden_layers import HiddenLayer
from redpass.analysis.linears import Linear, new_name
from redpass.plan import Edit, Insert, Ref, Replace, SetWeight, WeightRef
from redpass.program import Program

POSITIVE = frozenset({"relu", "leaky_relu", "abs"})
"""`f(s x) = s f(x)` for every s > 0."""

EXACT, ANY = "exact", "any"
FREEDOMS = (EXACT, "positive", ANY)


def constants(layer: HiddenLayer, program: Program) -> tuple[Tensor, Tensor]:
    """Returns which channels have one value for every input, and these values in float64.

    Both are `[width]`; values of the other channels mean nothing.
    """
    known: dict[fx.Node, tuple[Tensor, Tensor]] = {}
    for linear in layer.first:
        offset = linear.offset(program)
        zero = (linear.matrix(program) == 0).all(dim=1)
        value = torch.zeros(linear.outs) if offset is None else offset
        known[program.nodes[linear.node]] = zero, value.double()
    for vector in layer.vectors:
        value = program.weights[str(vector.target)].double()
        known[vector] = torch.ones_like(value, dtype=torch.bool), value
    for node in layer.nodes:
        known[node] = _constant(node, known)
    return known[program.nodes[layer.second.input]]


def _constant(node: fx.Node, known: dict[fx.Node, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    operands = [known[o] for o in node.all_input_nodes if o in known]
    if not ops.is_elementwise(node):
        return operands[0]
    args = fx.node.map_arg(node.args, lambda n: known[n][1])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: known[n][1])
    value = node.target(*args, **kwargs)  # type: ignore[operator]
    is_constant = torch.stack([mask for mask, _ in operands]).all(dim=0)
    if ops.is_call(node, "mul"):
        zero = torch.stack([mask & (v == 0) for mask, v in operands]).any(dim=0)
        is_constant, value = is_constant | zero, torch.where(zero, 0.0, value)
    return is_constant, value


def freedom(layer: HiddenLayer, linear: Linear, program: Program) -> str:
    """Returns by which factors a row of `linear` scales its channel along.

    `any`: the channel is linear in it; `positive`: by every factor above zero; `exact`: only 1.
    """
    free = {program.nodes[linear.node]: ANY}
    for node in layer.nodes:
        found = [free[o] for o in node.args if isinstance(o, fx.Node) and o in free]
        if found:
            free[node] = found[0] if len(found) == 1 else EXACT
            if ops.base_name(node) in POSITIVE:
                free[node] = min(free[node], "positive", key=FREEDOMS.index)
            elif ops.is_elementwise(node) and not ops.is_call(node, "mul", "neg"):
                free[node] = EXACT
    return free[program.nodes[layer.second.input]]


def most_cut(count: int, width: int, multiple: int) -> int:
    """Returns how many of `count` channels can go so that a multiple of `multiple` is left."""
    counts = range(min(count, width - 1), 0, -1)
    return next((n for n in counts if (width - n) % multiple == 0), 0)


def narrowed(
    layer: HiddenLayer, program: Program, keep: Tensor, matrix: Tensor, offset: Tensor | None
) -> Iterator[Edit]:
    """Yields the edits that leave only the channels `keep` (indices).

    Args:
        matrix: `[outs, kept]`, the new matrix of the second linear.
        offset: its new bias, or None to keep the one it has.
    """
    names: dict[str, str] = {}
    for linear in layer.first:
        yield from _first(linear, program, keep, names)
    place = layer.second.node
    vectors = {v: new_name(program, str(v.target), f"kept_by_{place}") for v in layer.vectors}
    for vector, name in vectors.items():
        yield SetWeight(name, program.weights[str(vector.target)][keep], str(vector.target))
    for node in layer.nodes:
        names[node.name] = f"{node.name}_kept"
        yield _again(node, names, vectors, len(keep))
    second = layer.second
    weight, bias = new_name(program, second.weight, "kept"), second.bias
    yield second.store(weight, matrix, second.weight)
    if offset is not None:
        bias = f"{weight}_bias"
        yield SetWeight(bias, offset, second.bias or second.weight)
    yield second.call(f"{second.node}_kept", names[second.input], weight, bias, second.node)
    yield Replace(second.node, f"{second.node}_kept")


def _first(linear: Linear, program: Program, keep: Tensor, names: dict[str, str]) -> Iterator[Edit]:
    weight, bias = new_name(program, linear.weight, "kept"), None
    yield linear.store(weight, linear.matrix(program)[keep], linear.weight)
    if linear.bias:
        bias = new_name(program, linear.bias, "kept")
        yield SetWeight(bias, program.weights[linear.bias][keep], linear.bias)
    names[linear.node] = f"{linear.node}_kept"
    yield linear.call(names[linear.node], linear.input, weight, bias, linear.node)


def _again(node: fx.Node, names: dict[str, str], vectors: dict[fx.Node, str], width: int) -> Insert:
    """Returns the edit that computes `node` on the narrowed operands."""

    def operand(value: fx.Node) -> Any:
        if value in vectors:
            return WeightRef(vectors[value])
        return Ref(names.get(value.name, value.name))

    args: Any = fx.node.map_arg(node.args, operand)
    if ops.is_call(node, *ops.RESHAPES):
        args = (args[0], [*args[1][:-1], width if args[1][-1] != -1 else -1])
    target: Any = node.target
    kwargs: Any = fx.node.map_arg(node.kwargs, operand)
    return Insert(names[node.name], target, args, node.name, kwargs)
