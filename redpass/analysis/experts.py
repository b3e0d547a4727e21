"""Experts of a branch: a router that picks the top few, and the weights it picks among."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

from redpass import ops
from redpass.analysis.feed_forward import NONLINEAR, activation_name
from redpass.analysis.flow import Flow
from redpass.analysis.maps import back_to_maps, linear_map
from redpass.analysis.records import Experts


def find_experts(flow: Flow, path: Iterable[fx.Node], maps: Sequence[fx.Node]) -> Experts | None:
    """Describes experts picked by a top-k over the outputs of a learned map, or None.

    Args:
        path: the branch's nodes.
        maps: the learned maps among them, in order.
    """
    ordered = sorted(path, key=flow.order.__getitem__)
    for pick in reversed([node for node in ordered if ops.is_call(node, "topk")]):
        _, above = back_to_maps(flow, pick.all_input_nodes[0])
        router = linear_map(flow, above[-1]) if above else None
        sizes = flow.shape(pick.all_input_nodes[0]) or (0,)
        if router is not None and router.weight is not None and isinstance(sizes[-1], int):
            rest = [node for node in maps if node is not router.node]
            return _record(flow, ordered, pick, (router.node, router.weight, sizes[-1]), rest)
    return None


def _record(
    flow: Flow,
    path: Sequence[fx.Node],
    pick: fx.Node,
    router: tuple[fx.Node, str, int],
    maps: Sequence[fx.Node],
) -> Experts:
    node, weight, count = router
    stacked = [m for m in maps if _stack(flow, m, count)]
    chosen = stacked or [m for m in maps if flow.order[m] > flow.order[pick]]
    others = [m for m in maps if m not in chosen]
    acting = [n for n in path if _acts(flow, n) and _is_between(flow, chosen, n)]
    sizes = flow.shape(chosen[-1].all_input_nodes[0]) if chosen else None
    width = sizes[-1] if sizes and isinstance(sizes[-1], int) else 0
    k: Any = ops.argument(pick, "k")
    return Experts(
        router=node.name,
        router_weight=weight,
        count=count,
        top_k=k if isinstance(k, int) else 0,
        weights=_weights(flow, chosen),
        stacked=bool(stacked),
        width=width,
        activation=activation_name(flow, acting) if acting else "unknown",
        shared=_weights(flow, others),
    )


def _stack(flow: Flow, node: fx.Node, count: int) -> bool:
    """Whether the map's weight holds one matrix an expert along its first axis."""
    shapes = [flow.shape(w) for w in _weight_nodes(flow, node)]
    return any(shape is not None and len(shape) == 3 and shape[0] == count for shape in shapes)


def _acts(flow: Flow, node: fx.Node) -> bool:
    """Whether the node is nonlinear, or the product that makes `x * sigmoid(x)` of a sigmoid."""
    if ops.is_call(node, *NONLINEAR):
        return True
    if not ops.is_call(node, "mul") or len(node.all_input_nodes) != 2:
        return False
    left, right = node.all_input_nodes
    return any(
        ops.is_call(a, "sigmoid") and b in {a.all_input_nodes[0], *_operands(flow, a)}
        for a, b in ((left, right), (right, left))
    )


def _operands(flow: Flow, sigmoid: fx.Node) -> list[fx.Node]:
    return flow.peel(sigmoid.all_input_nodes[0]).all_input_nodes


def _is_between(flow: Flow, maps: Sequence[fx.Node], node: fx.Node) -> bool:
    places = [flow.order[m] for m in maps]
    return bool(places) and min(places) < flow.order[node] < max(places)


def _weights(flow: Flow, maps: Sequence[fx.Node]) -> tuple[str, ...]:
    found = [str(w.target) for m in maps for w in _weight_nodes(flow, m)]
    return tuple(dict.fromkeys(found))


def _weight_nodes(flow: Flow, node: fx.Node) -> list[fx.Node]:
    """The `get_attr` nodes a map reads, through views, casts and picking of rows."""
    found = []
    for arg in node.all_input_nodes:
        source = arg
        while source.op == "call_function" and _moves(flow, source):
            source = source.all_input_nodes[0]
        if source.op == "get_attr" and len(flow.shape(source) or ()) >= 2:
            found.append(source)
    return found


def _moves(flow: Flow, node: fx.Node) -> bool:
    return ops.is_view(node) or flow.is_no_op(node) or ops.is_call(node, "index", "index_select")


def stack_of(node: fx.Node) -> str:
    """The weight `[experts, outs, ins]` of a product that takes a matrix for each row, or ""."""
    picked = node.args[0] if ops.is_call(node, "bmm") else None
    if not isinstance(picked, fx.Node) or not ops.is_call(picked, "index"):
        return ""
    weight, places = picked.args[:2]
    assert isinstance(weight, fx.Node)
    is_one = weight.op == "get_attr" and len(places) == 1  # type: ignore[arg-type]
    return str(weight.target) if is_one else ""
