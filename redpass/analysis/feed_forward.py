"""Feed-forward of a branch: up, gate and down projections and the activation between."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from redpass import ops
from redpass.analysis.flow import Flow
from redpass.analysis.maps import LinearMap, back_to_maps, feature_axis, linear_map
from redpass.analysis.provenance import Tracer, compact
from redpass.analysis.records import FeedForward, Projection

SHIFT = 32

NONLINEAR = (
    "gelu", "silu", "relu", "sigmoid", "tanh", "erf", "elu", "hardswish", "hardtanh", "mish",
    "softplus", "leaky_relu", "relu6", "celu", "selu", "glu", "log_sigmoid", "softmax", "exp",
    "hardsigmoid", "square", "sin", "cos",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Side:
    """One factor of the inner value: the features that make it and its nonlinear nodes."""

    rows: tuple[int, ...]
    nodes: tuple[fx.Node, ...]


def find_feed_forward(
    flow: Flow, tracer: Tracer, maps: Sequence[fx.Node]
) -> tuple[FeedForward, frozenset[fx.Node]] | None:
    """Describes the feed-forward that ends in the last of `maps`, and which maps it is made of.

    Returns None unless only places are kept between the maps: an op that mixes positions (a scan,
    a convolution) makes it something else.
    """
    down = linear_map(flow, maps[-1]) if maps else None
    if down is None or down.weight is None:
        return None
    nodes, above = back_to_maps(flow, down.source)
    first = [linear_map(flow, node) for node in above]
    if not 1 <= len(above) <= 2 or any(f is None or f.weight is None for f in first):
        return None
    known = _trace(tracer, nodes, above)
    inside = _inside(nodes, above)
    if down.source not in known or not all(node in known for node in inside):
        return None
    axis = feature_axis(down.node)
    gated = _gated(flow, known, inside, axis)
    if gated is None:
        if len(above) > 1:
            return None
        up, gate, acting = _side(flow, known, down.source, axis), None, None
        acting = up
    else:
        up, gate, acting = gated
    found = {node: made for node, made in zip(above, first, strict=True) if made is not None}
    record = FeedForward(
        up=_projection(up.rows, above, found),
        gate=None if gate is None else _projection(gate.rows, above, found),
        down=down.projection(down.in_axis, (range(len(up.rows)),)),
        inner=down.source.name,
        width=len(up.rows),
        activation=activation_name(flow, acting.nodes),
    )
    return record, frozenset({*above, down.node})


def _trace(
    tracer: Tracer, nodes: Iterable[fx.Node], maps: Sequence[fx.Node]
) -> dict[fx.Node, Tensor]:
    seeds = {}
    for number, made in enumerate(maps):
        source = tracer.source(made, number << SHIFT, feature_axis(made))
        if source is not None:
            seeds[made] = source
    return tracer.run(nodes, seeds)


def _inside(nodes: set[fx.Node], maps: Sequence[fx.Node]) -> list[fx.Node]:
    """Those of `nodes` that depend on the maps."""
    found: set[fx.Node] = set(maps)
    todo = list(maps)
    while todo:
        fresh = [user for user in todo.pop().users if user in nodes and user not in found]
        found.update(fresh)
        todo.extend(fresh)
    return [node for node in found if node in nodes]


def _gated(
    flow: Flow, known: Mapping[fx.Node, Tensor], inside: list[fx.Node], axis: int
) -> tuple[Side, Side, Side] | None:
    """(up, gate, the side with the activation) at a product of two sets of features."""
    for node in sorted(inside, key=flow.order.__getitem__):
        operands = [a for a in node.args[:2] if isinstance(a, fx.Node) and a in known]
        if not ops.is_call(node, "mul") or len(operands) != 2:
            continue
        left, right = (_side(flow, known, a, axis) for a in operands)
        if set(left.rows) & set(right.rows) or len(left.rows) != len(right.rows):
            continue
        if right.nodes and not left.nodes:
            left, right = right, left
        return right, left, left
    return None


def _side(flow: Flow, known: Mapping[fx.Node, Tensor], node: fx.Node, axis: int) -> Side:
    value = known[node]
    line = value.movedim(axis, -1).reshape(-1, value.shape[axis])[-1]
    above = [
        n for n in flow.ancestors([node], min(map(flow.order.__getitem__, known))) if n in known
    ]
    acting = sorted((n for n in above if _acts(n, known)), key=flow.order.__getitem__)
    return Side(tuple(line.tolist()), tuple(acting))


def _acts(node: fx.Node, known: Mapping[fx.Node, Tensor]) -> bool:
    if ops.is_call(node, *NONLINEAR, "pow"):
        return True
    return ops.is_call(node, "mul") and all(a in known for a in node.args[:2])


def activation_name(flow: Flow, nodes: Iterable[fx.Node]) -> str:
    """Names a nonlinearity by its ops, fused or spelled out."""
    found = list(nodes)
    names = {ops.base_name(node) for node in found} - {"mul", "softmax"}
    if "gelu" in names:
        gelu = next(node for node in found if ops.is_call(node, "gelu"))
        return "gelu_tanh" if ops.argument(gelu, "approximate") == "tanh" else "gelu"
    if "erf" in names:
        return "gelu"
    if "tanh" in names and ("pow" in names or len(found) > 1):
        return "gelu_tanh"
    if "relu" in names and (names & {"pow", "square"} or len(found) > 1):
        return "relu2"
    if "sigmoid" in names:
        return _sigmoid_name(flow, found)
    names -= {"pow"}
    return "+".join(sorted(names)) if names else "none"


def _sigmoid_name(flow: Flow, nodes: list[fx.Node]) -> str:
    """`x * sigmoid(x)` is silu, `x * sigmoid(1.702 x)` quick_gelu, alone it is sigmoid."""
    if len(nodes) < 2:
        return "sigmoid"
    sigmoid = next(node for node in nodes if ops.is_call(node, "sigmoid"))
    inside = flow.peel(sigmoid.all_input_nodes[0])
    scaled = ops.is_call(inside, "mul") and [flow.scalar(a) for a in inside.args[:2]]
    return "quick_gelu" if scaled and any(n is not None for n in scaled) else "silu"


def _projection(
    rows: tuple[int, ...], above: Sequence[fx.Node], found: Mapping[fx.Node, LinearMap]
) -> Projection:
    made = found[above[rows[0] >> SHIFT]]
    mask = (1 << SHIFT) - 1
    return made.projection(made.out_axis, (compact([row & mask for row in rows]),))
