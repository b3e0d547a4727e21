"""Hidden layers: linears, elementwise ops, and the one linear that reads what they give.

    g = linear(x, Wg);  u = linear(x, Wu)        h = silu(g) * u        y = linear(h, Wd)

One channel of `h` depends on one row of each first matrix and meets one column of the second, so
channels can be cut or merged here without touching anything else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush

from torch import fx

from redpass import ops
from redpass.analysis.linears import Linear, Linears, linears
from redpass.facts import Facts
from redpass.program import Program


@dataclass(frozen=True)
class HiddenLayer:
    """One hidden layer.

    Attributes:
        first: the linears that compute the channels.
        nodes: the ops between, in graph order.
        vectors: the weights `[width]` these ops read, as nodes.
        second: the linear that reads the channels.
        obstacle: why channels cannot be changed here, or None.
    """

    first: tuple[Linear, ...]
    nodes: tuple[fx.Node, ...]
    vectors: tuple[fx.Node, ...]
    second: Linear
    obstacle: str | None

    @property
    def width(self) -> int:
        """How many channels there are."""
        return self.second.ins


def hidden_layers(program: Program, facts: Facts) -> tuple[HiddenLayer, ...]:
    """Finds every hidden layer, in the order of their second linears."""
    table = facts.get(linears)
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    regions = (_Region(program, table, second, order) for second in table.by_node.values())
    return tuple(region.layer() for region in regions if region.first)


class _Region:
    """What lies above one linear, walked up until linears, weights, or a value others read.

    The walk takes the last node in graph order first, so all readers of a node that belong to the
    region are in it before the node itself is looked at.
    """

    def __init__(
        self, program: Program, table: Linears, second: Linear, order: Mapping[fx.Node, int]
    ) -> None:
        self.program, self.table, self.second = program, table, second
        self.first: list[Linear] = []
        self.vectors: list[fx.Node] = []
        self.problems: list[str] = []
        self.inside: dict[fx.Node, None] = {program.nodes[second.node]: None}
        start = program.nodes[second.input]
        pending, names = [(-order[start], start.name)], {start.name}
        while pending:
            node = program.nodes[heappop(pending)[1]]
            for operand in self._visit(node):
                if operand.name not in names:
                    names.add(operand.name)
                    heappush(pending, (-order[operand], operand.name))

    def _visit(self, node: fx.Node) -> list[fx.Node]:
        """Puts `node` where it belongs; returns the operands to go on with."""
        if self._is_vector(node):
            self.vectors.append(node)
            return []
        if ops.is_size(node):
            return []
        is_linear = node.name in self.table.by_node
        if is_linear:
            self.first.append(self.table.by_node[node.name])
        if not (is_linear or self._is_inside(node)):
            self.problems.append(f"{node.name} is neither elementwise nor a linear")
        elif not all(user in self.inside for user in node.users):
            self.problems.append(f"{node.name} is read elsewhere too")
        elif not is_linear:
            self.inside[node] = None
            return list(node.all_input_nodes)
        return []

    def _is_inside(self, node: fx.Node) -> bool:
        if not (ops.is_pure(node) and ops.is_float(node) and self._has_width(node)):
            return False
        if ops.is_call(node, *ops.RESHAPES):
            return isinstance(ops.argument(node, "size", "shape")[-1], int)
        if any(ops.is_size(operand) for operand in node.all_input_nodes):
            return False
        return ops.is_elementwise(node) or ops.is_call(node, *ops.DROPOUTS, *ops.COPIES)

    def _has_width(self, node: fx.Node) -> bool:
        value = node.meta["val"]
        return bool(value.dim() > 1 and value.shape[-1] == self.second.ins)

    def _is_vector(self, node: fx.Node) -> bool:
        return node.op == "get_attr" and tuple(node.meta["val"].shape) == (self.second.ins,)

    def layer(self) -> HiddenLayer:
        """Returns what was found, with the first thing that stands in the way."""
        nodes = tuple(reversed(self.inside))[:-1]
        obstacle = next(iter([*self.problems, *self._obstacles()]), None)
        first, vectors = tuple(reversed(self.first)), tuple(self.vectors)
        return HiddenLayer(first, nodes, vectors, self.second, obstacle)

    def _obstacles(self) -> Iterator[str]:
        weights = [name for linear in self.first for name in linear.names]
        if shared := self.table.shared([*weights, self.second.weight]):
            yield f"the weight {shared} is read elsewhere too"
        if any(linear.outs != self.second.ins for linear in self.first):
            yield "a linear above has another width"
        if self.program.is_fake:
            yield "the weights carry no data"
