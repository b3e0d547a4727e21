"""Learned linear maps: which operand is the weight, which of its axes is which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from redpass import ops
from redpass.analysis.flow import Flow
from redpass.analysis.records import Projection
from redpass.analysis.stream import is_learned

VIEWS_OF_A_MATRIX = ("t", "transpose", "permute", "numpy_T", "mT", "adjoint", "swapaxes")


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A learned map `y = x W + b` as it stands in the graph.

    Attributes:
        node: the op.
        source: node of `x`.
        weight: name of `W`'s weight, or None where it is computed.
        bias: name of the bias' weight, or None.
        out_axis: axis of the weight that gives the outputs.
        in_axis: axis of the weight that meets the inputs.
        output: the op, or the add of the bias where that is an op of its own.
    """

    node: fx.Node
    source: fx.Node
    weight: str | None
    bias: str | None
    out_axis: int
    in_axis: int
    output: fx.Node

    def projection(self, axis: int, rows: tuple[Sequence[int], ...] = ()) -> Projection:
        """The record of the map with `rows` along `axis` of its weight."""
        assert self.weight is not None
        return Projection(self.node.name, self.weight, self.bias, axis, rows, self.output.name)


def linear_map(flow: Flow, node: fx.Node) -> LinearMap | None:
    """Returns the map `node` is, or None when it is no learned linear with a 2-D weight."""
    if not is_learned(flow, node):
        return None
    name = ops.base_name(node)
    if name == "linear":
        return _made(flow, node, 0, 1, transposed=True, bias=_at(node, 2))
    if name == "addmm":
        return _made(flow, node, 1, 2, transposed=False, bias=node.args[0])
    if name in ("matmul", "mm"):
        return _made(flow, node, 0, 1, transposed=False, bias=None)
    if name.startswith("conv") and _is_pointwise(flow, node):
        return _made(flow, node, 0, 1, transposed=True, bias=_at(node, 2))
    return None


def _at(node: fx.Node, place: int) -> object:
    return node.args[place] if len(node.args) > place else node.kwargs.get("bias")


def _made(
    flow: Flow, node: fx.Node, source: int, weight: int, *, transposed: bool, bias: object
) -> LinearMap | None:
    x, matrix = node.args[source], node.args[weight]
    if not isinstance(x, fx.Node) or not isinstance(matrix, fx.Node) or matrix in flow.live:
        return None
    matrix = flow.peel(matrix)
    while ops.is_call(matrix, *VIEWS_OF_A_MATRIX):
        transposed = not transposed
        matrix = flow.peel(matrix.all_input_nodes[0])
    name = str(matrix.target) if matrix.op == "get_attr" else None
    out_axis = 0 if transposed else 1
    output, added = (node, flow.weight_of(bias)) if bias is not None else _added(flow, node)
    return LinearMap(node, x, name, added, out_axis, 1 - out_axis, output)


def _added(flow: Flow, node: fx.Node) -> tuple[fx.Node, str | None]:
    """The add of a bias, when that alone reads the map, and the bias' weight."""
    readers = list(flow.readers(node))
    if len(readers) == 1 and ops.is_call(readers[0], "add"):
        for operand in readers[0].args[:2]:
            weight = flow.weight_of(operand)
            if weight is not None and len(flow.shape(operand) or ()) == 1:  # type: ignore[arg-type]
                return readers[0], weight
    return node, None


def _is_pointwise(flow: Flow, node: fx.Node) -> bool:
    """Whether a convolution is a linear map of the channels: one tap, one group."""
    weight = node.args[1]
    sizes = flow.shape(weight) if isinstance(weight, fx.Node) else None
    try:
        groups = ops.argument(node, "groups")
    except KeyError:
        return False
    return bool(sizes) and all(s == 1 for s in sizes[2:]) and groups == 1  # type: ignore[index]


def back_to_maps(flow: Flow, node: fx.Node) -> tuple[set[fx.Node], tuple[fx.Node, ...]]:
    """Walks back from `node` until learned maps: (nodes passed, the maps in order)."""
    todo, nodes, maps = [node], {node}, set()
    while todo:
        current = todo.pop()
        if is_learned(flow, current):
            maps.add(current)
            continue
        for arg in current.all_input_nodes:
            if arg not in nodes and arg in flow.live and not ops.is_size(arg):
                nodes.add(arg)
                todo.append(arg)
    return nodes - maps, tuple(sorted(maps, key=flow.order.__getitem__))


def feature_axis(node: fx.Node) -> int:
    """The axis of a map's output that holds its features."""
    return 1 if ops.base_name(node).startswith("conv") else -1
