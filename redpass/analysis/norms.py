"""Normalisations, as fused ops or spelled out: powers, means and reciprocal roots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from redpass import ops
from redpass.analysis.flow import Flow
from redpass.analysis.records import Norm

FUSED = {
    "layer_norm": "layer",
    "native_layer_norm": "layer",
    "rms_norm": "rms",
    "_fused_rms_norm": "rms",
    "group_norm": "group",
    "native_group_norm": "group",
    "batch_norm": "batch",
    "_native_batch_norm_legit_no_training": "batch",
}


def find_norms(flow: Flow) -> tuple[Norm, ...]:
    """Finds every normalisation of a value that depends on an input, in graph order."""
    found = [norm for node in flow.nodes if node in flow.live for norm in _norms_at(flow, node)]
    return tuple(sorted(found, key=lambda norm: flow.order[flow.program.nodes[norm.output]]))


def _norms_at(flow: Flow, node: fx.Node) -> Iterator[Norm]:
    name = ops.base_name(node)
    if name in FUSED and ops.namespace(node) == "aten":
        yield _fused(flow, node, FUSED[name])
    elif name == "rsqrt" or (name == "pow" and _exponent(flow, node) == -0.5):
        yield from _spelled(flow, node, node.args[0], ("mul",))
    elif name == "sqrt" or (name == "pow" and _exponent(flow, node) == 0.5):
        yield from _spelled(flow, node, node.args[0], ("div",))
    elif name in ("linalg_vector_norm", "norm"):
        yield from _unit(flow, node)


def _fused(flow: Flow, node: fx.Node, kind: str) -> Norm:
    output = node
    if isinstance(node.meta.get("val"), tuple | list):
        output = next((u for u in node.users if u.args[1:] == (0,)), node)
    eps = flow.scalar(ops.argument(node, "eps", "epsilon"))
    weight, bias = (_optional(flow, node, name) for name in ("weight", "bias"))
    names = frozenset({node.name, output.name})
    return Norm(kind, output.name, _first(node).name, weight, bias, eps, 0.0, names)


def _optional(flow: Flow, node: fx.Node, name: str) -> str | None:
    try:
        return flow.weight_of(ops.argument(node, name))
    except KeyError:
        return None


def _spelled(flow: Flow, root: fx.Node, inside: Any, uses: tuple[str, ...]) -> Iterator[Norm]:
    """A norm around `root`, the (reciprocal) root of a mean square."""
    mean, eps = _without_eps(flow, inside)
    square = _squared(flow, mean)
    if square is None:
        return
    for product in flow.readers(root):
        if not ops.is_call(product, *uses):
            continue
        scaled = _other(product, root, flow)
        if scaled is None or not _is_same(flow, flow.peel(scaled), flow.peel(square)):
            continue
        centre = flow.peel(scaled)
        source = _centred(flow, centre)
        kind = "rms" if source is None else "layer"
        output, weight, offset, bias = _affine(flow, product)
        start = flow.peel(centre) if source is None else source
        nodes = frozenset(n.name for n in flow.between(start, output))
        yield Norm(kind, output.name, start.name, weight, bias, eps, offset, nodes)


def _is_same(flow: Flow, left: fx.Node, right: fx.Node) -> bool:
    """Whether both are one value, or the same value centred twice."""
    if left is right:
        return True
    source = _centred(flow, left)
    return source is not None and source is _centred(flow, right)


def _unit(flow: Flow, node: fx.Node) -> Iterator[Norm]:
    source = flow.peel(_first(node))
    for clamp in (node, *(r for r in flow.readers(node) if ops.is_call(r, "clamp_min", "clamp"))):
        for quotient in flow.readers(clamp):
            if ops.is_call(quotient, "div") and flow.peel(_first(quotient)) is source:
                nodes = frozenset(n.name for n in flow.between(source, quotient))
                yield Norm("l2", quotient.name, source.name, None, None, None, 0.0, nodes)
                return


def _without_eps(flow: Flow, inside: Any) -> tuple[fx.Node | None, float | None]:
    if not isinstance(inside, fx.Node):
        return None, None
    if ops.is_call(inside, "add"):
        for value, other in (inside.args[:2], inside.args[1::-1]):
            number = flow.scalar(other)
            if number is not None and isinstance(value, fx.Node):
                return value, number
    return inside, None


def _squared(flow: Flow, mean: fx.Node | None) -> fx.Node | None:
    """The value whose squares `mean` averages over the last axis, or None."""
    if mean is None:
        return None
    mean = flow.peel(mean)
    if ops.is_call(mean, "var"):
        return _centre_of_variance(flow, mean)
    if not ops.is_call(mean, "mean") or len(mean.args) < 2:
        return None
    square = flow.peel(_first(mean))
    if ops.is_call(square, "pow") and _exponent(flow, square) == 2:
        return _first(square)
    if ops.is_call(square, "mul") and square.args[0] is square.args[1]:
        return _first(square)
    return _first(square) if ops.is_call(square, "square") else None


def _centre_of_variance(flow: Flow, variance: fx.Node) -> fx.Node | None:
    source = flow.peel(_first(variance))
    centred = (r for r in flow.readers(source) if _centred(flow, r) is source)
    return next(centred, None)


def _centred(flow: Flow, node: fx.Node) -> fx.Node | None:
    """`x` when `node` is `x - mean(x)`, else None."""
    if not ops.is_call(node, "sub") or not isinstance(node.args[1], fx.Node):
        return None
    source, mean = flow.peel(_first(node)), flow.peel(node.args[1])
    if ops.is_call(mean, "mean") and flow.peel(_first(mean)) is source:
        return source
    return None


def _affine(flow: Flow, product: fx.Node) -> tuple[fx.Node, str | None, float, str | None]:
    """Follows gain and bias after the normalised value: (output, weight, offset, bias)."""
    output, weight, offset, bias = product, None, 0.0, None
    gain = _sole_static(flow, output, "mul")
    if gain is not None:
        output, value = gain
        weight, offset = _gain(flow, value)
    shift = _sole_static(flow, output, "add")
    if shift is not None and flow.weight_of(shift[1]) is not None:
        output, bias = shift[0], flow.weight_of(shift[1])
    return output, weight, offset, bias


def _sole_static(flow: Flow, node: fx.Node, op: str) -> tuple[fx.Node, fx.Node] | None:
    """The only reader and its other operand when that is a `op` with a vector of weights."""
    readers = list(flow.readers(node))
    if len(readers) != 1 or not ops.is_call(readers[0], op):
        return None
    other = _other(readers[0], node, flow)
    if other is None or other in flow.live:
        return None
    sizes = [size for size in flow.shape(other) or () if size != 1]
    return (readers[0], other) if len(sizes) == 1 else None


def _gain(flow: Flow, value: fx.Node) -> tuple[str | None, float]:
    value = flow.peel(value)
    if ops.is_call(value, "add"):
        for left, right in (value.args[:2], value.args[1::-1]):
            weight, number = flow.weight_of(left), flow.scalar(right)
            if weight is not None and number is not None:
                return weight, number
    return flow.weight_of(value), 0.0


def _other(node: fx.Node, operand: fx.Node, flow: Flow) -> fx.Node | None:
    """The tensor operand of a binary op that is not `operand` seen through no-ops."""
    target = flow.peel(operand)
    rest = [a for a in node.args[:2] if isinstance(a, fx.Node) and flow.peel(a) is not target]
    return rest[0] if len(rest) == 1 else None


def _first(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


def _exponent(flow: Flow, node: fx.Node) -> float | None:
    return flow.scalar(node.args[1]) if len(node.args) > 1 else None
